"""Rows of the user's files that cannot be used: named, counted, and refused all at once.

Readers and feature builders never drop a row in silence. What they cannot use they add here, and
go on to the next, so that one message tells all. By default the message is an InputError; a caller
who would rather go on without those rows says so, and has their number and places to report.
"""

from __future__ import annotations

from prelnroberta.errors import InputError

_SHOWN = 5


class RowErrors:
    """Collects bad rows over one or several files and stages.

    A function that takes `bad=None` refuses at its own end. Given one, it only adds to it, and the
    caller settles when all stages have spoken:

        bad = RowErrors(skip=True)
        examples = read_sentences("train.conll", bad=bad)
        bad.raise_if_any()  # raises unless skip
        print(bad.summary)

    Args:
        skip: go on without the bad rows instead of refusing them.
    """

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.total = 0
        self.bad: dict[str, str] = {}  # place -> what is wrong there first

    def seen(self, rows: int = 1) -> None:
        """Counts rows, good or bad, that a reader meets."""
        self.total += rows

    def ensure_row_count(self, rows: int) -> None:
        """Of a later stage: the same rows again, unless what read them did not count here."""
        self.total = max(self.total, rows)

    def add(self, place: str, problem: str) -> None:
        self.bad.setdefault(place, problem)

    @property
    def summary(self) -> str:
        """'3 of 1,200 rows are bad: a.tsv:17: expected 4 columns, found 3; ...'"""
        if not self.bad:
            return f"0 of {self.total:,} rows are bad"
        shown = [f"{place}: {problem}" for place, problem in list(self.bad.items())[:_SHOWN]]
        if len(self.bad) > _SHOWN:
            shown.append(f"and {len(self.bad) - _SHOWN:,} more")
        verb = "row is" if self.total == 1 else "rows are"
        return f"{len(self.bad):,} of {self.total:,} {verb} bad: " + "; ".join(shown)

    def raise_if_any(self) -> None:
        """Raises InputError with the summary, unless there are none or they are to be skipped."""
        if self.bad and not self.skip:
            raise InputError(self.summary + " (mend them, or ask to skip bad rows)")


def ensure_collector(bad: RowErrors | None) -> tuple[RowErrors, bool]:
    """The caller's collector, or a new one that the callee must settle itself (True)."""
    return (RowErrors(), True) if bad is None else (bad, False)

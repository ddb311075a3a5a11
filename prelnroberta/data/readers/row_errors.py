"""Collects rows of the user's files that cannot be used, to report all of them in one message.

Readers and feature builders never drop a row silently. They add an unusable row to a `RowErrors`
and continue with the next. By default the collected rows become one InputError; with `skip=True`
the caller goes on without them and can report how many there were, and where.
"""

from __future__ import annotations

from prelnroberta.errors import InputError

_MAX_SHOWN = 5


class RowErrors:
    """Unusable rows of one or several files and processing stages.

    A function called with `row_errors=None` raises at its own end. A function that is given a
    collector only adds to it, and the caller raises after the last stage:

        row_errors = RowErrors(skip=True)
        examples = read_sentences("train.conll", row_errors=row_errors)
        row_errors.raise_if_any()  # does nothing with skip=True
        print(row_errors.summary)

    Args:
        skip: continue without the unusable rows instead of raising.

    Attributes:
        num_rows: number of rows read, usable or not.
        problems: location of each unusable row -> the first problem found there.
    """

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.num_rows = 0
        self.problems: dict[str, str] = {}

    def count_rows(self, rows: int = 1) -> None:
        """Counts rows that were read, usable or not."""
        self.num_rows += rows

    def ensure_row_count(self, rows: int) -> None:
        """Raises the count to `rows`, for a later stage whose reader may have counted already."""
        self.num_rows = max(self.num_rows, rows)

    def add(self, location: str, problem: str) -> None:
        """Records a problem; of several at one location, the first is kept."""
        self.problems.setdefault(location, problem)

    @property
    def summary(self) -> str:
        """'3 of 1,200 rows are bad: a.tsv:17: expected 4 columns, found 3; ...'"""
        if not self.problems:
            return f"0 of {self.num_rows:,} rows are bad"
        shown = [
            f"{location}: {problem}"
            for location, problem in list(self.problems.items())[:_MAX_SHOWN]
        ]
        if len(self.problems) > _MAX_SHOWN:
            shown.append(f"and {len(self.problems) - _MAX_SHOWN:,} more")
        verb = "row is" if self.num_rows == 1 else "rows are"
        return f"{len(self.problems):,} of {self.num_rows:,} {verb} bad: " + "; ".join(shown)

    def raise_if_any(self) -> None:
        """Raises InputError with the summary if there are problems and `skip` is False."""
        if self.problems and not self.skip:
            raise InputError(self.summary + " (fix them, or pass --skip_bad_rows)")


def ensure_collector(row_errors: RowErrors | None) -> tuple[RowErrors, bool]:
    """Returns (collector, is_owner): the caller's collector, or a new one that the callee owns.

    The owner has to call `raise_if_any`.
    """
    return (RowErrors(), True) if row_errors is None else (row_errors, False)

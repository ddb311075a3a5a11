"""Several runs in one call: every combination of seeds and swept flags, and the table of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags as absl_flags

from experiments.flags import FLAGS
from prelnroberta.errors import InputError
from prelnroberta.files import written_whole

Point = dict[str, str]  # name of a flag -> its value


def points(seeds: Sequence[str], sweeps: Sequence[str]) -> list[Point]:
    """Every combination, seeds last; none where there is nothing to combine.

    Raises:
        InputError: a sweep that is not name=value,value; a flag twice, unknown, or a wrong value.
    """
    axes: dict[str, list[str]] = {}
    for sweep in [*sweeps, *([f"seed={','.join(seeds)}"] if seeds else [])]:
        name, equals, values = sweep.partition("=")
        found = list(dict.fromkeys(values.split(",")))
        if not equals or "" in found or name in axes or name in ("run_dir", "seeds", "sweep"):
            raise InputError(
                f"--sweep={sweep}, expected a flag, each in one sweep, and its values, as "
                "learning_rate=1e-4,3e-4"
            )
        if name not in FLAGS:
            raise InputError(f"--sweep={sweep}: there is no flag --{name}")
        axes[name] = found
    combined = [
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    ]
    for point in combined if axes else []:
        with flags_of(point, Path()):
            pass
    return combined if axes else []


def name(point: Point) -> str:
    """The name of its folder."""
    return ",".join(f"{flag}={value.replace('/', '-')}" for flag, value in point.items())


@contextlib.contextmanager
def flags_of(point: Point, run_dir: Path) -> Iterator[None]:
    """Sets the flags of one run, in a folder of its own below `run_dir`; and back."""
    changes = {**point, "run_dir": str(run_dir / name(point))}
    before = {flag: (FLAGS[flag].value, FLAGS[flag].present) for flag in FLAGS}
    try:
        for several in ("seeds", "sweep"):
            FLAGS[several].value = []
        for flag, value in changes.items():
            try:
                FLAGS[flag].unparse()
                FLAGS[flag].parse(value)
            except absl_flags.IllegalFlagValueError as error:
                raise InputError(f"--sweep: {error}") from None
            FLAGS[flag].present = 1
        yield
    finally:
        for flag, (value, present) in before.items():
            FLAGS[flag].value, FLAGS[flag].present = value, present


def write_table(run_dir: Path, points: Sequence[Point]) -> str:
    """`table.txt` and `table.json`: each combination, its seeds' mean and standard deviation.

    One seed has none: not a deviation of 0.
    """
    groups: dict[str, list[dict]] = {}
    for point in points:
        results = json.loads((run_dir / name(point) / "results.json").read_text(encoding="utf-8"))
        others = {flag: value for flag, value in point.items() if flag != "seed"}
        groups.setdefault(name(others), []).append(results)
    table = [
        {
            "run": group or "all",
            "seeds": len(results),
            "metric": results[0]["metric"],
            "trivial": results[0]["trivial"],
            "values": (values := [r["metrics"][r["metric"]] for r in results]),
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
        }
        for group, results in groups.items()
    ]
    width = max(3, *(len(row["run"]) for row in table))
    lines = [f"{'run':{width}}  seeds  {table[0]['metric']:>12}  deviation  trivial"]
    for row in table:
        spread = "-" if row["deviation"] is None else f"{row['deviation']:.4f}"
        lines.append(
            f"{row['run']:{width}}  {row['seeds']:5}  {row['mean']:12.4f}  {spread:>9}"
            f"  {row['trivial']:7.4f}"
        )
    for file, text in (
        ("table.json", json.dumps(table, indent=2)),
        ("table.txt", "\n".join(lines)),
    ):
        with written_whole(run_dir / file) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    return "\n".join(lines)

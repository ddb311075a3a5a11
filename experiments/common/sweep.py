"""Several runs in one call: all combinations of seeds and swept flags, and a table of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.flags.absl_flags import parsed
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

if TYPE_CHECKING:
    from experiments.flags.programs import FinetuneSettings

Point = dict[str, str]  # name of a flag -> its value, as text


def points(settings: FinetuneSettings) -> list[Point]:
    """All combinations of --sweep and --seeds, seeds last; none if nothing is swept.

    Raises:
        InputError: a sweep that is not name=value,value; a flag twice, unknown, or a wrong value.
    """
    axes: dict[str, list[str]] = {}
    seeds = [f"seed={','.join(map(str, settings.seeds))}"] if settings.seeds else []
    for sweep in [*settings.sweep, *seeds]:
        name, equals, values = sweep.partition("=")
        found = list(dict.fromkeys(values.split(",")))
        if not equals or "" in found or name in axes or name in ("run_dir", "seeds", "sweep"):
            raise InputError(
                f"--sweep={sweep}, expected a flag, each in one sweep, and its values, for example "
                "learning_rate=1e-4,3e-4"
            )
        axes[name] = found
    if not axes:
        return []
    combined = [
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    ]
    for point in combined:
        settings_at(settings, point)  # refuses a wrong flag or value before the first run
    return combined


def name(point: Point) -> str:
    """The name of the point's folder."""
    return ",".join(f"{flag}={value.replace('/', '-')}" for flag, value in point.items())


def settings_at(settings: FinetuneSettings, point: Point) -> FinetuneSettings:
    """The settings of one run, in its own folder inside --run_dir."""
    try:
        changes = {flag: parsed(settings, flag, text) for flag, text in point.items()}
    except InputError as error:
        raise InputError(f"--sweep: {error}") from None
    run_dir = str(settings.run_path / name(point))
    return dataclasses.replace(settings, seeds=(), sweep=(), run_dir=run_dir, **changes)


def write_table(run_dir: Path, points: Sequence[Point]) -> str:
    """Writes `table.txt` and `table.json`: the mean and standard deviation over seeds of each
    combination. A single seed has no deviation, rather than a deviation of 0."""
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
            "baseline": results[0]["baseline"],
            "values": (values := [r["metrics"][r["metric"]] for r in results]),
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
        }
        for group, results in groups.items()
    ]
    width = max(3, *(len(row["run"]) for row in table))
    lines = [f"{'run':{width}}  seeds  {table[0]['metric']:>12}  deviation  baseline"]
    for row in table:
        spread = "-" if row["deviation"] is None else f"{row['deviation']:.4f}"
        lines.append(
            f"{row['run']:{width}}  {row['seeds']:5}  {row['mean']:12.4f}  {spread:>9}"
            f"  {row['baseline']:8.4f}"
        )
    for file, text in (
        ("table.json", json.dumps(table, indent=2)),
        ("table.txt", "\n".join(lines)),
    ):
        with atomic_write(run_dir / file) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    return "\n".join(lines)

"""Tables and a picture of what was measured."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark.race import FLAX, Result, best_peer, ratios
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

Record = dict[str, Any]


def machine() -> str:
    """What this ran on, in a line."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "torch", "tensorflow-cpu"))
    return f"{name}, {os.cpu_count()} CPUs; {versions}"


def digest() -> str:
    """Of our code: what was measured of other code says nothing of this."""
    top = Path(__file__).parents[2]
    sources = [top / "experiments" / "training.py"]  # whose `compiled` makes the step
    for name in ("prelnroberta", "bridges", "experiments/benchmark"):
        sources += sorted(top.joinpath(name).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def begun(output: Path, run: Record) -> Record:
    """What results.json holds of this very run, or nothing yet; InputError if it is another's."""
    path = output / "results.json"
    if not path.exists():
        return {**run, "cases": [], "compiled": []}
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in run.items():
        if found.get(name) != value:
            raise InputError(
                f"{path} was measured with {name} {found.get(name)!r}, this is {value!r}: give "
                "another --output"
            )
    return found


def save(output: Path, found: Record) -> None:
    with atomic_write(output / "results.json") as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    with atomic_write(output / "table.md") as partial:
        partial.write_text(summary(found["cases"]) + "\n", encoding="utf-8")


def results(record: Record) -> list[Result]:
    return [Result(**result) for result in record["results"]]


def table(record: Record) -> str:
    """One case: every contender, and how much faster the first, ours, is."""
    found = results(record)
    ours = found[0]
    head = (
        "",
        "ms",
        "tokens/s",
        "GFLOP/s",
        "first ours is",
        "quartiles",
        "import s",
        "first s",
        "peak MiB",
    )
    lines = [_columns(head)]
    for result in found:
        seconds = float(np.median(result.seconds))
        ratio = np.percentile(ratios(ours, result), (25, 50, 75))
        gflops = record["gflop"] and f"{record['gflop'] / seconds:,.0f}"
        lines.append(
            _columns(
                (
                    result.name,
                    f"{1e3 * seconds:,.1f}",
                    f"{record['tokens'] / seconds:,.0f}",
                    gflops or "",
                    f"{ratio[1]:.2f}x",
                    f"{ratio[0]:.2f}-{ratio[2]:.2f}",
                    f"{result.imported:.1f}",
                    f"{result.first:.1f}",
                    f"{result.peak_bytes / 2**20:,.0f}" if result.peak_bytes else "",
                )
            )
        )
    limit = record["matrix_product_gflops"]
    lines.append(
        f"{len(ours.seconds)} rounds; {record['fill']:.0%} of the rows are tokens; matrix products "
        f"reach {limit:,.0f} GFLOP/s here; numbers agree to {max(r.difference for r in found):.0e}"
    )
    return "\n".join(lines)


def _columns(texts: tuple[str, ...]) -> str:
    widths = (29, 9, 9, 8, 13, 10, 8, 8, 9)
    name, *others = (
        text.rjust(width) if at else text.ljust(width)
        for at, (text, width) in enumerate(zip(texts, widths, strict=True))
    )
    return "  ".join([name, *others])


def summary(records: list[Record]) -> str:
    """All cases as a markdown table: ratios of speed, ours over theirs."""
    lines = [
        "| case | ours, tokens/s | over transformers Flax | over the best other peer | that peer | "
        "PyTorch twin over SDPA | TF twin over best TF |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        found = {r.name: r for r in results(record)}
        ours = next(iter(found.values()))
        best = best_peer(ours, list(found.values()))
        rate = record["tokens"] / float(np.median(ours.seconds))
        padded = found.get("ours padded")
        beside = f" (padded {_ratio(padded, best)})" if padded and padded is not ours else ""
        cells = [
            record["case"],
            f"{rate:,.0f}",
            _ratio(ours, found.get(FLAX)),
            _ratio(ours, best) + beside,
            best.name.removeprefix("transformers "),
            _ratio(
                found.get("our PyTorch, padding skipped", found.get("our PyTorch")),
                found.get("transformers 5 torch SDPA"),
            ),
            _ratio(
                _fastest(found, "our TensorFlow"),
                _fastest(found, "transformers 4.57 TF"),
            )
            if "our TensorFlow" in found
            else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _fastest(found: dict[str, Result], prefix: str) -> Result:
    some = [r for name, r in found.items() if name.startswith(prefix)]
    return min(some, key=lambda r: float(np.median(r.seconds)))


def _ratio(of: Result | None, over: Result | None) -> str:
    return f"{np.median(ratios(of, over)):.2f}" if of and over else ""


def lines_of(measured: list[dict[str, Any]]) -> list[str]:
    """Memory and compile time of our step."""
    return [f"{m['what']}: {m['value']} ({m['detail']})" for m in measured]


def draw(path: Path, records: list[Record]) -> Path:
    """speed.png: ours over every peer, case by case, with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.42 * len(records)), layout="constrained")
    colours = {FLAX: "tab:orange", "torch": "tab:red", "TF": "tab:blue"}
    for row, record in enumerate(records):
        ours, *others = results(record)
        for result in others:
            if not result.peer:
                continue
            low, middle, high = np.percentile(ratios(ours, result), (25, 50, 75))
            colour = next(c for name, c in colours.items() if name in result.name)
            axes.errorbar(
                middle, row, xerr=[[middle - low], [high - middle]], fmt="o", color=colour
            )
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    axes.axvline(1.0, color="grey", linewidth=1)
    axes.set_yticks(range(len(records)), [record["case"] for record in records])
    axes.invert_yaxis()
    axes.set(xlabel="times as fast as (median and quartiles of rounds)", xscale="log")
    axes.set_xticks([0.5, 0.75, 1, 1.5, 2, 3], ["0.5", "0.75", "1", "1.5", "2", "3"])
    axes.grid(alpha=0.3, axis="x")
    axes.legend(loc="lower right")
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)
    return path

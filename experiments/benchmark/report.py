"""Tables and a plot of the benchmark's results."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark.runner import FLAX, TORCH_SDPA, Result, best_peer, speedups
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

Record = dict[str, Any]


def describe_machine() -> str:
    """CPU and versions, in a line."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "torch", "tensorflow-cpu"))
    return f"{name}, {os.cpu_count()} CPUs; {versions}"


def code_digest() -> str:
    """Digest of the timed code: results of other code must not enter the same table."""
    root = Path(__file__).parents[2]
    sources: list[Path] = []
    for name in ("prelnroberta", "bridges", "experiments/benchmark", "experiments/common"):
        sources += sorted(root.joinpath(name).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def load_results(output: Path, run: Record) -> Record:
    """Reads results.json, or returns new results.

    Raises:
        InputError: results.json is of another machine, code or number of rounds than `run`.
    """
    path = output / "results.json"
    if not path.exists():
        return {**run, "cases": [], "compiled": []}
    results = json.loads(path.read_text(encoding="utf-8"))
    for name, value in run.items():
        if results.get(name) != value:
            raise InputError(
                f"{path} was measured with {name} {results.get(name)!r}, this is {value!r}: give "
                "another --output"
            )
    return results


def save_results(output: Path, results: Record) -> None:
    with atomic_write(output / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with atomic_write(output / "table.md") as partial:
        partial.write_text(summary_table(results["cases"]) + "\n", encoding="utf-8")


def case_results(record: Record) -> list[Result]:
    return [Result(**result) for result in record["results"]]


def format_case(record: Record) -> str:
    """A table of one case: every contender, and how many times as fast the first, ours, is."""
    results = case_results(record)
    ours = results[0]
    header = (
        "",
        "ms",
        "tokens/s",
        "GFLOP/s",
        "ours speedup",
        "quartiles",
        "import s",
        "first s",
        "peak MiB",
    )
    lines = [_align(header)]
    for result in results:
        seconds = float(np.median(result.seconds))
        low, median, high = np.percentile(speedups(ours, result), (25, 50, 75))
        gflops = record["gflop"] and f"{record['gflop'] / seconds:,.0f}"
        lines.append(
            _align(
                (
                    result.name,
                    f"{1e3 * seconds:,.1f}",
                    f"{record['tokens'] / seconds:,.0f}",
                    gflops or "",
                    f"{median:.2f}x",
                    f"{low:.2f}-{high:.2f}",
                    f"{result.import_seconds:.1f}",
                    f"{result.first_seconds:.1f}",
                    f"{result.peak_bytes / 2**20:,.0f}" if result.peak_bytes else "",
                )
            )
        )
    peak = record["matrix_product_gflops"]
    difference = max(result.difference for result in results)
    lines.append(
        f"{len(ours.seconds)} rounds; {record['fill']:.0%} of the rows are tokens; matrix products "
        f"reach {peak:,.0f} GFLOP/s here; outputs agree to {difference:.0e}"
    )
    return "\n".join(lines)


def _align(texts: tuple[str, ...]) -> str:
    widths = (29, 9, 9, 8, 13, 10, 8, 8, 9)
    name, *others = (
        text.rjust(width) if at else text.ljust(width)
        for at, (text, width) in enumerate(zip(texts, widths, strict=True))
    )
    return "  ".join([name, *others])


def summary_table(records: list[Record]) -> str:
    """All cases as a markdown table of speedups, ours over others."""
    lines = [
        "| case | ours, tokens/s | over transformers Flax | over the best other peer | that peer | "
        "PyTorch twin over SDPA | TF twin over best TF |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(_summary_cells(record))} |" for record in records),
    ]
    return "\n".join(lines)


def _summary_cells(record: Record) -> list[str]:
    results = case_results(record)
    ours, best = results[0], best_peer(results[0], results)
    by_name = {result.name: result for result in results}
    tokens_per_second = record["tokens"] / float(np.median(ours.seconds))
    padded = by_name.get("ours padded")
    if padded is ours:
        padded = None
    torch_twin = by_name.get("our PyTorch, padding skipped", by_name.get("our PyTorch"))
    tf_twin, tf = _fastest(results, "our TensorFlow"), _fastest(results, "transformers 4.57 TF")
    return [
        record["case"],
        f"{tokens_per_second:,.0f}",
        _median_speedup(ours, by_name.get(FLAX)),
        _median_speedup(ours, best)
        + (f" (padded {_median_speedup(padded, best)})" if padded else ""),
        best.name.removeprefix("transformers "),
        _median_speedup(torch_twin, by_name.get(TORCH_SDPA)),
        _median_speedup(tf_twin, tf),
    ]


def _fastest(results: list[Result], prefix: str) -> Result | None:
    matching = [result for result in results if result.name.startswith(prefix)]
    return min(matching, key=lambda r: float(np.median(r.seconds)), default=None)


def _median_speedup(ours: Result | None, other: Result | None) -> str:
    return f"{np.median(speedups(ours, other)):.2f}" if ours and other else ""


def format_compile_costs(costs: list[dict[str, Any]]) -> list[str]:
    """A line for each result of `compile_cost.measure`."""
    return [f"{cost['what']}: {cost['value']} ({cost['detail']})" for cost in costs]


def draw_speedups(path: Path, records: list[Record]) -> Path:
    """Draws speed.png: the speedup over every peer in every case, with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.42 * len(records)), layout="constrained")
    colours = {FLAX: "tab:orange", "torch": "tab:red", "TF": "tab:blue"}
    for row, record in enumerate(records):
        ours, *others = case_results(record)
        for result in others:
            if not result.is_peer:
                continue
            low, median, high = np.percentile(speedups(ours, result), (25, 50, 75))
            colour = next(c for name, c in colours.items() if name in result.name)
            axes.errorbar(
                median, row, xerr=[[median - low], [high - median]], fmt="o", color=colour
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

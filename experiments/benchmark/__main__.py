"""Compares the speed of this project and of transformers on the same inputs.

    make benchmark                                   # also installs transformers 4.57 and 5
    python -m experiments.benchmark --case=pretrain-small --rounds=7

In each case all contenders have the same weights, batches and lengths. Their outputs are compared
first; then they are timed in turn. Ratios are medians over rounds. --output has results.json and
table.md, written after every case, and speed.png. The same command resumes an interrupted run;
another --case adds cases to the results.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.flags.checks import check_installed, check_positive
from experiments.flags.launch import launch
from experiments.flags.programs import BenchmarkSettings
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    from experiments.benchmark.cases import Case
    from experiments.benchmark.runner import Result


def main(settings: BenchmarkSettings) -> None:
    """Runs every case that has no result in --output yet, and writes table and plot."""
    from experiments.benchmark import compile_cost, report
    from experiments.benchmark.cases import all_cases

    check_environment(settings)
    cases = select_cases(settings.case)
    output = Path(settings.output)
    run = {
        "machine": report.describe_machine(),
        "rounds": settings.rounds,
        "code": report.code_digest(),
    }
    results = report.load_results(output, run)
    output.mkdir(parents=True, exist_ok=True)
    run_cases(cases, settings.rounds, output, results)
    if settings.compiled and not results["compiled"]:
        print("compiling our training step in several ways: temporary memory and compile time")
        results["compiled"] = compile_cost.measure()
    for line in report.format_compile_costs(results["compiled"]):
        print(line)
    order = [case.name for case in all_cases()]
    results["cases"].sort(key=lambda record: order.index(record["case"]))
    report.save_results(output, results)
    plot = report.draw_speedups(output / "speed.png", results["cases"])
    print(
        f"\n{report.summary_table(results['cases'])}\nwritten: {output}/results.json, table.md, "
        f"{plot.name}"
    )


def check_environment(settings: BenchmarkSettings) -> None:
    from experiments.benchmark.runner import TRANSFORMERS_4

    check_positive(settings, "rounds")
    for module in ("torch", "tensorflow", "transformers"):
        check_installed(module, "torch,tf,dev", "the benchmark")
    if not TRANSFORMERS_4.exists():
        raise InputError(f"{TRANSFORMERS_4}: not found; run `make benchmark`, which installs it")


def select_cases(parts: Sequence[str]) -> list[Case]:
    """The cases whose name contains one of `parts`; all without parts."""
    from experiments.benchmark.cases import all_cases

    cases = [case for case in all_cases() if any(part in case.name for part in parts or [""])]
    if not cases:
        names = "\n  ".join(case.name for case in all_cases())
        raise InputError(f"--case={','.join(parts)}: no case's name contains it. Cases:\n  {names}")
    return cases


def run_cases(cases: list[Case], rounds: int, output: Path, results: dict[str, Any]) -> None:
    """Runs the cases that `results` lacks; adds each to them, saves and prints it."""
    import tempfile

    from tqdm import tqdm

    from experiments.benchmark import report
    from experiments.benchmark.cases import tokenized_documents, write_case, write_weights
    from experiments.benchmark.runner import matrix_product_gflops, run_case
    from experiments.common.run_report import format_duration

    done = {record["case"] for record in results["cases"]}
    todo = [case for case in cases if case.name not in done]
    gflops = matrix_product_gflops()
    next(gflops)  # warm-up
    print(
        f"{results['machine']}; load {os.getloadavg()[0]:.1f}\n{len(cases)} cases of {rounds} "
        "rounds or more"
    )
    if len(todo) < len(cases):
        print(f"{output} has {len(cases) - len(todo)} of them already")
    with (
        tempfile.TemporaryDirectory(prefix="prelnroberta-benchmark-") as scratch,
        tqdm(todo, unit="case", disable=None) as bar,
    ):
        documents = tokenized_documents(4096, Path(scratch)) if todo else []
        for number, case in enumerate(bar, len(cases) - len(todo) + 1):
            begin = time.monotonic()
            weights = Path(scratch, "weights", f"{case.operation}-{case.preset}-{case.model}")
            if not weights.exists():
                write_weights(case, weights)
            folder = Path(scratch, "cases", str(number))
            write_case(case, folder, documents)
            peak_gflops = max(next(gflops) for _ in range(5))

            def show_progress(message: str, case: Case = case) -> None:
                bar.set_postfix_str(f"{case.name}: {message}")

            timed = run_case(case, weights, folder, rounds, on_progress=show_progress)
            results["cases"].append(to_record(case, folder, timed, peak_gflops))
            report.save_results(output, results)
            duration = format_duration(time.monotonic() - begin)
            bar.write(
                f"\n{number}/{len(cases)} {case.name} ({duration})\n"
                f"{report.format_case(results['cases'][-1])}"
            )


def to_record(
    case: Case, folder: Path, results: list[Result], peak_gflops: float
) -> dict[str, Any]:
    """A case and its results as in results.json."""
    from experiments.benchmark.cases import read_case
    from prelnroberta.config import IGNORE_INDEX

    _, batch = read_case(folder)
    lengths = batch["attention_mask"].reshape(-1, case.L).sum(1)
    pretraining = case.operation == "train" and case.model == "masked_lm"
    num_masked = (batch["labels"] != IGNORE_INDEX).sum(1) if pretraining else None
    tokens = int(lengths.sum()) + len(lengths) * case.new_tokens
    return {
        "case": case.name,
        **dataclasses.asdict(case),
        "tokens": tokens,
        "fill": float(lengths.mean() / case.L),
        "gflop": case.flops(lengths, num_masked) / 1e9 if case.operation != "generate" else None,
        "matrix_product_gflops": peak_gflops,
        "results": [dataclasses.asdict(result) for result in results],
    }


if __name__ == "__main__":
    launch(main, BenchmarkSettings)

"""Runs the contenders of one group in a process of their own.

`runner.py` starts `python -m experiments.benchmark.worker` and exchanges lines of JSON with it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from experiments.benchmark.workload import Workload


def main(module: str, weights: str, case_folder: str, *variants: str) -> None:
    # runner.py reads the answers from stdout; what libraries print there goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    begin = time.perf_counter()
    contender = importlib.import_module(f"experiments.benchmark.contenders.{module}")
    import_seconds = time.perf_counter() - begin

    from experiments.benchmark.cases import read_case

    case, batch = read_case(Path(case_folder))
    if not variants:
        contender.convert_weights(Path(weights), case)
        return
    workloads = contender.make_workloads(Path(weights), case, batch, list(variants))
    # All outputs before any training, since variants may share a model.
    outputs = {variant: Path(case_folder) / f"{module}-{variant}.npy" for variant in workloads}
    output_seconds = {}
    for variant, workload in workloads.items():
        begin = time.perf_counter()
        np.save(outputs[variant], np.asarray(workload.outputs()))
        output_seconds[variant] = time.perf_counter() - begin
    for number, (variant, workload) in enumerate(workloads.items()):
        first_run, second_run = _seconds_per_run(workload, 1), _seconds_per_run(workload, 1)
        peak = _peak_bytes()
        print(
            json.dumps(
                {
                    "outputs": str(outputs[variant]),
                    "import_seconds": import_seconds,
                    # A forward pass is compiled by the first, a training step by the second.
                    "first_seconds": output_seconds[variant] + first_run,
                    "run_seconds": second_run,
                    # Known only of the variant that ran first.
                    "peak_bytes": None if number else peak,
                }
            ),
            file=answers,
        )
    for line in sys.stdin:
        request = json.loads(line)
        seconds = _seconds_per_run(workloads[request["variant"]], request["repeats"])
        print(json.dumps(seconds), file=answers)


def _peak_bytes() -> int | None:
    """Peak memory of this process; None except on Linux. (getrusage includes the parent's.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _seconds_per_run(workload: Workload, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        workload.run()
    return (time.perf_counter() - begin) / repeats


if __name__ == "__main__":
    main(*sys.argv[1:])

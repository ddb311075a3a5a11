"""A contender in a process of its own: `python -m experiments.benchmark.worker` is started and
spoken to by `race.py`, a line of JSON each way."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from experiments.benchmark.work import Work


def main(module: str, weights: str, case_folder: str, *modes: str) -> None:
    # Libraries print what they like; what race.py reads is ours alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    begin = time.perf_counter()
    contender = importlib.import_module(f"experiments.benchmark.{module}")
    imported = time.perf_counter() - begin

    from experiments.benchmark.cases import read

    case, batch = read(Path(case_folder))
    if not modes:  # only what makes its weights readable to it
        contender.prepare(Path(weights), case)
        return
    works = contender.build(Path(weights), case, batch, list(modes))
    # Before any trains: modes may share one model.
    checked = {mode: Path(case_folder) / f"{module}-{mode}.npy" for mode in works}
    checking = {}
    for mode, work in works.items():
        begin = time.perf_counter()
        np.save(checked[mode], np.asarray(work.check()))
        checking[mode] = time.perf_counter() - begin
    for number, (mode, work) in enumerate(works.items()):
        first, again = _seconds(work, 1), _seconds(work, 1)
        peak = _peak_bytes()
        print(
            json.dumps(
                {
                    "checked": str(checked[mode]),
                    "imported": imported,
                    "first": checking[mode] + first,
                    "again": again,
                    # Of a process that ran this mode alone.
                    "peak_bytes": None if number else peak,
                }
            ),
            file=answers,
        )
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(_seconds(works[asked["mode"]], asked["times"])), file=answers)


def _peak_bytes() -> int | None:
    """Of this process alone; getrusage would begin with what its parent held. None but on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _seconds(work: Work, times: int) -> float:
    """Of one run, by `times` of them."""
    begin = time.perf_counter()
    for _ in range(times):
        work.run()
    return (time.perf_counter() - begin) / times


if __name__ == "__main__":
    main(*sys.argv[1:])

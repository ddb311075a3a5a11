"""Times this project against transformers on the same work, side by side in one run.

make benchmark                                   # also sets up transformers 4.57 and 5
python -m experiments.benchmark --case=pretrain-small --rounds=7

Each case: identical weights, batches and lengths; first the numbers of all contenders are compared,
then they take turns. Ratios are medians over rounds. Written to --output: results.json after every
case, table.md, speed.png.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import flags
from experiments.flags import FLAGS
from prelnroberta.errors import InputError
from prelnroberta.files import written_whole

if TYPE_CHECKING:
    from experiments.benchmark.cases import Case
    from experiments.benchmark.race import Result

flags.declare("benchmark")


def main() -> None:
    import tempfile

    from experiments.benchmark import compiled, report
    from experiments.benchmark.cases import all_cases, documents, write, write_weights
    from experiments.benchmark.race import TRANSFORMERS_4, ceiling, race
    from experiments.report import duration

    flags.positive("rounds")
    for module in ("torch", "tensorflow", "transformers"):
        flags.needs(module, "torch,tf,dev", "the benchmark")
    if not TRANSFORMERS_4.exists():
        raise InputError(f"{TRANSFORMERS_4}: not there; `make benchmark` sets up what it compares")
    cases = [c for c in all_cases() if any(part in c.name for part in FLAGS.case or [""])]
    if not cases:
        names = "\n  ".join(case.name for case in all_cases())
        raise InputError(f"--case={','.join(FLAGS.case)}: in no case's name. They are:\n  {names}")
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)

    machine = report.machine()
    speeds = ceiling()
    next(speeds)  # the first includes waking up
    print(f"{machine}\n{len(cases)} cases, {FLAGS.rounds} rounds each", flush=True)
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="prelnroberta-benchmark-") as scratch:
        texts = documents(4096, Path(scratch))
        for number, case in enumerate(cases, 1):
            begin = time.monotonic()
            weights = Path(scratch, "weights", f"{case.work}-{case.preset}-{case.model}")
            if not weights.exists():
                write_weights(case, weights)
            folder = Path(scratch, "cases", str(number))
            write(case, folder, texts)
            limit = max(next(speeds) for _ in range(5))
            results = race(case, weights, folder, FLAGS.rounds)
            done.append(record(case, folder, results, limit))
            print(
                f"\n{number}/{len(cases)} {case.name} ({duration(time.monotonic() - begin)})\n"
                f"{report.table(done[-1])}",
                flush=True,
            )
            save(output, machine, done, [])
    measured = compiled.measure() if FLAGS.compiled else []
    for line in report.lines_of(measured):
        print(line)
    save(output, machine, done, measured)
    picture = report.draw(output / "speed.png", done)
    print(f"\n{report.summary(done)}\nwritten: {output}/results.json, table.md, {picture.name}")


def record(case: Case, folder: Path, results: list[Result], limit: float) -> dict[str, Any]:
    """A case and its results as JSON: seconds of every round, and what they are held against."""
    from experiments.benchmark.cases import IGNORE, read

    _, batch = read(folder)
    lengths = batch["attention_mask"].reshape(-1, case.L).sum(1)
    pretraining = case.work == "train" and case.model == "masked_lm"
    masked = (batch["labels"] != IGNORE).sum(1) if pretraining else None
    tokens = int(lengths.sum()) + len(lengths) * case.new_tokens
    return {
        "case": case.name,
        **dataclasses.asdict(case),
        "tokens": tokens,
        "fill": float(lengths.mean() / case.L),
        "gflop": case.flops(lengths, masked) / 1e9 if case.work != "generate" else None,
        "matrix_product_gflops": limit,
        "results": [dataclasses.asdict(result) for result in results],
    }


def save(output: Path, machine: str, cases: list[dict], measured: list[dict]) -> None:
    from experiments.benchmark import report

    everything = {"machine": machine, "cases": cases, "compiled": measured}
    with written_whole(output / "results.json") as partial:
        partial.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    with written_whole(output / "table.md") as partial:
        partial.write_text(report.summary(cases) + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.launch(main)

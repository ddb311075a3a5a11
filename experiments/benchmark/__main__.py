"""Times this project against transformers on the same work, side by side in one run.

make benchmark                                   # also sets up transformers 4.57 and 5
python -m experiments.benchmark --case=pretrain-small --rounds=7

Each case: identical weights, batches and lengths; first the numbers of all contenders are compared,
then they take turns. Ratios are medians over rounds. Written to --output: results.json and table.md
after every case, speed.png. Interrupted, the same command goes on with the next case; with other
--case it adds them.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import flags
from experiments.flags import FLAGS
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    from experiments.benchmark.cases import Case
    from experiments.benchmark.race import Result

flags.declare("benchmark")


def main() -> None:
    import tempfile

    from tqdm import tqdm

    from experiments.benchmark import compiled, report
    from experiments.benchmark.cases import all_cases, documents, write, write_weights
    from experiments.benchmark.race import TRANSFORMERS_4, ceiling, race
    from experiments.common.report import format_duration

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
    run = {"machine": report.machine(), "rounds": FLAGS.rounds, "code": report.digest()}
    found = report.begun(output, run)
    done = {record["case"] for record in found["cases"]}
    output.mkdir(parents=True, exist_ok=True)

    speeds = ceiling()
    next(speeds)  # the first includes waking up
    load = os.getloadavg()[0]
    print(
        f"{found['machine']}; load {load:.1f}\n{len(cases)} cases of {FLAGS.rounds} rounds or more"
    )
    todo = [case for case in cases if case.name not in done]
    if len(todo) < len(cases):
        print(f"{output} has {len(cases) - len(todo)} of them already")
    with (
        tempfile.TemporaryDirectory(prefix="prelnroberta-benchmark-") as scratch,
        tqdm(todo, unit="case", disable=None) as bar,
    ):
        texts = documents(4096, Path(scratch)) if todo else []
        for number, case in enumerate(bar, len(cases) - len(todo) + 1):
            begin = time.monotonic()
            weights = Path(scratch, "weights", f"{case.work}-{case.preset}-{case.model}")
            if not weights.exists():
                write_weights(case, weights)
            folder = Path(scratch, "cases", str(number))
            write(case, folder, texts)
            limit = max(next(speeds) for _ in range(5))

            def tell(what: str, case: Case = case) -> None:
                bar.set_postfix_str(f"{case.name}: {what}")

            results = race(case, weights, folder, FLAGS.rounds, tell=tell)
            found["cases"].append(record(case, folder, results, limit))
            bar.write(
                f"\n{number}/{len(cases)} {case.name} ({format_duration(time.monotonic() - begin)})\n"
                f"{report.table(found['cases'][-1])}"
            )
            report.save(output, found)
    if FLAGS.compiled and not found["compiled"]:
        print("compiling our step in several ways: temporary memory, and how long it takes")
        found["compiled"] = compiled.measure()
    for line in report.lines_of(found["compiled"]):
        print(line)
    order = [case.name for case in all_cases()]
    found["cases"].sort(key=lambda record: order.index(record["case"]))
    report.save(output, found)
    picture = report.draw(output / "speed.png", found["cases"])
    print(
        f"\n{report.summary(found['cases'])}\nwritten: {output}/results.json, table.md, "
        f"{picture.name}"
    )


def record(case: Case, folder: Path, results: list[Result], limit: float) -> dict[str, Any]:
    """A case and its results as JSON: seconds of every round, and what they are held against."""
    from experiments.benchmark.cases import read
    from prelnroberta.config import IGNORE_INDEX

    _, batch = read(folder)
    lengths = batch["attention_mask"].reshape(-1, case.L).sum(1)
    pretraining = case.work == "train" and case.model == "masked_lm"
    masked = (batch["labels"] != IGNORE_INDEX).sum(1) if pretraining else None
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


if __name__ == "__main__":
    flags.launch(main)

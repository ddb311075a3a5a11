"""Metrics after 200 steps with dropout 0.1, ours and torch's: do they differ more than seeds do?

PYTHONPATH=. python tests/oracle/dropout_seeds.py [TASK ...]

As tests/experiments/test_finetune_curves.py with dropout, whose random bits differ everywhere: the
means of twenty seeds are compared, of the training file's metric, both evaluated by us. Four
minutes of CPU time a task; WORKSPACE.md has the figures. Raises where they differ.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from experiments.common.evaluator import Evaluator
from experiments.tasks import TASKS
from prelnroberta.data.batches.buckets import bucket_lengths, bucketed_eval_batches
from prelnroberta.distributed.sharding import Layout, Parallelism
from prelnroberta.model import heads
from tests.helpers.training_curves import (
    CURVE_OPTIMIZER,
    draw_batches,
    our_training,
    prepare_task,
    torch_training,
)

SEEDS = 20
STEPS = {"token_classification": 400}  # after 200 it has not named an entity


def compare(name: str, folder: Path) -> None:
    task, features, config, params = prepare_task(name, dropout=0.1)
    settings = dataclasses.replace(CURVE_OPTIMIZER, steps=STEPS.get(name, CURVE_OPTIMIZER.steps))
    train = our_training(task, config, settings)
    buckets = bucket_lengths(features.lengths, 1)
    layout = Layout(Parallelism(), config, task.model)
    evaluator = Evaluator(task, heads.MODULES[task.model](config), layout)

    def metric(params) -> float:
        with layout.use_mesh():
            rows, _ = evaluator(params, features, bucketed_eval_batches(features, buckets, 2048))
        return task.evaluate(features, rows).metrics[task.metric]

    found = []
    for seed in range(SEEDS):
        batches, padded = draw_batches(task, features, seed, settings.steps)
        _, ours = train(params, batches, seed)
        place = folder / f"{name}{seed}"
        _, theirs = torch_training(task, config, params, padded, seed, place, settings)
        found.append((metric(ours), metric(theirs)))
    before, means, deviations = metric(params), np.mean(found, 0), np.std(found, 0, ddof=1)
    ours, theirs = (f"{m:.4g} +- {d:.2g}" for m, d in zip(means, deviations, strict=True))
    print(f"{name} {task.metric}: before {before:.4g}, ours {ours}, torch {theirs}", flush=True)
    spread = np.sqrt(np.mean(deviations**2))
    # Three standard errors of a difference of means of twenty.
    assert abs(means[0] - means[1]) <= spread, found
    first, *learned = (task.selection_score({task.metric: value}) for value in (before, *means))
    assert min(learned) > first + 5 * spread, "nothing was learned"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or TASKS:
            compare(name, Path(folder))

"""A task's model on a whole file: compiled once for each of a few shapes, results in order.

`finetune` and `evaluate` write what comes of it by the same functions:

    predictions.jsonl   an answer a line, in the file's order
    metrics.json        metrics, and their confidence intervals where asked for
    classes.txt         precision, recall and F1 by class; confusion.png
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.pictures import draw_confusion
from experiments.tasks import Answer, Measured, Row, Task
from prelnroberta import heads
from prelnroberta.data.bucketing import NOTHING, Features, evaluation_batches
from prelnroberta.files import written_whole
from prelnroberta.heads import LossSettings, Scores
from prelnroberta.modeling import TableModule
from prelnroberta.params import Tree


class Judge:
    """Runs a model over features, without dropout.

    Args:
        positions: tokens, with pads, in a batch of any shape: what bounds memory.
        settings: of the loss that is summed where answers are known.
    """

    def __init__(
        self,
        task: Task,
        module: TableModule,
        positions: int,
        settings: LossSettings = heads.PLAIN,
    ):
        self._task, self._positions = task, positions

        def judge(params: Tree, batch: dict[str, jax.Array]) -> tuple[dict, Scores]:
            logits = task.logits(module, params, batch)
            known = task.target in batch
            scores = task.loss(module.config, logits, batch, settings) if known else Scores.zero()
            return task.outputs(module.config, logits, batch), scores

        self._judge = jax.jit(judge)

    def __call__(
        self, params: Tree, features: Features, buckets: Sequence[int]
    ) -> tuple[list[Row], Scores]:
        """What the model says of each row of the features, in order, and the summed scores."""
        rows: list[Row] = [{}] * len(features.lengths)
        total = jax.tree.map(np.float64, Scores.zero())
        for indices, batch in evaluation_batches(features, buckets, self._positions):
            outputs, scores = jax.device_get(self._judge(params, batch))
            total = jax.tree.map(np.add, total, scores)
            for place in np.flatnonzero(indices != NOTHING):
                rows[indices[place]] = {name: values[place] for name, values in outputs.items()}
        return rows, total


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """JSON lines."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        for answer in answers:
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")


def write_results(
    folder: Path, task: Task, features: Features, rows: list[Row], measured: Measured, **more: Any
) -> None:
    """Everything that is told of an evaluation, into `folder`; metrics.json comes last."""
    write_answers(folder / "predictions.jsonl", task.answers(features, rows))
    if measured.classes:
        with written_whole(folder / "classes.txt") as partial:
            partial.write_text(measured.report(), encoding="utf-8")
    if measured.confusion is not None:
        draw_confusion(folder / "confusion.png", measured.confusion, measured.names)
    write_json(folder / "results.json", {"task": task.model, **more, "metrics": measured.metrics})


def write_json(path: Path, value: Any) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def in_words(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())

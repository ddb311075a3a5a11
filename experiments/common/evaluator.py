"""A task's model on a whole file: compiled once for each of a few shapes, results in order.

`finetune` and `evaluate` write what comes of it by the same functions:

    predictions.jsonl   an answer a line, in the file's order
    classes.txt         precision, recall and F1 by class; confusion.png
    results.json        metrics, and their confidence intervals where asked for
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.plots import draw_confusion
from experiments.tasks import Prediction, RowOutputs, Task
from prelnroberta.data.batches.buckets import bucket_of
from prelnroberta.data.features.base import NOTHING, Features
from prelnroberta.data.shuffle import Batch
from prelnroberta.distributed.sharding import Layout
from prelnroberta.files import written_whole
from prelnroberta.metrics.classification import bootstrap_intervals
from prelnroberta.model import losses
from prelnroberta.model.encoder import TableModule
from prelnroberta.model.losses import LossSettings, Scores
from prelnroberta.params import Tree
from prelnroberta.training.train_step import compile_predict_step


class Evaluator:
    """Runs a model over features, without dropout.

    Args:
        settings: of the loss that is summed where answers are known.
    """

    def __init__(
        self,
        task: Task,
        module: TableModule,
        layout: Layout,
        settings: LossSettings = losses.DEFAULT_LOSS,
    ):
        def evaluator(params: Tree, batch: dict[str, jax.Array]) -> tuple[dict, Scores]:
            logits = task.logits(module, params, batch)
            known = task.target in batch
            scores = task.loss(module.config, logits, batch, settings) if known else Scores.zero()
            # One row for the sums of a device.
            return task.outputs(module.config, logits, batch), jax.tree.map(jnp.atleast_1d, scores)

        self._layout = layout
        self._execution = module.execution
        self._judge = compile_predict_step(evaluator, layout)

    def weights(self, params: Tree) -> Tree:
        """The host's parameters to where they are read, and as they are read fastest."""
        several = self._layout.mesh.size > 1
        return self._layout.device_put(params) if several else self._execution.prepared(params)

    def __call__(
        self,
        params: Tree,
        features: Features,
        batches: Iterable[tuple[np.ndarray, Batch]],
    ) -> tuple[list[RowOutputs], Scores]:
        """What the model says of each row of the features, in order, and the summed scores.

        `batches` has each row once: (indices [B], -1 where filled up; the batch).
        """
        rows: list[RowOutputs] = [{}] * len(features.lengths)
        total = jax.tree.map(np.float64, Scores.zero())
        for indices, batch in batches:
            if missing := -len(indices) % self._layout.num_batch_shards:
                indices = np.concatenate([indices, np.full(missing, NOTHING)])
                batch = features.batch(indices, batch["input_ids"].shape[-1])
            here = self._layout.local_batch_rows(len(indices))
            placed = self._layout.shard_batch({name: values[here] for name, values in batch.items()})
            outputs, scores = jax.device_get(self._judge(params, placed))
            total = jax.tree.map(lambda sum_, part: sum_ + part.sum(), total, scores)
            for place in np.flatnonzero(indices != NOTHING):
                rows[indices[place]] = {name: values[place] for name, values in outputs.items()}
        return rows, total


_ROWS = 8  # of each batch of `batches_by_length`


def batches_by_length(features: Features, longest: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Batches of one shape a length: `_ROWS` rows padded to the next power of two, or `longest`.

    XLA's kernels differ by shape, and with them the last bits of a row. A row's shape follows here
    from itself alone, never from how much is asked at once: so its numbers do, too (on a CPU).
    """
    doubled = [16 << i for i in range(32) if 16 << i < longest]
    lengths = np.array([bucket_of(length, [*doubled, longest]) for length in features.lengths])
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        for start in range(0, len(chosen), _ROWS):
            indices = chosen[start : start + _ROWS]
            indices = np.concatenate([indices, np.full(_ROWS - len(indices), NOTHING)])
            yield indices, features.batch(indices, int(length))


def write_answers(path: Path, answers: Iterable[Prediction]) -> None:
    """JSON lines."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        for answer in answers:
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")


def write_results(
    folder: Path | None,
    task: Task,
    features: Features,
    rows: list[RowOutputs],
    resamples: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """Everything that is told of an evaluation, into `folder`; results.json, returned, is the last.

    Args:
        folder: None writes nothing.
        resamples: for 95 % confidence intervals by bootstrap; 0: none.
        more: what else results.json says.
    """
    measured = task.measure(features, rows)
    results = {"task": task.model, "examples": measured.count, **more, "metrics": measured.metrics}
    if resamples:
        results["intervals"] = bootstrap_intervals(measured.of, measured.count, resamples)
    if folder is None:
        return results
    folder.mkdir(parents=True, exist_ok=True)
    write_answers(folder / "predictions.jsonl", task.answers(features, rows))
    if measured.classes:
        with written_whole(folder / "classes.txt") as partial:
            partial.write_text(measured.report(), encoding="utf-8")
    if measured.confusion is not None:
        draw_confusion(folder / "confusion.png", measured.confusion, measured.names)
    write_json(folder / "results.json", results)
    return results


def write_json(path: Path, value: Any) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

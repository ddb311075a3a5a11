"""Runs a task's model on a whole file, and writes the results.

`finetune` and `evaluate` write the same files:

    predictions.jsonl   one prediction a line, in the order of the file
    classes.txt         precision, recall and F1 by class
    confusion.png       the confusion matrix
    results.json        metrics, and their confidence intervals if requested
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
from prelnroberta.data.batches.buckets import find_bucket
from prelnroberta.data.features.base import PADDING_INDEX, Features
from prelnroberta.data.shuffle import Batch
from prelnroberta.distributed.sharding import Layout
from prelnroberta.files import atomic_write
from prelnroberta.metrics.classification import bootstrap_intervals
from prelnroberta.model import losses
from prelnroberta.model.encoder import TableModule
from prelnroberta.model.losses import LossSettings, Scores
from prelnroberta.params import Tree
from prelnroberta.training.train_step import compile_predict_step


class Evaluator:
    """Runs a model on features without dropout; compiled once for each shape of a batch.

    Args:
        settings: of the loss, which is summed if the examples are labelled.
    """

    def __init__(
        self,
        task: Task,
        module: TableModule,
        layout: Layout,
        settings: LossSettings = losses.DEFAULT_LOSS,
    ):
        def evaluate_batch(params: Tree, batch: dict[str, jax.Array]) -> tuple[dict, Scores]:
            logits = task.logits(module, params, batch)
            labelled = task.label_key in batch
            scores = (
                task.loss(module.config, logits, batch, settings) if labelled else Scores.zero()
            )
            # [1]: a row for each device's sums.
            return task.outputs(module.config, logits, batch), jax.tree.map(jnp.atleast_1d, scores)

        self._layout = layout
        self._execution = module.execution
        self._evaluate_batch = compile_predict_step(evaluate_batch, layout)

    def place_params(self, params: Tree) -> Tree:
        """Host parameters in the form that is fastest to read: sharded over several devices, or
        unstacked on a single one."""
        if self._layout.mesh.size > 1:
            return self._layout.device_put(params)
        return self._execution.params_for_inference(params)

    def __call__(
        self,
        params: Tree,
        features: Features,
        batches: Iterable[tuple[np.ndarray, Batch]],
    ) -> tuple[list[RowOutputs], Scores]:
        """Returns the outputs of each row of the features, in order, and the summed scores.

        Args:
            batches: (indices [B] of rows, -1 for padding rows; the batch), each row once.
        """
        rows: list[RowOutputs] = [{}] * len(features.lengths)
        total = jax.tree.map(np.float64, Scores.zero())
        for indices, batch in batches:
            if missing := -len(indices) % self._layout.num_batch_shards:
                indices = np.concatenate([indices, np.full(missing, PADDING_INDEX)])
                batch = features.batch(indices, batch["input_ids"].shape[-1])
            local_rows = self._layout.local_batch_rows(len(indices))
            placed = self._layout.shard_batch(
                {name: values[local_rows] for name, values in batch.items()}
            )
            outputs, scores = jax.device_get(self._evaluate_batch(params, placed))
            total = jax.tree.map(lambda a, b: a + b.sum(), total, scores)
            for i in np.flatnonzero(indices != PADDING_INDEX):
                rows[indices[i]] = {name: values[i] for name, values in outputs.items()}
        return rows, total


_ROWS_PER_BATCH = 8  # in `batches_by_length`


def batches_by_length(features: Features, longest: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Batches of a fixed number of rows, each padded to the next power of two or to `longest`.

    XLA's kernels differ by shape, and with them the last bits of a result. Here the shape of a row
    does not depend on the other rows, so on a CPU neither do its results.
    """
    powers = [16 << i for i in range(32) if 16 << i < longest]
    lengths = np.array([find_bucket(length, [*powers, longest]) for length in features.lengths])
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        for start in range(0, len(chosen), _ROWS_PER_BATCH):
            indices = chosen[start : start + _ROWS_PER_BATCH]
            indices = np.concatenate(
                [indices, np.full(_ROWS_PER_BATCH - len(indices), PADDING_INDEX)]
            )
            yield indices, features.batch(indices, int(length))


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Writes JSON lines."""
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(prediction, ensure_ascii=False) + "\n")


def write_results(
    folder: Path | None,
    task: Task,
    features: Features,
    rows: list[RowOutputs],
    resamples: int = 0,
    **extra: Any,
) -> dict[str, Any]:
    """Writes an evaluation into `folder`, results.json last, and returns what results.json holds.

    Args:
        folder: None writes nothing.
        resamples: bootstrap samples for 95 % confidence intervals; 0 computes none.
        extra: further entries of results.json.
    """
    result = task.evaluate(features, rows)
    results = {
        "task": task.model,
        "examples": result.num_examples,
        **extra,
        "metrics": result.metrics,
    }
    if resamples:
        results["intervals"] = bootstrap_intervals(
            result.metrics_for, result.num_examples, resamples
        )
    if folder is None:
        return results
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.jsonl", task.predictions(features, rows))
    if result.per_class:
        with atomic_write(folder / "classes.txt") as partial:
            partial.write_text(result.per_class_table(), encoding="utf-8")
    if result.confusion is not None:
        draw_confusion(folder / "confusion.png", result.confusion, result.class_names)
    write_json(folder / "results.json", results)
    return results


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

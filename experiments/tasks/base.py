"""The interface of a task: how its files are read, batched, scored, predicted and evaluated.

`experiments.finetune`, `evaluate` and `predict` are the same for all tasks; what differs is a
method here. In the order in which they are called:

    read_examples   file -> examples                          (prelnroberta/data)
    infer_settings  training examples -> settings, with the names of the classes
    model_config    config of an encoder -> config of the task's model
    features        examples -> token ids in batches          (prelnroberta/data)
    logits          batch -> logits                           \\
    loss            logits -> summed scores                    | pure, compiled together
    outputs         logits -> arrays for predictions, by row  /
    predictions     outputs -> JSON-able predictions
    evaluate        outputs -> metrics
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.task_settings import TaskSettings
from prelnroberta.config import IGNORE_INDEX, RobertaPreLayerNormConfig
from prelnroberta.data.batches.packed import PackedBatches
from prelnroberta.data.features.base import Features
from prelnroberta.data.pretraining.loader import Loader
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.metrics.classification import (
    ClassReportRow,
    classification_report,
    confusion_matrix,
    counts_from_confusion,
    single_label_metrics,
)
from prelnroberta.model import losses
from prelnroberta.model.encoder import TableModule
from prelnroberta.model.losses import LossSettings, Scores
from prelnroberta.params import Tree

if TYPE_CHECKING:
    import tokenizers

Array = jax.Array
RowOutputs = dict[str, np.ndarray]  # `Task.outputs` of one row of the features
Prediction = dict[str, Any]  # JSON-able


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Metrics of a model on labelled examples.

    Attributes:
        metrics_for: indices of examples [k] -> their metrics; an index may repeat, as in a
            bootstrap sample.
        num_examples: in the file.
        confusion: [C, C] counts, true class by row; None where the task has no single class.
        class_names: of the rows of `confusion`.
        per_class: precision, recall and F1 of each class.
    """

    metrics_for: Callable[[np.ndarray], dict[str, float]]
    num_examples: int
    confusion: np.ndarray | None = None
    class_names: Sequence[str] = ()
    per_class: Sequence[ClassReportRow] = ()

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        return self.metrics_for(np.arange(self.num_examples))

    def per_class_table(self) -> str:
        """`per_class` as text."""
        width = max([12, *(len(c.name) for c in self.per_class)])
        lines = [f"{'':{width}}  precision  recall      f1  support"]
        for name, precision, recall, f1, support in self.per_class:
            lines.append(
                f"{name:{width}}  {precision:9.3f}  {recall:6.3f}  {f1:6.3f}  {support:7,}"
            )
        return "\n".join(lines) + "\n"


class Task:
    """Base class of the tasks.

    Attributes:
        model: name of the task and of its model in the parameter table.
        metric: name of the metric by which models are compared.
        label_key: array that is in a batch only if its examples are labelled.
        model_inputs: arguments of the model that a batch may have, next to `input_ids`. Evaluation
            batches are padded and have an `attention_mask`; training batches are packed and have
            segment and position ids.
    """

    model: ClassVar[str]
    metric: str = "accuracy"
    label_key: ClassVar[str] = "labels"
    model_inputs: ClassVar[tuple[str, ...]] = ("attention_mask", "segment_ids", "position_ids")

    def __init__(self, settings: TaskSettings):
        self.settings = settings

    # Data.

    def read_examples(self, path: str | Path, labelled: bool, row_errors: RowErrors) -> list:
        """Reads a whole file; unusable rows are added to `row_errors`."""
        raise NotImplementedError

    def stream_examples(self, path: str, row_errors: RowErrors, file: BinaryIO | None) -> Iterator:
        """Yields unlabelled examples as they are read.

        Args:
            file: read instead of `path`, which then only names it in messages.
        """
        raise NotImplementedError

    def examples_from_text(
        self, texts: Sequence[str], pair: str | None, choices: Sequence[str]
    ) -> list:
        """Examples from --text, --pair and --choice."""
        raise NotImplementedError

    def infer_settings(self, examples: Sequence) -> TaskSettings:
        """The settings, completed from the training examples."""
        return self.settings

    def model_config(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        """`config` with the fields of this task's head."""
        if not self.settings.labels:
            return config
        return config.replace(id2label=dict(enumerate(self.settings.labels)))

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, row_errors: RowErrors
    ) -> Features:
        raise NotImplementedError

    def training_batches(
        self, features: Features, batch_size: int, seed: int, steps: int, multiple: int
    ) -> PackedBatches | Loader:
        """`steps` batches of `batch_size` examples; their number of rows is divisible by
        `multiple`."""
        return PackedBatches(features, batch_size, seed, steps, multiple)

    # The model: pure.

    def logits(
        self,
        module: TableModule,
        params: Tree,
        batch: dict[str, Array],
        dropout_rngs: Array | None = None,
    ) -> Array:
        """Logits of a batch of B rows.

        Args:
            dropout_rngs: [B], a key for each row; None evaluates without dropout.
        """
        inputs = {name: batch[name] for name in self.model_inputs if name in batch}
        logits, _ = module.apply(
            {"params": params}, batch["input_ids"], **inputs, dropout_rngs=dropout_rngs
        )
        return logits

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        return losses.label_scores(logits, batch["labels"], settings)

    def outputs(
        self, config: RobertaPreLayerNormConfig, logits: Array, batch: dict[str, Array]
    ) -> dict[str, Array]:
        """float32 arrays [B, ...] from which predictions and metrics are computed."""
        return {"probabilities": jax.nn.softmax(logits.astype(jnp.float32), axis=-1)}

    # Results.

    def predictions(self, features: Features, rows: Sequence[RowOutputs]) -> Iterator[Prediction]:
        """One prediction for each example, in order."""
        raise NotImplementedError

    def evaluate(self, features: Features, rows: Sequence[RowOutputs]) -> EvalResult:
        raise NotImplementedError

    def baseline_score(self, train: Features, features: Features) -> float:
        """`metric` on `features` of a predictor that knows only the labels of `train`."""
        raise NotImplementedError

    def selection_score(self, metrics: Mapping[str, float]) -> float:
        """Higher is better; an undefined metric scores below every other."""
        value = metrics[self.metric]
        return value if math.isfinite(value) else -1e9

    def label_counts(self, features: Features) -> np.ndarray:
        """int [C]: how often each class is a label."""
        labels = np.concatenate([np.atleast_1d(x) for x in features.labels])
        return np.bincount(labels[labels != IGNORE_INDEX], minlength=len(self.settings.labels))


def truncation_message(features: Features, max_length: int) -> str:
    """How many examples were truncated; empty if none was."""
    count = getattr(features, "num_truncated", 0)
    return (
        f"{count:,} of {len(features.lengths):,} truncated to {max_length} tokens" if count else ""
    )


def stack_outputs(rows: Sequence[RowOutputs], name: str) -> np.ndarray:
    """[n, ...]: the output `name` of n rows."""
    return np.stack([row[name] for row in rows])


def single_label_result(
    labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]
) -> EvalResult:
    """The result where each of n examples has one class: labels, predicted [n] int."""
    C = len(class_names)
    confusion = confusion_matrix(labels, predicted, C)
    return EvalResult(
        lambda i: single_label_metrics(confusion_matrix(labels[i], predicted[i], C)),
        len(labels),
        confusion,
        class_names,
        classification_report(counts_from_confusion(confusion), class_names),
    )


def majority_class_accuracy(train: Features, features: Features) -> float:
    """Accuracy of always predicting the most frequent label of `train`."""
    return float((features.labels == np.bincount(train.labels).argmax()).mean())

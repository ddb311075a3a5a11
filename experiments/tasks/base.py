"""The six tasks: how each one's files are read, scored, answered and measured, in one place.

`experiments.finetune`, `evaluate` and `predict` are the same for all tasks; what differs is here. A
task goes from files to figures in the order of its methods:

    read      file -> examples                     (prelnroberta/data)
    settled   what the training examples decide: the names of the classes
    features  examples -> token ids in batches     (prelnroberta/data)
    logits    batch -> what the model says         \\
    loss      logits -> summed scores               | pure, compiled together
    outputs   logits -> what answers are made of   /
    answers   outputs -> predictions, JSON-able
    measure   outputs -> metrics
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

from experiments.tasks.settings import TaskSettings
from prelnroberta.config import IGNORE_INDEX, RobertaPreLayerNormConfig
from prelnroberta.data.batches.packed import TrainingBatches
from prelnroberta.data.features.base import Features
from prelnroberta.data.pretraining.loader import Loader
from prelnroberta.data.readers.row_errors import BadRows
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
RowOutputs = dict[str, np.ndarray]  # what the model said of one row of the features
Prediction = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What a model's answers to some examples are worth.

    Attributes:
        of: numbers of examples [k] -> metrics of those; an example may be counted several times.
        count: of all examples.
        confusion, names: of classes, [C, C] counts, true by row.
        classes: precision, recall and F1 of each class.
    """

    of: Callable[[np.ndarray], dict[str, float]]
    count: int
    confusion: np.ndarray | None = None
    names: Sequence[str] = ()
    classes: Sequence[ClassReportRow] = ()

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        return self.of(np.arange(self.count))

    def report(self) -> str:
        """The classes as a table to read."""
        width = max([12, *(len(c.name) for c in self.classes)])
        lines = [f"{'':{width}}  precision  recall      f1  support"]
        for name, precision, recall, f1, support in self.classes:
            lines.append(
                f"{name:{width}}  {precision:9.3f}  {recall:6.3f}  {f1:6.3f}  {support:7,}"
            )
        return "\n".join(lines) + "\n"


class Task:
    """What the tasks share. `metric` is what models are compared by; `target` is in the batches of
    examples whose answers are known; `inputs` are those of the model's arguments that its batches
    may have, padded (to evaluate) or packed (to train)."""

    model: ClassVar[str]
    metric: str = "accuracy"
    target: ClassVar[str] = "labels"
    inputs: ClassVar[tuple[str, ...]] = ("attention_mask", "segment_ids", "position_ids")

    def __init__(self, settings: TaskSettings):
        self.settings = settings

    # Data.

    def read(self, path: str | Path, labelled: bool, bad: BadRows) -> list:
        raise NotImplementedError

    def stream(self, path: str, bad: BadRows, file: BinaryIO | None) -> Iterator:
        """Examples without labels as they are read; from `file`, if given, under `path`'s name."""
        raise NotImplementedError

    def typed(self, texts: Sequence[str], pair: str | None, choices: Sequence[str]) -> list:
        """Examples of what was typed on the command line."""
        raise NotImplementedError

    def settled(self, examples: Sequence) -> TaskSettings:
        """The settings with what the training examples decide."""
        return self.settings

    def configure(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        """The config of this task's model, of the architecture of `config`."""
        if not self.settings.labels:
            return config
        return config.replace(id2label=dict(enumerate(self.settings.labels)))

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows, training: bool
    ) -> Features:
        raise NotImplementedError

    def batches(
        self, features: Features, batch_size: int, seed: int, steps: int, multiple: int
    ) -> TrainingBatches | Loader:
        """`steps` batches of `batch_size` examples, in a `multiple` of rows."""
        return TrainingBatches(features, batch_size, seed, steps, multiple)

    # The model: pure.

    def logits(
        self, module: TableModule, params: Tree, batch: dict[str, Array], keys: Array | None = None
    ) -> Array:
        """Of rows [B]; `keys` [B] are their dropout keys, None evaluates."""
        given = {name: batch[name] for name in self.inputs if name in batch}
        logits, _ = module.apply({"params": params}, batch["input_ids"], **given, dropout_keys=keys)
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
        """By row of the batch, float32."""
        return {"probabilities": jax.nn.softmax(logits.astype(jnp.float32), axis=-1)}

    # Results.

    def answers(self, features: Features, rows: Sequence[RowOutputs]) -> Iterator[Prediction]:
        """One for each example, in order."""
        raise NotImplementedError

    def measure(self, features: Features, rows: Sequence[RowOutputs]) -> EvalResult:
        raise NotImplementedError

    def trivial(self, train: Features, features: Features) -> float:
        """`metric` of whoever knows the labels of training, and reads no text."""
        raise NotImplementedError

    def selection_score(self, metrics: Mapping[str, float]) -> float:
        """More is better; what is undefined is worse than anything."""
        value = metrics[self.metric]
        return value if math.isfinite(value) else -1e9

    def label_counts(self, features: Features) -> np.ndarray:
        """[C]: how often each class is asked for."""
        labels = np.concatenate([np.atleast_1d(x) for x in features.labels])
        return np.bincount(labels[labels != IGNORE_INDEX], minlength=len(self.settings.labels))


def truncation_message(features: Features, max_length: int) -> str:
    """Says how many examples lost their end; empty where none did."""
    count = getattr(features, "truncated", 0)
    return f"{count:,} of {len(features.lengths):,} truncation_message to {max_length} tokens" if count else ""


def stacked(rows: Sequence[RowOutputs], name: str) -> np.ndarray:
    return np.stack([row[name] for row in rows])


def of_classes(labels: np.ndarray, found: np.ndarray, names: Sequence[str]) -> EvalResult:
    """One class of `names` for each of n examples: labels, found [n] int."""
    C = len(names)
    confusion = confusion_matrix(labels, found, C)
    return EvalResult(
        lambda i: single_label_metrics(confusion_matrix(labels[i], found[i], C)),
        len(labels),
        confusion,
        names,
        classification_report(counts_from_confusion(confusion), names),
    )


def most_frequent(train: Features, features: Features) -> float:
    """Accuracy of always the most frequent label of training."""
    return float((features.labels == np.bincount(train.labels).argmax()).mean())

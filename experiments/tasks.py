"""The six tasks: how each one's files are read, scored, answered and measured, in one place.

`experiments.finetune`, `evaluate` and `predict` are the same for all tasks; what differs is here. A
task goes from files to figures in the order of its methods:

    read      file -> examples                     (prelnroberta/data)
    names     examples -> names of the classes
    features  examples -> token ids in batches     (prelnroberta/data)
    logits    batch -> what the model says         \\
    loss      logits -> summed scores              | pure, compiled together
    outputs   logits -> what answers are made of   /
    answers   outputs -> JSON-able predictions
    measure   answers -> metrics
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from prelnroberta import heads
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.data.bad_rows import BadRows
from prelnroberta.data.bucketing import NOTHING, Features, bucket_lengths, evaluation_batches
from prelnroberta.data.loader import Batch
from prelnroberta.errors import InputError
from prelnroberta.heads import LossSettings, Scores
from prelnroberta.modeling import TableModule
from prelnroberta.params import Tree

if TYPE_CHECKING:
    import tokenizers

Array = jax.Array
Row = dict[str, np.ndarray]  # what the model said of one example
Answer = dict[str, Any]  # a prediction, JSON-able


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """All that says how data becomes batches; kept in the model's folder as `task.json`.

    Columns are names or, for files without a header, numbers from 0.
    """

    task: str
    max_length: int
    labels: tuple[str, ...] = ()
    problem_type: str = "single_label_classification"
    text_column: str | int = "text"
    pair_column: str | int | None = None
    label_columns: tuple[str | int, ...] = ("label",)


class Task:
    """What the tasks share."""

    model: ClassVar[str]
    metric: ClassVar[str]  # the figure by which models are compared: more is better

    def __init__(self, settings: TaskSettings):
        self.settings = settings

    # Data.

    def read(self, path: str | Path, labelled: bool, bad: BadRows) -> list:
        raise NotImplementedError

    def names(self, examples: Sequence) -> tuple[str, ...]:
        """Of the classes, id by id; () where the task has none."""
        return ()

    def configure(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        """The config of this task's model on the architecture of `config`."""
        return config

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows
    ) -> Features:
        raise NotImplementedError

    # The model: pure.

    def logits(
        self, module: TableModule, params: Tree, batch: dict[str, Array], key: Array | None = None
    ) -> Array:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits, _ = module.apply(
            {"params": params},
            **inputs,
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
        )
        return logits

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        return heads.label_scores(logits, batch["labels"], settings)

    def outputs(
        self, config: RobertaPreLayerNormConfig, logits: Array, batch: dict[str, Array]
    ) -> dict[str, Array]:
        return {"probabilities": jax.nn.softmax(logits.astype(jnp.float32), axis=-1)}

    # Results.

    def answers(self, features: Features, rows: list[Row]) -> Iterator[Answer]:
        raise NotImplementedError

    def measure(self, features: Features, rows: list[Row]) -> Measured:
        raise NotImplementedError

    def trivial(self, train: Features, dev: Features) -> dict[str, float]:
        """The metric of what knows the training labels and no text."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Measured:
    """Metrics, and for classes their confusion matrix [C, C] (true by row) and a report to read."""

    metrics: dict[str, float]
    confusion: np.ndarray | None = None
    report: str = ""


class SequenceClassification(Task):
    """Texts or pairs of texts: one label, several labels, or a number."""

    model = "sequence_classification"

    @property
    def metric(self) -> str:
        return {"regression": "pearson", "multi_label_classification": "f1"}.get(
            self.settings.problem_type, "accuracy"
        )

    def read(self, path: str | Path, labelled: bool, bad: BadRows) -> list:
        from prelnroberta.data.classification import read_examples

        s = self.settings
        one = s.label_columns[0] if len(s.label_columns) == 1 else s.label_columns
        return read_examples(
            path, s.text_column, s.pair_column, one if labelled else None, bad=bad
        )

    def names(self, examples: Sequence) -> tuple[str, ...]:
        from prelnroberta.data.classification import MULTI, REGRESSION, label_names
        from prelnroberta.data.labels import discover_labels

        s = self.settings
        if s.labels or s.problem_type == REGRESSION:
            return s.labels
        if s.problem_type == MULTI:
            if len(s.label_columns) > 1:
                return tuple(map(str, s.label_columns))
            return discover_labels(name for e in examples for name in label_names(e.label))
        return discover_labels(e.label for e in examples)

    def configure(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        names = self.settings.labels or ("LABEL_0",)
        kind = self.settings.problem_type
        return config.replace(id2label=dict(enumerate(names)), problem_type=kind)

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows
    ) -> Features:
        from prelnroberta.data.classification import text_features

        s = self.settings
        return text_features(examples, tokenizer, s.max_length, s.problem_type, s.labels, bad)

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        return heads.sequence_scores(config, logits, batch["labels"], settings, batch["weights"])

    def outputs(
        self, config: RobertaPreLayerNormConfig, logits: Array, batch: dict[str, Array]
    ) -> dict[str, Array]:
        logits = logits.astype(jnp.float32)
        if config.problem_type == "regression":
            return {"value": logits[:, 0]}
        if config.problem_type == "multi_label_classification":
            return {"probabilities": jax.nn.sigmoid(logits)}
        return {"probabilities": jax.nn.softmax(logits, axis=-1)}

    def answers(self, features: Features, rows: list[Row]) -> Iterator[Answer]:
        names, kind = self.settings.labels, self.settings.problem_type
        for example, row in zip(features.examples, rows, strict=True):
            answer = {"text": example.text}
            if example.pair is not None:
                answer["pair"] = example.pair
            if kind == "regression":
                yield answer | {"value": float(row["value"])}
                continue
            probabilities = dict(zip(names, map(float, row["probabilities"]), strict=True))
            if kind == "multi_label_classification":
                answer["labels"] = [name for name, p in probabilities.items() if p > 0.5]
            else:
                answer["label"] = max(probabilities, key=probabilities.get)
            yield answer | {"probabilities": probabilities}

    def measure(self, features: Features, rows: list[Row]) -> Measured:
        p = np.stack([row["probabilities"] for row in rows])
        return Measured({"accuracy": float((p.argmax(-1) == features.labels).mean())})

    def trivial(self, train: Features, dev: Features) -> dict[str, float]:
        most = np.bincount(train.labels).argmax()
        return {"accuracy": float((dev.labels == most).mean())}


TASKS: dict[str, type[Task]] = {
    "sequence_classification": SequenceClassification,
}


# ---------------------------------------------------------------------------------------------
# What finetune, evaluate and predict do with a task.


@dataclasses.dataclass(frozen=True)
class Judge:
    """A task's model, compiled for its few shapes: features -> what it says of each example.

    Args:
        positions: tokens of a batch, whatever its shape; bounds memory.
    """

    task: Task
    module: TableModule
    settings: LossSettings = heads.PLAIN
    positions: int = 8192

    def __post_init__(self) -> None:
        def judge(params: Tree, batch: dict[str, Array], labelled: bool) -> Any:
            logits = self.task.logits(self.module, params, batch)
            config = self.module.config
            scores = Scores.zero()
            if labelled:
                scores = self.task.loss(config, logits, batch, self.settings)
            return self.task.outputs(config, logits, batch), scores

        object.__setattr__(self, "_judge", jax.jit(judge, static_argnums=2))

    def __call__(
        self, params: Tree, features: Features, buckets: Sequence[int]
    ) -> tuple[list[Row], Scores]:
        """Each example's outputs, in order, and the scores of all; zero without labels."""
        rows: list[Row | None] = [None] * len(features.lengths)
        total = jax.tree.map(np.float64, Scores.zero())
        for indices, batch in evaluation_batches(features, buckets, self.positions):
            outputs, scores = jax.device_get(self._judge(params, batch, "labels" in batch))
            total += scores
            for place, index in enumerate(indices):
                if index != NOTHING:
                    rows[index] = {name: values[place] for name, values in outputs.items()}
        return rows, total


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """JSON lines."""
    from prelnroberta.files import written_whole

    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        for answer in answers:
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")

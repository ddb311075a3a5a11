"""Sequence classification: a label, several labels or a number for a text or a pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.base import (
    Array,
    EvalResult,
    Prediction,
    RowOutputs,
    Task,
    majority_class_accuracy,
    single_label_result,
    stack_outputs,
)
from experiments.tasks.task_settings import TaskSettings
from prelnroberta.config import MULTI_LABEL, REGRESSION, RobertaPreLayerNormConfig
from prelnroberta.data.features.base import Features
from prelnroberta.data.features.sequence_classification import text_features
from prelnroberta.data.readers.classification import (
    TextExample,
    read_text_examples,
    split_labels,
    stream_text_examples,
)
from prelnroberta.data.readers.labels import discover_labels
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.metrics.classification import (
    classification_report,
    multi_label_counts,
    multi_label_metrics,
    regression_metrics,
)
from prelnroberta.model import losses
from prelnroberta.model.losses import LossSettings, Scores

if TYPE_CHECKING:
    import tokenizers


class SequenceClassification(Task):
    """Texts or pairs of texts with one label, several labels, or a number."""

    model = "sequence_classification"
    model_inputs = (*Task.model_inputs, "read_positions")

    @property
    def metric(self) -> str:
        return {REGRESSION: "pearson", MULTI_LABEL: "f1_micro"}.get(
            self.settings.problem_type, "accuracy"
        )

    def read_examples(self, path: str | Path, labelled: bool, row_errors: RowErrors) -> list:
        s = self.settings
        label = (s.label_columns[0] if len(s.label_columns) == 1 else s.label_columns) or "label"
        text = "text" if s.text_column is None else s.text_column
        return read_text_examples(
            path, text, s.pair_column, label if labelled else None, row_errors=row_errors
        )

    def stream_examples(self, path: str, row_errors: RowErrors, file: BinaryIO | None) -> Iterator:
        s = self.settings
        text = "text" if s.text_column is None else s.text_column
        return stream_text_examples(path, text, row_errors, s.pair_column, file=file)

    def examples_from_text(
        self, texts: Sequence[str], pair: str | None, choices: Sequence[str]
    ) -> list:
        return [TextExample(f"--text {i}", text, pair) for i, text in enumerate(texts, 1)]

    def infer_settings(self, examples: Sequence) -> TaskSettings:
        s = self.settings
        if s.labels or s.problem_type == REGRESSION:
            return s
        if s.problem_type == MULTI_LABEL and len(s.label_columns) > 1:
            names = tuple(map(str, s.label_columns))
        elif s.problem_type == MULTI_LABEL:
            names = discover_labels(name for e in examples for name in split_labels(e.label))
        else:
            names = discover_labels(e.label for e in examples)
        return dataclasses.replace(s, labels=names)

    def model_config(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        names = self.settings.labels or ("LABEL_0",)
        problem_type = self.settings.problem_type
        return config.replace(id2label=dict(enumerate(names)), problem_type=problem_type)

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, row_errors: RowErrors
    ) -> Features:
        s = self.settings
        return text_features(
            examples, tokenizer, s.max_length, s.problem_type, s.labels, row_errors
        )

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        return losses.sequence_scores(config, logits, batch["labels"], settings, batch["weights"])

    def outputs(
        self, config: RobertaPreLayerNormConfig, logits: Array, batch: dict[str, Array]
    ) -> dict[str, Array]:
        logits = logits.astype(jnp.float32)
        if self.settings.problem_type == REGRESSION:
            return {"value": logits[:, 0]}
        if self.settings.problem_type == MULTI_LABEL:
            return {"probabilities": jax.nn.sigmoid(logits)}
        return {"probabilities": jax.nn.softmax(logits, axis=-1)}

    def predictions(self, features: Features, rows: Sequence[RowOutputs]) -> Iterator[Prediction]:
        names, problem_type = self.settings.labels, self.settings.problem_type
        for example, row in zip(features.examples, rows, strict=True):
            prediction = {"text": example.text}
            if example.pair is not None:
                prediction["pair"] = example.pair
            if problem_type == REGRESSION:
                yield prediction | {"value": float(row["value"])}
                continue
            probabilities = dict(zip(names, row["probabilities"].tolist(), strict=True))
            if problem_type == MULTI_LABEL:
                prediction["labels"] = [name for name, p in probabilities.items() if p > 0.5]
            else:
                prediction["label"] = max(probabilities, key=probabilities.get)
            yield prediction | {"probabilities": probabilities}

    def evaluate(self, features: Features, rows: Sequence[RowOutputs]) -> EvalResult:
        labels, names = features.labels, self.settings.labels
        if self.settings.problem_type == REGRESSION:
            values = stack_outputs(rows, "value")
            return EvalResult(lambda i: regression_metrics(labels[i], values[i]), len(rows))
        if self.settings.problem_type == MULTI_LABEL:
            predicted = stack_outputs(rows, "probabilities") > 0.5
            return EvalResult(
                lambda i: multi_label_metrics(labels[i], predicted[i]),
                len(rows),
                per_class=classification_report(multi_label_counts(labels, predicted), names),
            )
        predicted = stack_outputs(rows, "probabilities").argmax(axis=-1)
        return single_label_result(labels, predicted, names)

    def baseline_score(self, train: Features, features: Features) -> float:
        if self.settings.problem_type == REGRESSION:
            return 0.0  # correlation with a constant
        if self.settings.problem_type == MULTI_LABEL:
            majority = np.broadcast_to(train.labels.mean(axis=0) > 0.5, features.labels.shape)
            return multi_label_metrics(features.labels, majority)[self.metric]
        return majority_class_accuracy(train, features)

"""Sequence classification and regression, token classification and multiple choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

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
from prelnroberta.data.features.multiple_choice import choice_features, mask_missing_choices
from prelnroberta.data.features.sequence_classification import text_features
from prelnroberta.data.features.token_classification import decode_entities, token_features
from prelnroberta.data.readers.bio_tags import is_entity_tag
from prelnroberta.data.readers.classification import (
    TextExample,
    read_text_examples,
    split_labels,
    stream_text_examples,
)
from prelnroberta.data.readers.conll import Sentence, read_sentences, stream_sentences, tag_names
from prelnroberta.data.readers.labels import discover_labels
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.data.readers.swag import ChoiceExample, read_choices, stream_choices
from prelnroberta.errors import InputError
from prelnroberta.metrics.classification import (
    classification_report,
    confusion_matrix,
    counts_from_confusion,
    multi_label_counts,
    multi_label_metrics,
    regression_metrics,
    single_label_metrics,
)
from prelnroberta.metrics.entities import EntityCounts
from prelnroberta.model import losses
from prelnroberta.model.encoder import TableModule
from prelnroberta.model.losses import LossSettings, Scores
from prelnroberta.params import Tree

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


class TokenClassification(Task):
    """Words of sentences with entity tags (IOB2), or any other label for each word."""

    model = "token_classification"

    @property
    def metric(self) -> str:
        return "f1" if self._labels_are_entity_tags else "accuracy"

    @property
    def _labels_are_entity_tags(self) -> bool:
        return all(map(is_entity_tag, self.settings.labels))

    def read_examples(self, path: str | Path, labelled: bool, row_errors: RowErrors) -> list:
        s = self.settings
        tag = s.label_columns[0] if s.label_columns else None
        return read_sentences(path, s.text_column, tag, labelled, row_errors).examples

    def stream_examples(self, path: str, row_errors: RowErrors, file: BinaryIO | None) -> Iterator:
        return stream_sentences(
            path, row_errors, self.settings.text_column, tagged=False, file=file
        )

    def examples_from_text(
        self, texts: Sequence[str], pair: str | None, choices: Sequence[str]
    ) -> list:
        return [Sentence(f"--text {i}", text.split(), None) for i, text in enumerate(texts, 1)]

    def infer_settings(self, examples: Sequence) -> TaskSettings:
        s = self.settings
        return s if s.labels else dataclasses.replace(s, labels=tag_names(examples))

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, row_errors: RowErrors
    ) -> Features:
        s = self.settings
        return token_features(
            examples,
            tokenizer,
            s.max_length,
            s.labels,
            s.label_all_tokens,
            s.doc_stride,
            row_errors,
        )

    def _predicted_tags(
        self, features: Features, rows: Sequence[RowOutputs]
    ) -> Iterator[tuple[Any, list[str], list[float]]]:
        """(sentence, predicted tags, their probabilities) of each sentence."""
        by_word = features.gather_words([row["probabilities"] for row in rows])
        for sentence, words in zip(features.examples, by_word, strict=True):
            tags = [self.settings.labels[i] for i in words.argmax(axis=-1)]
            yield sentence, tags, words.max(axis=-1).tolist()

    def predictions(self, features: Features, rows: Sequence[RowOutputs]) -> Iterator[Prediction]:
        for sentence, tags, probabilities in self._predicted_tags(features, rows):
            prediction = {"words": sentence.words, "tags": tags, "probabilities": probabilities}
            if self._labels_are_entity_tags:
                prediction["entities"] = [
                    entity._asdict() for entity in decode_entities(sentence, tags, probabilities)
                ]
            yield prediction

    def evaluate(self, features: Features, rows: Sequence[RowOutputs]) -> EvalResult:
        names = self.settings.labels
        ids = {name: i for i, name in enumerate(names)}
        predicted = [tags for _, tags, _ in self._predicted_tags(features, rows)]
        true = [sentence.tags for sentence in features.examples]
        confusions = [
            confusion_matrix([ids[t] for t in a], [ids[t] for t in b], len(names))
            for a, b in zip(true, predicted, strict=True)
        ]
        confusion = sum(confusions)
        if self._labels_are_entity_tags:
            counts = EntityCounts(
                true, predicted, scheme=None
            )  # as conlleval, and seqeval by default
            strict = EntityCounts(true, predicted)
            return EvalResult(
                lambda i: {**counts.metrics(i), "f1_strict": strict.metrics(i)["f1"]},
                len(predicted),
                confusion,
                names,
                classification_report(counts.counts(), counts.types),
            )
        return EvalResult(
            lambda i: single_label_metrics(sum(confusions[k] for k in i)),
            len(predicted),
            confusion,
            names,
            classification_report(counts_from_confusion(confusion), names),
        )

    def baseline_score(self, train: Features, features: Features) -> float:
        if self._labels_are_entity_tags:
            return 0.0  # predicts no entity
        counts = self.label_counts(features)
        return float(counts[self.label_counts(train).argmax()] / counts.sum())


class MultipleChoice(Task):
    """Contexts with several continuations, one of which is correct."""

    model = "multiple_choice"
    model_inputs = (*Task.model_inputs, "read_positions")

    def read_examples(self, path: str | Path, labelled: bool, row_errors: RowErrors) -> list:
        context, prefix, label = self._columns
        return read_choices(
            path, context, prefix, label=label if labelled else None, row_errors=row_errors
        )

    @property
    def _columns(self) -> tuple[str, str, str]:
        s = self.settings
        return (
            "sent1" if s.text_column is None else s.text_column,
            "sent2" if s.pair_column is None else s.pair_column,
            s.label_columns[0] if s.label_columns else "label",
        )

    def stream_examples(self, path: str, row_errors: RowErrors, file: BinaryIO | None) -> Iterator:
        context, prefix, _ = self._columns
        return stream_choices(path, row_errors, context, prefix, label=None, file=file)

    def examples_from_text(
        self, texts: Sequence[str], pair: str | None, choices: Sequence[str]
    ) -> list:
        if len(choices) < 2:
            raise InputError("--text is a context: pass its continuations with --choice, 2 or more")
        return [
            ChoiceExample(f"--text {i}", text, pair or "", list(choices), None)
            for i, text in enumerate(texts, 1)
        ]

    def model_config(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        return config.replace(num_labels=1)

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, row_errors: RowErrors
    ) -> Features:
        return choice_features(examples, tokenizer, self.settings.max_length)

    def logits(
        self,
        module: TableModule,
        params: Tree,
        batch: dict[str, Array],
        dropout_rngs: Array | None = None,
    ) -> Array:
        logits = super().logits(module, params, batch, dropout_rngs)
        return mask_missing_choices(logits.astype(jnp.float32), batch["choice_mask"])

    def predictions(self, features: Features, rows: Sequence[RowOutputs]) -> Iterator[Prediction]:
        for example, row in zip(features.examples, rows, strict=True):
            probabilities = row["probabilities"][: len(example.choices)].tolist()
            best = int(np.argmax(probabilities))
            yield {
                "context": example.context,
                "choice": best,
                "text": example.choices[best],
                "probabilities": probabilities,
            }

    def evaluate(self, features: Features, rows: Sequence[RowOutputs]) -> EvalResult:
        correct = stack_outputs(rows, "probabilities").argmax(axis=-1) == features.labels
        return EvalResult(lambda i: {"accuracy": float(correct[i].mean())}, len(correct))

    def baseline_score(self, train: Features, features: Features) -> float:
        return majority_class_accuracy(train, features)

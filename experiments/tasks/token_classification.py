"""Token classification: a label for each word, such as the tags of named entities."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from experiments.tasks.base import (
    EvalResult,
    Prediction,
    RowOutputs,
    Task,
)
from experiments.tasks.task_settings import TaskSettings
from prelnroberta.data.features.base import Features
from prelnroberta.data.features.token_classification import decode_entities, token_features
from prelnroberta.data.readers.bio_tags import is_entity_tag
from prelnroberta.data.readers.conll import Sentence, read_sentences, stream_sentences, tag_names
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.metrics.classification import (
    classification_report,
    confusion_matrix,
    counts_from_confusion,
    single_label_metrics,
)
from prelnroberta.metrics.entities import EntityCounts

if TYPE_CHECKING:
    import tokenizers


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

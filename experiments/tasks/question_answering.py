"""Answers that are a piece of a context."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import jax.numpy as jnp

from experiments.tasks.base import (
    Answer,
    Array,
    Measured,
    Row,
    Task,
)
from experiments.tasks.settings import TaskSettings
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.data.features.base import Features
from prelnroberta.data.features.question_answering import predict_answers, question_features
from prelnroberta.data.readers.row_errors import BadRows
from prelnroberta.data.readers.squad import Question, read_questions, stream_questions
from prelnroberta.errors import InputError
from prelnroberta.metrics.squad import QuestionScores, question_scores
from prelnroberta.model import heads
from prelnroberta.model.heads import LossSettings, Scores

if TYPE_CHECKING:
    import tokenizers


class QuestionAnswering(Task):
    """Questions whose answer is a piece of their context, or that it has none (SQuAD 2)."""

    model = "question_answering"
    metric = "f1"
    target = "start_positions"

    def read(self, path: str | Path, labelled: bool, bad: BadRows) -> list:
        return read_questions(path, labelled, bad)

    def stream(self, path: str, bad: BadRows, file: BinaryIO | None) -> Iterator:
        return stream_questions(path, bad, answered=False, file=file)

    def typed(self, texts: Sequence[str], pair: str | None, choices: Sequence[str]) -> list:
        if pair is None:
            raise InputError("--text is a question: give its context as --pair")
        return [
            Question(f"--text {i}", str(i), text, pair, None) for i, text in enumerate(texts, 1)
        ]

    def settled(self, examples: Sequence) -> TaskSettings:
        null = any(not question.answers for question in examples)
        return dataclasses.replace(self.settings, may_be_null=null)

    def configure(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        return config.replace(num_labels=2)

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows, training: bool
    ) -> Features:
        s = self.settings
        # run_qa takes 128 of 384.
        doc_stride = s.max_length // 3 if s.doc_stride is None else s.doc_stride
        return question_features(examples, tokenizer, s.max_length, doc_stride, bad)

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        """Answers are sought among a window's tokens, not among pads, which a packed batch has not.
        (transformers' padded loss has them compete.)"""
        rows = len(logits)
        starts, ends = heads.span_scores(
            logits,
            batch["start_positions"].reshape(rows, -1),
            batch["end_positions"].reshape(rows, -1),
            settings,
            batch["segment_ids"] if "segment_ids" in batch else batch["attention_mask"],
        )
        return starts + ends

    def outputs(
        self, config: RobertaPreLayerNormConfig, logits: Array, batch: dict[str, Array]
    ) -> dict[str, Array]:
        return {"logits": logits.astype(jnp.float32)}

    def _predicted(self, features: Features, rows: Sequence[Row]) -> list:
        s = self.settings
        return predict_answers(
            features,
            [row["logits"] for row in rows],
            s.n_best_size,
            s.max_answer_length,
            s.may_be_null,
            s.null_score_diff_threshold,
        )

    def answers(self, features: Features, rows: Sequence[Row]) -> Iterator[Answer]:
        predicted = self._predicted(features, rows)
        for question, found in zip(features.examples, predicted, strict=True):
            first = next((c for c in found.candidates if c.text == found.text), None)
            yield {
                "id": question.id,
                "question": question.question,
                "answer": found.text,
                "start": first.start if first else None,
                "end": first.end if first else None,
                "probability": first.probability if first else None,
                "null_difference": found.null_difference,
                "candidates": [c._asdict() for c in found.candidates],
            }

    def _scores(self, features: Features, texts: Sequence[str]) -> QuestionScores:
        answers = {q.id: [answer.text for answer in q.answers] for q in features.examples}
        found = dict(zip(answers, texts, strict=True))
        return question_scores(found, answers, self.settings.may_be_null)

    def measure(self, features: Features, rows: Sequence[Row]) -> Measured:
        scores = self._scores(features, [p.text for p in self._predicted(features, rows)])
        return Measured(scores.metrics, len(features.examples))

    def trivial(self, train: Features, features: Features) -> float:
        texts = [q.answers[0].text if q.answers else "" for q in train.examples]
        most = max(set(texts), key=lambda text: (texts.count(text), text))
        return self._scores(features, [most] * len(features.examples)).metrics()[self.metric]

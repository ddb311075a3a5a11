"""Extractive question answering, as SQuAD."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import jax.numpy as jnp

from experiments.tasks.base import (
    Array,
    EvalResult,
    Prediction,
    RowOutputs,
    Task,
)
from experiments.tasks.task_settings import TaskSettings
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.data.features.base import Features
from prelnroberta.data.features.question_answering import predict_answers, question_features
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.data.readers.squad import Question, read_questions, stream_questions
from prelnroberta.errors import InputError
from prelnroberta.metrics.squad import QuestionScores, question_scores
from prelnroberta.model import losses
from prelnroberta.model.losses import LossSettings, Scores

if TYPE_CHECKING:
    import tokenizers


class QuestionAnswering(Task):
    """Questions answered by a span of their context, or unanswerable (SQuAD v2.0)."""

    model = "question_answering"
    metric = "f1"
    label_key = "start_positions"

    def read_examples(self, path: str | Path, labelled: bool, row_errors: RowErrors) -> list:
        return read_questions(path, labelled, row_errors)

    def stream_examples(self, path: str, row_errors: RowErrors, file: BinaryIO | None) -> Iterator:
        return stream_questions(path, row_errors, answered=False, file=file)

    def examples_from_text(
        self, texts: Sequence[str], pair: str | None, choices: Sequence[str]
    ) -> list:
        if pair is None:
            raise InputError("--text is a question: pass its context with --pair")
        return [
            Question(f"--text {i}", str(i), text, pair, None) for i, text in enumerate(texts, 1)
        ]

    def infer_settings(self, examples: Sequence) -> TaskSettings:
        may_be_null = any(not question.answers for question in examples)
        return dataclasses.replace(self.settings, may_be_null=may_be_null)

    def model_config(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        return config.replace(num_labels=2)

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, row_errors: RowErrors
    ) -> Features:
        s = self.settings
        # run_qa takes 128 of 384.
        doc_stride = s.max_length // 3 if s.doc_stride is None else s.doc_stride
        return question_features(examples, tokenizer, s.max_length, doc_stride, row_errors)

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        """Normalizes over the tokens of each window. In transformers' loss padding competes, too;
        a packed batch has none."""
        B = len(logits)
        starts, ends = losses.span_scores(
            logits,
            batch["start_positions"].reshape(B, -1),
            batch["end_positions"].reshape(B, -1),
            settings,
            batch["segment_ids"] if "segment_ids" in batch else batch["attention_mask"],
        )
        return starts + ends

    def outputs(
        self, config: RobertaPreLayerNormConfig, logits: Array, batch: dict[str, Array]
    ) -> dict[str, Array]:
        return {"logits": logits.astype(jnp.float32)}

    def _predict_answers(self, features: Features, rows: Sequence[RowOutputs]) -> list:
        s = self.settings
        return predict_answers(
            features,
            [row["logits"] for row in rows],
            s.n_best_size,
            s.max_answer_length,
            s.may_be_null,
            s.null_score_diff_threshold,
        )

    def predictions(self, features: Features, rows: Sequence[RowOutputs]) -> Iterator[Prediction]:
        answers = self._predict_answers(features, rows)
        for question, answer in zip(features.examples, answers, strict=True):
            best = next((c for c in answer.candidates if c.text == answer.text), None)
            yield {
                "id": question.id,
                "question": question.question,
                "answer": answer.text,
                "start": best.start if best else None,
                "end": best.end if best else None,
                "probability": best.probability if best else None,
                "null_difference": answer.null_score_diff,
                "candidates": [c._asdict() for c in answer.candidates],
            }

    def _scores(self, features: Features, texts: Sequence[str]) -> QuestionScores:
        answers = {q.id: [answer.text for answer in q.answers] for q in features.examples}
        predicted = dict(zip(answers, texts, strict=True))
        return question_scores(predicted, answers, self.settings.may_be_null)

    def evaluate(self, features: Features, rows: Sequence[RowOutputs]) -> EvalResult:
        scores = self._scores(features, [p.text for p in self._predict_answers(features, rows)])
        return EvalResult(scores.metrics, len(features.examples))

    def baseline_score(self, train: Features, features: Features) -> float:
        texts = [q.answers[0].text if q.answers else "" for q in train.examples]
        most_frequent = max(set(texts), key=lambda text: (texts.count(text), text))
        return self._scores(features, [most_frequent] * len(features.examples)).metrics()[
            self.metric
        ]

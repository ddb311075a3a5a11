"""Multiple choice: which of several continuations is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import jax.numpy as jnp
import numpy as np

from experiments.tasks.base import (
    Array,
    EvalResult,
    Prediction,
    RowOutputs,
    Task,
    majority_class_accuracy,
    stack_outputs,
)
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.data.features.base import Features
from prelnroberta.data.features.multiple_choice import choice_features, mask_missing_choices
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.data.readers.swag import ChoiceExample, read_choices, stream_choices
from prelnroberta.errors import InputError
from prelnroberta.model.encoder import TableModule
from prelnroberta.params import Tree

if TYPE_CHECKING:
    import tokenizers


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

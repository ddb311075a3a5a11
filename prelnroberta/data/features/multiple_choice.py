"""Multiple choice: a context and its possible continuations -> features -> batches.

A batch, B rows of A choices of L tokens:
    input_ids, attention_mask    int32 [B, A, L]
    choice_mask                  bool [B, A], False for missing choices: rows may have fewer than A
    labels                       int32 [B], -100 in padding rows
    weights                      float32 [B], 1 for an example, 0 for a padding row
If the examples have no labels, `labels` is absent. Apply `mask_missing_choices` to the logits
[B, A] before the loss and before the argmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from prelnroberta.config import IGNORE_INDEX, MASKED_LOGIT
from prelnroberta.data.features.base import PADDING_INDEX, Features
from prelnroberta.data.features.encoding import build_pair_row, check_max_length, encode_texts
from prelnroberta.data.readers.swag import ChoiceExample
from prelnroberta.data.shuffle import Batch
from prelnroberta.data.tokenizer import PAD_ID
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers


@dataclasses.dataclass(frozen=True)
class ChoiceFeatures(Features):
    """Rows `<s> context </s></s> prefix choice </s>`, one for each choice.

    Attributes:
        examples: in order.
        input_ids: int32 [tokens] of each choice of each example.
        labels: int32 [n], or None.
        num_truncated: number of examples truncated to the maximal length.
    """

    examples: list[ChoiceExample]
    input_ids: list[list[np.ndarray]]
    labels: np.ndarray | None
    num_truncated: int

    @cached_property
    def num_choices(self) -> int:  # type: ignore[override]  # a constant in other classes
        """A, the largest number of choices of an example."""
        return max(map(len, self.input_ids))

    @property
    def lengths(self) -> np.ndarray:
        return np.array([max(map(len, rows)) for rows in self.input_ids], np.int64)

    @property
    def total_lengths(self) -> np.ndarray:
        return np.array([sum(map(len, rows)) for rows in self.input_ids], np.int64)

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        """The batch of the examples at `indices` [B], see the module docstring."""
        is_example = np.asarray(indices) != PADDING_INDEX
        input_ids = np.full((len(indices), self.num_choices, length), PAD_ID, np.int32)
        attention_mask = np.zeros_like(input_ids)
        choice_mask = np.zeros(input_ids.shape[:2], bool)
        for i in np.flatnonzero(is_example):
            rows = self.input_ids[indices[i]]
            choice_mask[i, : len(rows)] = True
            for choice, ids in enumerate(rows):
                input_ids[i, choice, : len(ids)] = ids
                attention_mask[i, choice, : len(ids)] = 1
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "choice_mask": choice_mask,
            "weights": is_example.astype(np.float32),
        }
        if self.labels is not None:
            labels = np.where(is_example, self.labels[indices], IGNORE_INDEX)
            batch["labels"] = labels.astype(np.int32)
        return batch


def choice_features(
    examples: Sequence[ChoiceExample], tokenizer: tokenizers.Tokenizer, max_length: int
) -> ChoiceFeatures:
    """Tokenizes each choice together with its context.

    The token ids are those of transformers' `tokenizer(context, f"{prefix} {choice}",
    truncation=True)`.

    Args:
        max_length: maximal number of tokens of a row. The longer of the two texts is truncated
            first.

    Raises:
        InputError: no examples.
    """
    if not examples:
        raise InputError("no examples to make features of")
    check_max_length(max_length)
    contexts = encode_texts(tokenizer, (e.context for e in examples))
    choices = encode_texts(
        tokenizer, (f"{e.prefix} {c}" if e.prefix else c for e in examples for c in e.choices)
    )
    input_ids, num_truncated = [], 0
    for example, context in zip(examples, contexts, strict=True):
        rows = [build_pair_row(context, next(choices), max_length) for _ in example.choices]
        input_ids.append([ids for ids, _ in rows])
        num_truncated += any(truncated for _, truncated in rows)
    labelled = examples[0].label is not None
    labels = np.array([e.label for e in examples], np.int32) if labelled else None
    return ChoiceFeatures(list(examples), input_ids, labels, num_truncated)


def mask_missing_choices(logits: Any, choice_mask: Any) -> Any:
    """Adds `MASKED_LOGIT` to the logits [B, A] of missing choices; for numpy and jax arrays.

    Not -inf: a padding row has no choice at all, and its softmax would be NaN.
    """
    return logits + MASKED_LOGIT * (1 - choice_mask.astype(logits.dtype))

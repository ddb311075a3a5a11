"""Multiple choice: a context and its possible continuations -> features -> batches.

A batch, B rows of C choices of L tokens:
    input_ids, attention_mask    int32 [B, C, L]
    choice_mask                  bool [B, C], which choices there are: rows may have fewer than C
    labels                       int32 [B], -100 in filling rows
    weights                      float32 [B], 1 for an example, 0 for a filling row
Without labels in the examples there is no `labels`. Logits [B, C] go through `mask_missing_choices` before
the loss and before the argmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prelnroberta.config import IGNORE_INDEX, MASKED_LOGIT
from prelnroberta.data.features.base import PADDING_INDEX, Features
from prelnroberta.data.features.encoding import check_max_length, pair_row, token_ids
from prelnroberta.data.readers.swag import ChoiceExample
from prelnroberta.data.shuffle import Batch
from prelnroberta.data.tokenizer import PAD_ID
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers


@dataclasses.dataclass(frozen=True)
class ChoiceFeatures(Features):
    """Rows `<s> context </s></s> prefix choice </s>`, one a choice.

    Attributes:
        examples: in order.
        input_ids: int32 [tokens] of each choice of each example.
        labels: int32 [n], or None.
        choices: C, the most choices of an example.
        truncated: how many examples were cut to the greatest length.
    """

    examples: list[ChoiceExample]
    input_ids: list[list[np.ndarray]]
    labels: np.ndarray | None
    choices: int
    truncated: int

    @property
    def lengths(self) -> np.ndarray:
        return np.array([max(map(len, rows)) for rows in self.input_ids], np.int64)

    @property
    def sizes(self) -> np.ndarray:
        return np.array([sum(map(len, rows)) for rows in self.input_ids], np.int64)

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        """The module's batch of the examples at `indices` [B]; -1 fills up."""
        real = np.asarray(indices) != PADDING_INDEX
        input_ids = np.full((len(indices), self.choices, length), PAD_ID, np.int32)
        attention_mask = np.zeros_like(input_ids)
        choice_mask = np.zeros(input_ids.shape[:2], bool)
        for i in np.flatnonzero(real):
            rows = self.input_ids[indices[i]]
            choice_mask[i, : len(rows)] = True
            for c, ids in enumerate(rows):
                input_ids[i, c, : len(ids)] = ids
                attention_mask[i, c, : len(ids)] = 1
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "choice_mask": choice_mask,
            "weights": real.astype(np.float32),
        }
        if self.labels is not None:
            batch["labels"] = np.where(real, self.labels[indices], IGNORE_INDEX).astype(np.int32)
        return batch


def choice_features(
    examples: Sequence[ChoiceExample], tokenizer: tokenizers.Tokenizer, max_length: int
) -> ChoiceFeatures:
    """Features of examples: the ids of transformers' `tokenizer(context, f"{prefix} {choice}",
    truncation=True)` for each choice, regrouped.

    Args:
        max_length: rows are cut to so many tokens, the longer of the two texts first.

    Raises:
        InputError: no examples.
    """
    if not examples:
        raise InputError("no examples to make features of")
    check_max_length(max_length)
    contexts = token_ids(tokenizer, (e.context for e in examples))
    choices = token_ids(
        tokenizer, (f"{e.prefix} {c}" if e.prefix else c for e in examples for c in e.choices)
    )
    input_ids, truncated = [], 0
    for example, context in zip(examples, contexts, strict=True):
        rows = [pair_row(context, next(choices), max_length) for _ in example.choices]
        input_ids.append([ids for ids, _ in rows])
        truncated += any(cut for _, cut in rows)
    known = examples[0].label is not None
    return ChoiceFeatures(
        list(examples),
        input_ids,
        np.array([e.label for e in examples], np.int32) if known else None,
        max(len(e.choices) for e in examples),
        truncated,
    )


def mask_missing_choices(logits: Any, choice_mask: Any) -> Any:
    """Logits [B, A] plus `MASKED_LOGIT` where there is no choice, for numpy and jax arrays alike.

    Not -inf: over a filling row, which has no choice at all, a softmax of it would be NaN.
    """
    return logits + MASKED_LOGIT * (1 - choice_mask.astype(logits.dtype))

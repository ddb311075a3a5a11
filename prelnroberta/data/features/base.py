"""Base class of every task's features: examples as token ids, padded to batches on request."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from prelnroberta.data.shuffle import Batch
from prelnroberta.data.tokenizer import PAD_ID

PADDING_INDEX = -1  # the example index of a row that only fills up a batch


class Features(abc.ABC):
    """Examples as token ids, with random access.

    Attributes:
        per_token_arrays: names of the arrays of a batch, other than the ids, that have one value
            for each token.
        num_choices: A, the largest number of choices of an example; 1 for tasks without choices.
    """

    per_token_arrays: ClassVar[tuple[str, ...]] = ()
    num_choices = 1

    @property
    @abc.abstractmethod
    def lengths(self) -> np.ndarray:
        """int [n]: tokens of each example, specials included; of its longest choice, if any."""

    @property
    def total_lengths(self) -> np.ndarray:
        """int [n]: tokens of each example, summed over its choices."""
        return self.lengths

    @abc.abstractmethod
    def batch(self, indices: np.ndarray, length: int) -> Batch:
        """The examples at `indices` [B], padded to `length`.

        A row at `PADDING_INDEX` is padding with weight 0.
        """


def pad_rows(
    rows: Sequence[np.ndarray] | Mapping[int, np.ndarray],
    indices: np.ndarray,
    length: int,
    fill_value: int,
    dtype: type = np.int32,
) -> np.ndarray:
    """`rows` at `indices`, padded with `fill_value`: [B, length]; all padding at PADDING_INDEX."""
    out: np.ndarray = np.full((len(indices), length), fill_value, dtype)
    for i, index in enumerate(indices):
        if index != PADDING_INDEX:
            row = rows[index]
            out[i, : len(row)] = row
    return out


def collate_tokens(
    rows: Sequence[np.ndarray] | Mapping[int, np.ndarray], indices: np.ndarray, length: int
) -> Batch:
    """Pads the token ids `rows` at `indices` [B] to the arrays that every task's batch has.

    Returns:
        input_ids, attention_mask: int32 [B, length].
        weights: float32 [B], 0 at PADDING_INDEX, otherwise 1.
    """
    sizes = np.array([0 if index == PADDING_INDEX else len(rows[index]) for index in indices])
    return {
        "input_ids": pad_rows(rows, indices, length, PAD_ID),
        # From the lengths, not from the ids: a text may spell out <pad>.
        "attention_mask": (np.arange(length) < sizes[:, None]).astype(np.int32),
        "weights": (np.asarray(indices) != PADDING_INDEX).astype(np.float32),
    }

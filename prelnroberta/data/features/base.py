"""What the features of every task share: examples as token ids, padded to batches on request."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from prelnroberta.data.shuffle import Batch
from prelnroberta.data.tokenizer import PAD_ID

PADDING_INDEX = -1  # the index of a row that only fills a batch up


class Features(abc.ABC):
    """Examples as token ids, read at random.

    Attributes:
        by_token: which arrays of a batch have a value for each token, beside the ids.
    """

    by_token: ClassVar[tuple[str, ...]] = ()

    @property
    @abc.abstractmethod
    def lengths(self) -> np.ndarray:
        """int [n]: tokens of each example, specials included (the longest choice, of choices)."""

    @property
    def sizes(self) -> np.ndarray:
        """int [n]: all tokens of each example: those of its choices together."""
        return self.lengths

    @abc.abstractmethod
    def batch(self, indices: np.ndarray, length: int) -> Batch:
        """The examples of `indices` [B], padded to `length`; -1 is a row without weight."""


def padded(
    rows: Sequence[np.ndarray], indices: np.ndarray, length: int, fill: int, dtype: type = np.int32
) -> np.ndarray:
    """`rows` at `indices` as one array [B, length], `fill` behind each and in rows of index -1."""
    out = np.full((len(indices), length), fill, dtype)
    for i, index in enumerate(indices):
        if index != PADDING_INDEX:
            row = rows[index]
            out[i, : len(row)] = row
    return out


def collate_tokens(rows: Sequence[np.ndarray], indices: np.ndarray, length: int) -> Batch:
    """Token ids `rows` at `indices` [B] as what every task's batch begins with.

    Returns:
        input_ids, attention_mask int32 [B, length]; weights float32 [B], 0 where index is -1.
    """
    sizes = np.array([0 if index == PADDING_INDEX else len(rows[index]) for index in indices])
    return {
        "input_ids": padded(rows, indices, length, PAD_ID),
        # By length: a text may spell <pad> out.
        "attention_mask": (np.arange(length) < sizes[:, None]).astype(np.int32),
        "weights": (np.asarray(indices) != PADDING_INDEX).astype(np.float32),
    }

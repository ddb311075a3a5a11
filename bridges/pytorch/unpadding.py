"""Batches without their padding: the real tokens of all rows as one row, [B, L] -> [1, T]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the real tokens of a batch are.

    Attributes:
        index: [T], their places in the B * L of the batch, in order.
        lengths: of the rows that have any.
        shape: (B, L).
    """

    index: Tensor
    lengths: tuple[int, ...]
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        """By a mask [B, L], nonzero where a token is."""
        real = mask != 0
        lengths = tuple(n for n in real.sum(-1).tolist() if n)
        return cls(real.flatten().nonzero()[:, 0], lengths, tuple(mask.shape))

    @property
    def starts(self) -> Tensor:
        """The first column of each row in the packed batch."""
        lengths = torch.tensor(self.lengths, device=self.index.device)
        return lengths.cumsum(0) - lengths

    def take(self, x: Tensor | None) -> Tensor | None:
        """[B, L, ...] -> [1, T, ...]."""
        return None if x is None else x.flatten(0, 1).index_select(0, self.index)[None]

    def put(self, x: Tensor) -> Tensor:
        """[1, T, ...] -> [B, L, ...], zero where nothing was taken."""
        B, L = self.shape
        empty = x.new_zeros(B * L, *x.shape[2:])
        return empty.index_copy_(0, self.index, x[0]).unflatten(0, (B, L))

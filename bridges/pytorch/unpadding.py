"""Batches without their padding: the tokens of all rows in one row, [B, L] -> [1, U]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Unpadding(NamedTuple):
    """Where the tokens of a padded batch are.

    Attributes:
        indices: [U] int, positions of the tokens in the flattened batch [B * L], ascending.
        lengths: number of tokens of each row that has any.
        shape: (B, L).
    """

    indices: Tensor
    lengths: tuple[int, ...]
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: Tensor) -> Unpadding:
        """Of a mask [B, L], nonzero where a token is."""
        is_token = mask != 0
        lengths = tuple(n for n in is_token.sum(-1).tolist() if n)
        return cls(is_token.flatten().nonzero()[:, 0], lengths, tuple(mask.shape))

    @property
    def row_starts(self) -> Tensor:
        """The column of [1, U] in which each row starts."""
        lengths = torch.tensor(self.lengths, device=self.indices.device)
        return lengths.cumsum(0) - lengths

    def unpad(self, x: Tensor | None) -> Tensor | None:
        """[B, L, ...] -> [1, U, ...]."""
        return None if x is None else x.flatten(0, 1).index_select(0, self.indices)[None]

    def pad(self, x: Tensor) -> Tensor:
        """[1, U, ...] -> [B, L, ...], zero at padded positions."""
        B, L = self.shape
        zeros = x.new_zeros(B * L, *x.shape[2:])
        return zeros.index_copy_(0, self.indices, x[0]).unflatten(0, (B, L))

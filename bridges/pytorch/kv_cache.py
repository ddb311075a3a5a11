"""What a decoder remembers: keys and values of each layer, and which columns are real.

Immutable: a step makes a new cache of one column more, so that beams and samples can share one.
Columns are shared by all rows and hold pads as well; validity and positions are counted by row,
which keeps rows padded on either side exact (transformers counts columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Past:
    """One layer's keys and values: its own [B, H, T, K], and of encoder states [B, H, S, K]."""

    keys: Tensor | None = None
    values: Tensor | None = None
    cross_keys: Tensor | None = None
    cross_values: Tensor | None = None


@dataclass(frozen=True)
class Cache:
    """What all layers remember; an argument and result of compiled and exported programs, too.

    Attributes:
        layers: N of `Past`.
        valid: [B, T] bool: which columns hold a token that may be seen.
        count: [B] int: real tokens so far; positions go on from there.
        cross_valid: [B, S] bool; None: all, or no states.
    """

    layers: tuple[Past, ...]
    valid: Tensor
    count: Tensor
    cross_valid: Tensor | None = None

    @classmethod
    def empty(cls, layers: int, real: Tensor) -> Cache:
        """Of no columns, for rows as in `real` [B, L]."""
        nothing = torch.zeros_like(real[:, :0], dtype=torch.bool)
        return cls((Past(),) * layers, nothing, nothing.sum(-1))

    @property
    def columns(self) -> int:
        return self.valid.shape[1]

    def announce(self, mask: Tensor | None, real: Tensor, cross_mask: Tensor | None) -> Cache:
        """Makes L new columns known, and the first time the encoder states' validity [B, S].

        Args:
            mask: [B, L], or [B, T + L]; None: all are valid.
            real: [B, L], which ones count as tokens.
        """
        new = torch.ones_like(real, dtype=torch.bool) if mask is None else mask != 0
        whole = new.shape[1] == self.columns + real.shape[1]
        cross_valid = self.cross_valid
        if cross_valid is None and cross_mask is not None:
            cross_valid = cross_mask != 0
        valid = new if whole else torch.cat([self.valid, new], 1)
        return Cache(self.layers, valid, self.count + real.sum(-1), cross_valid)

    def fill(self, layers: tuple[Past, ...]) -> Cache:
        """What was announced, with what layers made of it."""
        return Cache(layers, self.valid, self.count, self.cross_valid)

    def visible(self, length: int) -> Tensor:
        """Which columns each of the `length` newest sees, [B, length, T]: valid, up to its own."""
        column = torch.arange(self.columns, device=self.valid.device)
        return self.valid[:, None] & (column <= column[-length:, None])

    def reorder(self, index: Tensor) -> Cache:
        """The cache of rows `index` [R], each in [0, B): repeated, dropped or reordered."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, index)

        layers = tuple(
            Past(rows(p.keys), rows(p.values), rows(p.cross_keys), rows(p.cross_values))
            for p in self.layers
        )
        return Cache(layers, rows(self.valid), rows(self.count), rows(self.cross_valid))


# Names in programs that torch.export saved: identifiers of the format, no longer module paths.
for _kind, _name in ((Past, "bridges.pytorch.cache.Past"), (Cache, "bridges.pytorch.cache.Cache")):
    torch.export.register_dataclass(_kind, serialized_type_name=_name)

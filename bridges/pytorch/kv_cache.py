"""The decoder's key/value cache: keys and values of each layer, and which columns are valid.

The cache is immutable: each step makes a new one with more columns, so beams and samples can share
their prompt. All rows share the columns, pads included. Validity and positions are tracked by row,
which keeps rows that are padded on either side exact (transformers counts columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerKV:
    """One layer's keys and values: its own [B, H, T, K], and of encoder states [B, H, S, K]."""

    keys: Tensor | None = None
    values: Tensor | None = None
    cross_keys: Tensor | None = None
    cross_values: Tensor | None = None


@dataclass(frozen=True)
class KVCache:
    """The cache of all layers; also an argument and a result of compiled and exported programs.

    Attributes:
        layers: one `LayerKV` for each of the N layers.
        valid: [B, T] bool, columns that hold a visible token.
        count: [B] int, non-pad tokens so far; positions continue from it.
        cross_valid: [B, S] bool, visible encoder states; None: all, or no states.
    """

    layers: tuple[LayerKV, ...]
    valid: Tensor
    count: Tensor
    cross_valid: Tensor | None = None

    @classmethod
    def empty(cls, num_layers: int, is_token: Tensor) -> KVCache:
        """A cache without columns, for the rows of `is_token` [B, L]."""
        valid = torch.zeros_like(is_token[:, :0], dtype=torch.bool)
        return cls((LayerKV(),) * num_layers, valid, valid.sum(-1))

    @property
    def num_columns(self) -> int:
        return self.valid.shape[1]

    def append_mask(
        self,
        attention_mask: Tensor | None,
        is_token: Tensor,
        encoder_attention_mask: Tensor | None,
    ) -> KVCache:
        """Appends the validity of L new columns, whose keys and values `write_kv` adds later.

        Args:
            attention_mask: [B, L], or [B, T + L]; None: all new columns are valid.
            is_token: [B, L] bool, new tokens that count for positions.
            encoder_attention_mask: [B, S]; kept the first time it is given.
        """
        if attention_mask is None:
            new_valid = torch.ones_like(is_token, dtype=torch.bool)
        else:
            new_valid = attention_mask != 0
        covers_all = new_valid.shape[1] == self.num_columns + is_token.shape[1]
        valid = new_valid if covers_all else torch.cat([self.valid, new_valid], 1)
        cross_valid = self.cross_valid
        if cross_valid is None and encoder_attention_mask is not None:
            cross_valid = encoder_attention_mask != 0
        return KVCache(self.layers, valid, self.count + is_token.sum(-1), cross_valid)

    def write_kv(self, layers: tuple[LayerKV, ...]) -> KVCache:
        """The cache with the layers' keys and values, which include the appended columns."""
        return KVCache(layers, self.valid, self.count, self.cross_valid)

    def visible(self, length: int) -> Tensor:
        """[B, length, T] bool: valid columns up to its own for each of the `length` newest."""
        column = torch.arange(self.num_columns, device=self.valid.device)
        return self.valid[:, None] & (column <= column[-length:, None])

    def reorder(self, index: Tensor) -> KVCache:
        """The cache of rows `index` [R], each in [0, B): repeated, dropped or reordered."""

        def select(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, index)

        layers = tuple(
            LayerKV(
                select(kv.keys), select(kv.values), select(kv.cross_keys), select(kv.cross_values)
            )
            for kv in self.layers
        )
        return KVCache(layers, select(self.valid), select(self.count), select(self.cross_valid))


# Saved programs name the classes by these identifiers and the fields by their names. The
# identifiers were module paths once; they stay as they are, so that saved programs still load.
for _cls, _name in (
    (LayerKV, "bridges.pytorch.cache.Past"),
    (KVCache, "bridges.pytorch.cache.Cache"),
):
    torch.export.register_dataclass(_cls, serialized_type_name=_name)

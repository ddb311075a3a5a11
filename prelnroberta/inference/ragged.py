"""Ragged sequences without padding: several sequences per row, each attending only to itself.

    packed = pack_sequences(sequences, row_length=128)
    output = model(**packed.inputs)                      # [R, L, ...]
    vectors = packed.unpack(output.last_hidden_state)    # a list in the order of `sequences`

Attention stays inside a segment and positions restart in each one, so the outputs equal those of
the sequences run one by one. `data/pretraining/packing.py` packs a corpus that does not fit in
memory; this module packs one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from prelnroberta.data.bin_packing import best_fit_decreasing
from prelnroberta.errors import InputError


class PackedBatch(NamedTuple):
    """Rows that hold several sequences each, and where each sequence is.

    Attributes:
        inputs: input_ids, segment_ids, position_ids, int32 [R, L], as every model takes them.
        rows: int [n], the row of each sequence.
        starts: int [n], its first position in that row.
        lengths: int [n], its number of tokens.
    """

    inputs: dict[str, np.ndarray]
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def unpack(self, values: Any) -> list[np.ndarray]:
        """[R, L, ...] -> one array [length, ...] per sequence, in the order they were given."""
        values = np.asarray(values)
        spans = zip(self.rows, self.starts, self.lengths, strict=True)
        return [values[row, start : start + length] for row, start, length in spans]

    def pack_values(self, values: Sequence[Sequence[Any]], fill: Any, dtype: Any) -> np.ndarray:
        """The inverse of `unpack`, for per-token values such as labels: [R, L], `fill` on pads."""
        packed = np.full(self.inputs["input_ids"].shape, fill, dtype)
        spans = zip(self.rows, self.starts, self.lengths, values, strict=True)
        for row, start, length, value in spans:
            packed[row, start : start + length] = value
        return packed


def pack_sequences(
    sequences: Sequence[Sequence[int]],
    row_length: int,
    pad_token_id: int = 1,
    row_multiple: int = 1,
) -> PackedBatch:
    """Packs token ids into rows of `row_length`, best fit first.

    Args:
        row_multiple: R is rounded up to a multiple of it with rows of pads, so that batches of
            nearly the same number of rows share one compiled program.

    Raises:
        InputError: naming the index of a sequence that is empty or longer than `row_length`.
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    for index in np.flatnonzero((lengths < 1) | (lengths > row_length)):
        raise InputError(
            f"sequence {index} has {lengths[index]} tokens, expected 1 to {row_length}"
        )
    packing = best_fit_decreasing(lengths, row_length)
    shape = (-(-packing.num_rows // row_multiple) * row_multiple, row_length)
    inputs = {
        "input_ids": np.full(shape, pad_token_id, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "position_ids": np.full(shape, pad_token_id, np.int32),
    }
    for sequence, length, row, start, slot in zip(
        sequences, lengths, packing.rows, packing.starts, packing.slots, strict=True
    ):
        span = np.s_[row, start : start + length]
        inputs["input_ids"][span] = sequence
        inputs["segment_ids"][span] = slot + 1
        inputs["position_ids"][span] = pad_token_id + 1 + np.arange(length)
    return PackedBatch(inputs, packing.rows, packing.starts, lengths)

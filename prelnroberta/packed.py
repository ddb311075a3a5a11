"""Ragged sequences without padding: several to a row, each a segment that sees only itself.

    packed = pack(sequences, length=128)
    output = model(**packed.inputs)                      # [R, L, ...], R rows where padding took n
    vectors = packed.split(output.last_hidden_state)     # a list in the order of `sequences`

Attention inside segments and positions that start anew in each make the numbers those of the
sequences one by one. (`data/packing.py` packs a corpus too large for memory; this, a batch.)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from prelnroberta.errors import InputError


class Packed(NamedTuple):
    """Rows of several sequences, and where each of them went.

    Attributes:
        inputs: input_ids, segment_ids, position_ids, int32 [R, L], as every model takes them.
        rows, starts, lengths: int [n], the place of each sequence.
    """

    inputs: dict[str, np.ndarray]
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def split(self, values: Any) -> list[np.ndarray]:
        """[R, L, ...] -> of each sequence its own, [length, ...], in the order they were given."""
        values = np.asarray(values)
        places = zip(self.rows, self.starts, self.lengths, strict=True)
        return [values[row, start : start + length] for row, start, length in places]

    def lay_out(self, values: Sequence[Sequence[Any]], fill: Any, dtype: Any) -> np.ndarray:
        """The inverse of `split` for what belongs to tokens, as labels: [R, L], `fill` on pads."""
        out = np.full(self.inputs["input_ids"].shape, fill, dtype)
        places = zip(self.rows, self.starts, self.lengths, values, strict=True)
        for row, start, length, value in places:
            out[row, start : start + length] = value
        return out


def pack(
    sequences: Sequence[Sequence[int]], length: int, pad_token_id: int = 1, multiple: int = 1
) -> Packed:
    """Packs token ids into rows of `length`: the longest first, each where it fits most tightly.

    Args:
        multiple: R is rounded up to a multiple of it with rows of pads, so that batches of nearly
            as many rows share one compiled program.

    Raises:
        InputError: a sequence that is empty or longer than `length`, by its index.
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    for index in np.flatnonzero((lengths < 1) | (lengths > length)):
        raise InputError(f"sequence {index} has {lengths[index]} tokens, expected 1 to {length}")
    rows, starts, segments = (np.zeros(len(lengths), np.int64) for _ in range(3))
    free: list[tuple[int, int]] = []  # (space, row), tightest first
    held: list[int] = []  # sequences in each row
    for index in np.argsort(-lengths, kind="stable"):
        fitting = bisect_left(free, (lengths[index], -1))
        space, row = free.pop(fitting) if fitting < len(free) else (length, len(held))
        if row == len(held):
            held.append(0)
        held[row] += 1
        rows[index], starts[index], segments[index] = row, length - space, held[row]
        insort(free, (space - int(lengths[index]), row))
    R = -(-len(held) // multiple) * multiple
    inputs = {
        "input_ids": np.full((R, length), pad_token_id, np.int32),
        "segment_ids": np.zeros((R, length), np.int32),
        "position_ids": np.full((R, length), pad_token_id, np.int32),
    }
    for sequence, row, start, size, segment in zip(
        sequences, rows, starts, lengths, segments, strict=True
    ):
        place = np.s_[row, start : start + size]
        inputs["input_ids"][place] = sequence
        inputs["segment_ids"][place] = segment
        inputs["position_ids"][place] = pad_token_id + 1 + np.arange(size)
    return Packed(inputs, rows, starts, lengths)

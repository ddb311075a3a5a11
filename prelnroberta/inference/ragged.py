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


class Places(NamedTuple):
    """Where sequences go: int [n] each, and how many rows that takes.

    Attributes:
        rows, starts: the row of each sequence and its first position there.
        numbers: of each sequence among those of its row, from 0.
        count: of rows.
    """

    rows: np.ndarray
    starts: np.ndarray
    numbers: np.ndarray
    count: int


def place(lengths: np.ndarray, length: int, most: int | None = None) -> Places:
    """Finds room for sequences in rows of `length`: the longest first, each where it fits most
    tightly (best fit decreasing: at most 11/9 of the fewest rows there can be, and one).

    Args:
        lengths: int [n], each from 1 to `length`.
        most: sequences that a row may hold; None: any number.
    """
    rows, starts, numbers = (np.zeros(len(lengths), np.int64) for _ in range(3))
    free: list[tuple[int, int]] = []  # (space, row), tightest first
    held: list[int] = []  # sequences in each row
    order = np.argsort(-lengths, kind="stable")
    for index, size in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = bisect_left(free, (size, -1))
        space, row = free.pop(fitting) if fitting < len(free) else (length, len(held))
        if row == len(held):
            held.append(0)
        rows[index], starts[index], numbers[index] = row, length - space, held[row]
        held[row] += 1
        if held[row] != most:
            insort(free, (space - size, row))
    return Places(rows, starts, numbers, len(held))


def pack(
    sequences: Sequence[Sequence[int]], length: int, pad_token_id: int = 1, multiple: int = 1
) -> Packed:
    """Packs token ids into rows of `length`, as `place` finds room for them.

    Args:
        multiple: R is rounded up to a multiple of it with rows of pads, so that batches of nearly
            as many rows share one compiled program.

    Raises:
        InputError: a sequence that is empty or longer than `length`, by its index.
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    for index in np.flatnonzero((lengths < 1) | (lengths > length)):
        raise InputError(f"sequence {index} has {lengths[index]} tokens, expected 1 to {length}")
    rows, starts, numbers, count = place(lengths, length)
    R = -(-count // multiple) * multiple
    inputs = {
        "input_ids": np.full((R, length), pad_token_id, np.int32),
        "segment_ids": np.zeros((R, length), np.int32),
        "position_ids": np.full((R, length), pad_token_id, np.int32),
    }
    for sequence, row, start, size, number in zip(
        sequences, rows, starts, lengths, numbers, strict=True
    ):
        its = np.s_[row, start : start + size]
        inputs["input_ids"][its] = sequence
        inputs["segment_ids"][its] = number + 1
        inputs["position_ids"][its] = pad_token_id + 1 + np.arange(size)
    return Packed(inputs, rows, starts, lengths)

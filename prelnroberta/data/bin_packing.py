"""Bin packing: which sequences share a row of fixed length."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class BinPacking(NamedTuple):
    """The row and offset assigned to each of n sequences.

    Attributes:
        rows: int [n], the row of each sequence.
        starts: int [n], its first position in that row.
        slots: int [n], its index among the sequences of that row, from 0.
        num_rows: the number of rows used.
    """

    rows: np.ndarray
    starts: np.ndarray
    slots: np.ndarray
    num_rows: int


def best_fit_decreasing(
    lengths: np.ndarray, row_length: int, max_per_row: int | None = None
) -> BinPacking:
    """Assigns sequences to rows, longest first, each to the row it fits most tightly.

    Uses at most 11/9 of the optimal number of rows, plus one.

    Args:
        lengths: int [n], each from 1 to `row_length`.
        max_per_row: the most sequences a row may hold; None: no limit.
    """
    rows, starts, slots = (np.zeros(len(lengths), np.int64) for _ in range(3))
    free: list[tuple[int, int]] = []  # (remaining length, row), tightest first
    row_counts: list[int] = []  # sequences in each row
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fit = bisect_left(free, (length, -1))
        space, row = free.pop(fit) if fit < len(free) else (row_length, len(row_counts))
        if row == len(row_counts):
            row_counts.append(0)
        rows[index], starts[index], slots[index] = row, row_length - space, row_counts[row]
        row_counts[row] += 1
        if row_counts[row] != max_per_row:
            insort(free, (space - length, row))
    return BinPacking(rows, starts, slots, len(row_counts))

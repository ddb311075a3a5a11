"""Evaluation: batches of examples of different lengths in a handful of shapes.

jit compiles a program for each shape, and a padded position costs as much as a real one. So a few
lengths are chosen for the examples at hand, every batch is padded to one of them, and examples of
like length share batches. (`training_batches.py` packs: there, no one asks for numbers that are
the same whatever else is in the batch.)

Features of every task have `lengths` [n] int and `batch(indices, length)`, which pads the examples
of `indices` to one dict of arrays; index -1 stands for a row that fills the batch up and counts
nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from prelnroberta.data.features.base import PADDING_INDEX, Features
from prelnroberta.data.shuffle import Batch
from prelnroberta.errors import InputError


def bucket_lengths(lengths: np.ndarray, count: int = 6, multiple: int = 8) -> tuple[int, ...]:
    """At most `count` lengths, multiples of `multiple`, that pad the examples least; ascending.

    Exact, by dynamic programming over the rounded lengths. The last one holds the longest example,
    and is its true length if rounding would add more than there is (a model's limit is met).

    Args:
        lengths: int [n], tokens of each example.

    Raises:
        InputError: no examples.
    """
    if not len(lengths):
        raise InputError("no examples to batch")
    longest = int(max(lengths))
    rounded = -(-np.asarray(lengths) // multiple) * multiple
    sizes, counts = np.unique(rounded, return_counts=True)
    upto = np.concatenate([[0], np.cumsum(counts)])
    # best[j]: fewest positions for the j shortest sizes in the buckets used so far.
    best = np.concatenate([[0.0], np.full(len(sizes), np.inf)])
    choices = []
    for _ in range(min(count, len(sizes))):
        cost = best[:-1, None] + (upto[None, 1:] - upto[:-1, None]) * sizes[None, :]
        cost[np.tril_indices(len(sizes), -1)] = np.inf
        choices.append(cost.argmin(axis=0))
        best = np.concatenate([[0.0], cost.min(axis=0)])
    found = []
    end = len(sizes)
    for choice in reversed(choices):
        if end == 0:
            break
        found.append(int(sizes[end - 1]))
        end = int(choice[end - 1])
    *shorter, last = sorted(found)
    return (*shorter, min(last, max(longest, multiple)))


def find_bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest of the ascending `buckets` that holds `length`. Raises InputError if none."""
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise InputError(f"an example of {length} tokens is longer than the longest of {buckets}")


def bucketed_eval_batches(
    features: Features, buckets: Sequence[int], tokens: int, multiple: int = 1
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every example once, shortest bucket first: (indices int [B], -1 where filled up; the batch).

    A bucket of length L comes in batches of `tokens // L` rows, down to a multiple of `multiple`,
    so there is one shape a bucket. What does not fill a batch moves on to the next bucket; only the
    last is filled up.

    Args:
        tokens: positions of a batch. Bounds memory, whatever the lengths.
        multiple: of what the rows of a batch are, and at least that many: the devices, say.
    """
    lengths = np.asarray(features.lengths)
    if len(lengths):
        find_bucket(int(lengths.max()), buckets)
    order = np.argsort(lengths, kind="stable")
    start = 0
    for bucket in buckets:
        rows = max(tokens // bucket // multiple, 1) * multiple
        end = int(np.searchsorted(lengths[order], bucket, side="right"))
        last = end == len(order)
        while start < end and (last or end - start >= rows):
            chosen = order[start : start + rows]
            start += len(chosen)
            indices = np.concatenate([chosen, np.full(rows - len(chosen), PADDING_INDEX)])
            yield indices, features.batch(indices, bucket)
        if last:
            return

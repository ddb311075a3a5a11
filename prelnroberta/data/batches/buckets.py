"""Evaluation batches: examples of different lengths, padded to a small set of bucket lengths.

jit compiles one program per shape, and a padded position costs as much as a real one. So a few
lengths are chosen for the given examples, examples of similar length share batches, and each batch
is padded to one of the lengths. (Training packs instead, see packed.py: there, the numbers need not
be independent of the other examples in a batch.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from prelnroberta.data.features.base import PADDING_INDEX, Features
from prelnroberta.data.shuffle import Batch
from prelnroberta.errors import InputError


def bucket_lengths(lengths: np.ndarray, count: int = 6, multiple: int = 8) -> tuple[int, ...]:
    """At most `count` bucket lengths that minimize the padding of the examples, ascending.

    The optimum, by dynamic programming over the lengths rounded up to `multiple`. All buckets are
    multiples of `multiple`, except that the last one is at most the longest example's true length
    (or `multiple`), so that the limit of a model is kept.

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
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    # best[j]: the fewest positions for the j shortest sizes with the buckets used so far.
    best = np.concatenate([[0.0], np.full(len(sizes), np.inf)])
    split_points = []
    for _ in range(min(count, len(sizes))):
        cost = best[:-1, None] + (cumulative[None, 1:] - cumulative[:-1, None]) * sizes[None, :]
        cost[np.tril_indices(len(sizes), -1)] = np.inf
        split_points.append(cost.argmin(axis=0))
        best = np.concatenate([[0.0], cost.min(axis=0)])
    buckets = []
    end = len(sizes)
    for splits in reversed(split_points):
        if end == 0:
            break
        buckets.append(int(sizes[end - 1]))
        end = int(splits[end - 1])
    *shorter, last = sorted(buckets)
    return (*shorter, min(last, max(longest, multiple)))


def find_bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest of the ascending `buckets` that holds `length`.

    Raises:
        InputError: no bucket is long enough.
    """
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise InputError(f"an example of {length} tokens is longer than the longest of {buckets}")


def bucketed_eval_batches(
    features: Features, buckets: Sequence[int], tokens_per_batch: int, multiple: int = 1
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields every example once, shortest bucket first: (int [B] example indices, batch).

    Batches of bucket L have `tokens_per_batch // L` rows, rounded down to a multiple of `multiple`,
    so there is one shape per bucket. Examples that do not fill a batch move on to the next bucket;
    only the last batch is filled up, with rows at `PADDING_INDEX`.

    Args:
        tokens_per_batch: positions of a batch. Bounds memory whatever the lengths.
        multiple: the number of rows is a multiple of this and at least this, for example the
            number of devices.
    """
    lengths = np.asarray(features.lengths)
    if len(lengths):
        find_bucket(int(lengths.max()), buckets)
    order = np.argsort(lengths, kind="stable")
    start = 0
    for bucket in buckets:
        rows = max(tokens_per_batch // bucket // multiple, 1) * multiple
        end = int(np.searchsorted(lengths[order], bucket, side="right"))
        is_last = end == len(order)
        while start < end and (is_last or end - start >= rows):
            examples = order[start : start + rows]
            start += len(examples)
            indices = np.concatenate([examples, np.full(rows - len(examples), PADDING_INDEX)])
            yield indices, features.batch(indices, bucket)
        if is_last:
            return

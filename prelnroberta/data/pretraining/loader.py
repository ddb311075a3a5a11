"""Masked language model batches as a pure function of the step.

Global example g is row `permute(g mod n)` of epoch `g div n`, and step s takes examples s * B to
(s + 1) * B - 1, so an epoch may end inside a batch and no row is dropped. Order and masks depend on
(seed, epoch, row index) alone: step s is the same batch for any number of hosts, workers or
restarts, and s is the whole state of the iterator.

A batch is a dict of numpy arrays:
    input_ids, segment_ids, position_ids              int32 [B, L]
    masked_positions, masked_labels                   int32 [B, M]
    masked_weights                                    float32 [B, M], 1 where scored, else 0
"""

from collections.abc import Iterable, Iterator

import numpy as np

from prelnroberta.data.pretraining.masking import Masking
from prelnroberta.data.pretraining.packing import Rows
from prelnroberta.data.shuffle import Batch, Prefetch, check_seed, permute
from prelnroberta.errors import InputError

_ALL = slice(None)


class Loader:
    """Endless shuffled training batches, with new masks in each epoch."""

    def __init__(self, source: Rows, masking: Masking, batch_size: int, seed: int):
        """
        Args:
            source: the rows, read at random.
            batch_size: B, over all hosts.

        Raises:
            InputError: a batch size below 1, or a seed that is negative or beyond 63 bits.
        """
        if batch_size < 1:
            raise InputError(f"batch size={batch_size}: expected 1 or more")
        check_seed(seed)
        self.source = source
        self.masking = masking
        self.batch_size = batch_size
        self.seed = seed

    def batch(self, step: int, rows: slice | np.ndarray = _ALL) -> Batch:
        """Batch `step`, or only its rows `rows` (a host's share)."""
        n = len(self.source)
        examples = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        epochs, indices = np.divmod(examples, n)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            indices[in_epoch] = permute(indices[in_epoch], n, self.seed, int(epoch))
        pairs = zip(epochs.tolist(), indices.tolist(), strict=True)
        return _assemble(self.source, self.masking, self.seed, pairs)

    @property
    def num_rows(self) -> int:
        """Number of rows of every batch: B."""
        return self.batch_size

    def describe(self) -> str:
        """The size of a batch in words, for the start of a run."""
        return f"{self.batch_size} a step"

    def prefetch(
        self, start_step: int, depth: int = 2, rows: slice | np.ndarray = _ALL
    ) -> Prefetch:
        """Batches from `start_step` on, prepared ahead by a thread; close it when done."""
        return Prefetch(lambda step: self.batch(step, rows), start_step, depth)


def masked_eval_batches(
    source: Rows,
    masking: Masking,
    batch_size: int,
    seed: int,
    rows: slice | np.ndarray = _ALL,
) -> Iterator[Batch]:
    """Yields every row once, in order, with the masks of epoch 0, so that evaluations compare.

    The last batch is filled up with copies of the last row that have `masked_weights` 0.
    """
    n = len(source)
    for start in range(0, n, batch_size):
        examples = np.arange(start, start + batch_size)[rows]
        pairs = ((0, int(example)) for example in np.minimum(examples, n - 1))
        batch = _assemble(source, masking, seed, pairs)
        batch["masked_weights"][examples >= n] = 0.0
        yield batch


def _assemble(source: Rows, masking: Masking, seed: int, pairs: Iterable[tuple[int, int]]) -> Batch:
    masked = [masking.apply(source[index], seed, epoch, index) for epoch, index in pairs]
    return {name: np.stack([example[name] for example in masked]) for name in masked[0]}

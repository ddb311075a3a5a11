"""Training batches for fine-tuning: examples of different lengths, packed so that no step pads.

A batch is B examples in R rows of L tokens. Attention is limited to one example by segment ids, and
position ids restart in each. Labels are stored in the row of their example, so rows can be divided
among devices, hosts and accumulation steps, and sums over rows equal those of padded examples.

All batches of a run have the same shape. Examples are drawn in pools; within a pool they are
distributed over the batches by length, so that all batches hold a similar number of tokens. The
order is a function of (seed, step), so the step is the only state to save.
"""

from __future__ import annotations

import functools

import numpy as np

from prelnroberta.config import IGNORE_INDEX
from prelnroberta.data.bin_packing import BinPacking, best_fit_decreasing
from prelnroberta.data.features.base import PADDING_INDEX, Features
from prelnroberta.data.shuffle import Batch, Prefetch, check_seed, permute
from prelnroberta.data.tokenizer import PAD_ID
from prelnroberta.errors import InputError

_ALL = slice(None)
_POSITION_LABELS = ("start_positions", "end_positions")  # relative to their example's first token
# A row has room for one example per 8 tokens; that is enough unless examples are shorter.
_TOKENS_PER_SLOT = 8


class PackedBatches:
    """Shuffled, packed batches of B examples; batch `step` is a function of (seed, step).

    Every example occurs once an epoch. The last batches of an epoch may hold fewer than B examples,
    so that epochs begin at multiples of `steps_per_epoch`.

    Args:
        features: features of any task.
        batch_size: B, over all hosts.
        steps: number of batches of the run. R and L are chosen so that all of them fit.
        multiple: R is a multiple of this, for example of the number of devices.
        pool: number of batches whose examples are drawn together.

    Attributes:
        num_rows: R.
        length: L, at most 1.5 times the longest example.

    Raises:
        InputError: a batch size, pool or number of steps below 1, a seed out of range, or no
            examples.
    """

    def __init__(
        self,
        features: Features,
        batch_size: int,
        seed: int,
        steps: int,
        multiple: int = 1,
        pool: int = 50,
    ):
        for name, value in {"batch size": batch_size, "pool": pool, "steps": steps}.items():
            if value < 1:
                raise InputError(f"{name}={value}: expected 1 or more")
        check_seed(seed)
        self.features = features
        self.batch_size = batch_size
        self.seed = seed
        self.pool = pool
        self._sizes = np.asarray(features.total_lengths)
        if not len(self._sizes):
            raise InputError("no examples to train on")
        self.steps_per_epoch = -(-len(self._sizes) // batch_size)
        # Cached for the following steps of the same pool.
        self._pool_batches = functools.lru_cache(maxsize=2)(self._draw_pool)
        self.num_rows, self.length = self._choose_shape(steps, multiple)

    @property
    def fill_ratio(self) -> float:
        """Average share of a batch's positions that hold tokens."""
        tokens = self._sizes.sum() / self.steps_per_epoch
        return float(tokens / (self.num_rows * self.length))

    def describe(self) -> str:
        """The size of a batch in words, for the start of a run."""
        return (
            f"{self.batch_size} a step, packed into {self.num_rows} rows of {self.length} tokens "
            f"({self.fill_ratio:.0%} full)"
        )

    def indices(self, step: int) -> np.ndarray:
        """int64 [B or fewer]: the examples of batch `step`."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        pool, step_in_pool = divmod(step_in_epoch, self.pool)
        examples = self._pool_batches(epoch, pool)[step_in_pool]
        return examples[examples != PADDING_INDEX]

    def _choose_shape(self, steps: int, multiple: int) -> tuple[int, int]:
        """The R and L with the fewest positions in which the examples of every step fit.

        With few rows, the last one may be mostly empty. Somewhat longer rows, and fewer of them,
        can then hold the same examples in fewer positions.
        """
        longest = -(-int(self._sizes.max()) // 8) * 8
        lengths = np.arange(longest, longest * 3 // 2 + 1, -(-longest // 128) * 8)
        needed = [
            [self._pack(indices, int(length)).num_rows for length in lengths]
            for indices in map(self.indices, range(steps))
        ]
        rows = -(-np.max(needed, axis=0) // multiple) * multiple
        best = int(np.argmin(rows * lengths))
        return int(rows[best]), int(lengths[best])

    def _pack(self, indices: np.ndarray, length: int) -> BinPacking:
        return best_fit_decreasing(self._sizes[indices], length, self._slots_per_row(length))

    def _slots_per_row(self, length: int) -> int:
        """Q: the most examples that a row of this length may hold."""
        return max(length // (_TOKENS_PER_SLOT * self.features.num_choices), 1)

    def _draw_pool(self, epoch: int, pool: int) -> np.ndarray:
        """int64 [batches, B]: the examples of each batch of a pool."""
        B, n = self.batch_size, len(self._sizes)
        start = pool * self.pool * B
        examples = permute(np.arange(start, min(start + self.pool * B, n)), n, self.seed, epoch)
        examples = examples[np.argsort(-self._sizes[examples], kind="stable")]
        missing = np.full(-len(examples) % B, PADDING_INDEX)
        # One example to each batch at a time, longest first and in alternating direction, so that
        # all batches get a similar number of tokens.
        rounds = np.concatenate([examples, missing]).reshape(B, -1)
        rounds[1::2] = rounds[1::2, ::-1]
        # Without this shuffle the longest example of a pool would always be in its first batch.
        generator = np.random.Generator(
            np.random.Philox(
                key=np.array([self.seed, 1], np.uint64),
                counter=np.array([0, 0, pool, epoch], np.uint64),
            )
        )
        return rounds.T[generator.permutation(rounds.shape[1])]

    def batch(self, step: int, rows: slice | np.ndarray = _ALL) -> Batch:
        """Batch `step`, or only its rows `rows` (a host's share).

        Returns:
            input_ids, segment_ids, position_ids: int32 [R, L].
            read_positions: int32 [R, Q], or [R, Q, A] for multiple choice: the first position of
                each of up to Q examples, or of each of its choices.
            The features' other arrays [B, ...] as [R, Q, ...], or [R, L] if they are per token.
            Unused slots and positions have weight 0, False, and label -100.

        Raises:
            InputError: the step is beyond the planned ones and needs more rows than R.
        """
        indices = self.indices(step)
        packing = self._pack(indices, self.length)
        if packing.num_rows > self.num_rows:
            raise InputError(
                f"step {step}: needs {packing.num_rows} rows, planned were {self.num_rows}"
            )
        selected = np.arange(self.num_rows)[rows]
        here = np.isin(packing.rows, selected)
        longest = int(self.features.lengths[indices].max())
        return _place_examples(
            self.features.batch(indices[here], longest),
            np.searchsorted(selected, packing.rows[here]),
            packing.starts[here],
            packing.slots[here],
            (len(selected), self.length, self._slots_per_row(self.length)),
            self.features.per_token_arrays,
        )

    def prefetch(
        self, start_step: int, depth: int = 2, rows: slice | np.ndarray = _ALL
    ) -> Prefetch:
        """Batches from `start_step` on, prepared ahead by a thread; close it when done."""
        return Prefetch(lambda step: self.batch(step, rows), start_step, depth)


def _place_examples(
    examples: Batch,
    rows: np.ndarray,
    starts: np.ndarray,
    slots: np.ndarray,
    shape: tuple[int, int, int],
    per_token_arrays: tuple[str, ...],
) -> Batch:
    """Copies padded examples [n, ...] to their rows, starts and slots [n] in a batch (R, L, Q)."""
    R, L, Q = shape
    ids = examples["input_ids"]
    A = ids.shape[1] if ids.ndim == 3 else 1
    is_token = examples["attention_mask"].reshape(len(ids), A, ids.shape[-1])
    sizes = is_token.sum(-1)
    choice_starts = starts[:, None] + sizes.cumsum(1) - sizes  # [n, A]
    example, choice, token = np.nonzero(is_token)
    target = rows[example], choice_starts[example, choice] + token
    batch = {
        "input_ids": np.full((R, L), PAD_ID, np.int32),
        "segment_ids": np.zeros((R, L), np.int32),
        "position_ids": np.full((R, L), PAD_ID, np.int32),
        "read_positions": np.zeros((R, Q, A), np.int32),
    }
    batch["input_ids"][target] = ids.reshape(is_token.shape)[example, choice, token]
    batch["segment_ids"][target] = 1 + slots[example] * A + choice
    batch["position_ids"][target] = PAD_ID + 1 + token
    batch["read_positions"][rows, slots] = np.where(sizes > 0, choice_starts, 0)
    if ids.ndim == 2:
        batch["read_positions"] = batch["read_positions"][..., 0]
    for name in examples.keys() - {"input_ids", "attention_mask"}:
        values = examples[name]
        fill_value = IGNORE_INDEX if np.issubdtype(values.dtype, np.integer) else 0
        if name in per_token_arrays:
            batch[name] = np.full((R, L), fill_value, values.dtype)
            batch[name][target] = values[example, token]
            continue
        if name in _POSITION_LABELS:
            values = np.where(values >= 0, values + starts, IGNORE_INDEX).astype(np.int32)
        batch[name] = np.full((R, Q, *values.shape[1:]), fill_value, values.dtype)
        batch[name][rows, slots] = values
    return batch

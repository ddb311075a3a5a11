"""Fine-tuning: batches of examples of different lengths, packed, so that no step pads.

A batch is B examples in R rows of L tokens. Attention stays inside an example (segment ids), its
positions start anew, and what is asked of it stands in its row beside it: so rows can be dealt out
to devices, hosts and accumulation steps, and the sums over rows are those of padded examples.

Every batch of a run has the same shape. Examples are drawn in pools, and a pool's are dealt out by
length, so that its batches hold about as many tokens each. Order follows from (seed, step): the
whole state of a loader is its step.
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
_POSITIONS = ("start_positions", "end_positions")  # of tokens, counted from their example's first
# A row has places for an eighth as many examples as tokens. (Shorter ones do not fill it.)
_TOKENS_A_PLACE = 8


class PackedBatches:
    """Shuffled batches of B examples, packed; batch `step` is a function of (seed, step).

    Every example comes once an epoch; the last batches of one may hold fewer than B, so that
    epochs begin at multiples of `steps_per_epoch`.

    Args:
        features: of any task.
        batch_size: B, over all hosts.
        steps: how many batches there are; the fullest of them settles R and L.
        multiple: of which R is one: the devices, say.
        pool: batches that are drawn together.

    Attributes:
        rows, length: R and L, at most half again as long as the longest example.

    Raises:
        InputError: a batch size, pool or number of steps below 1, a seed out of range.
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
        self._sizes = np.asarray(features.sizes)
        if not len(self._sizes):
            raise InputError("no examples to train on")
        self.steps_per_epoch = -(-len(self._sizes) // batch_size)
        # Kept for the steps that follow; what it holds is a function of its arguments.
        self._drawn = functools.lru_cache(maxsize=2)(self._draw)
        self.rows, self.length = self._shape(steps, multiple)

    @property
    def fill(self) -> float:
        """Share of a batch's positions that hold tokens, on average."""
        tokens = self._sizes.sum() / self.steps_per_epoch
        return float(tokens / (self.rows * self.length))

    def describe(self) -> str:
        """Half a line for whoever starts a run."""
        return (
            f"{self.batch_size} a step, packed into {self.rows} rows of {self.length} tokens "
            f"({self.fill:.0%} full)"
        )

    def indices(self, step: int) -> np.ndarray:
        """int64 [B or fewer]: the examples of a batch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        pool, turn = divmod(within, self.pool)
        dealt = self._drawn(epoch, pool)[turn]
        return dealt[dealt != PADDING_INDEX]

    def _shape(self, steps: int, multiple: int) -> tuple[int, int]:
        """R and L of the fewest positions that every step's examples fit in.

        A batch of few rows may leave most of the last one empty: somewhat longer rows, fewer of
        them, then hold the same examples in less.
        """
        longest = -(-int(self._sizes.max()) // 8) * 8
        lengths = np.arange(longest, longest * 3 // 2 + 1, -(-longest // 128) * 8)
        needed = [
            [self._places(indices, length).num_rows for length in lengths]
            for indices in map(self.indices, range(steps))
        ]
        rows = -(-np.max(needed, axis=0) // multiple) * multiple
        best = int(np.argmin(rows * lengths))
        return int(rows[best]), int(lengths[best])

    def _places(self, indices: np.ndarray, length: int) -> BinPacking:
        return best_fit_decreasing(self._sizes[indices], length, self._most(length))

    def _most(self, length: int) -> int:
        """S: the most examples that a row of this length holds."""
        choices = getattr(self.features, "choices", 1)
        return max(length // (_TOKENS_A_PLACE * choices), 1)

    def _draw(self, epoch: int, pool: int) -> np.ndarray:
        """int64 [batches, B]: a pool's batches, in turn."""
        B, n = self.batch_size, len(self._sizes)
        start = pool * self.pool * B
        examples = permute(np.arange(start, min(start + self.pool * B, n)), n, self.seed, epoch)
        examples = examples[np.argsort(-self._sizes[examples], kind="stable")]
        missing = np.full(-len(examples) % B, PADDING_INDEX)
        # As cards, longest first, in turns that go forth and back: all get about the same.
        turns = np.concatenate([examples, missing]).reshape(B, -1)
        turns[1::2] = turns[1::2, ::-1]
        # Without this the longest example of a pool would come first.
        generator = np.random.Generator(
            np.random.Philox(
                key=np.array([self.seed, 1], np.uint64),
                counter=np.array([0, 0, pool, epoch], np.uint64),
            )
        )
        return turns.T[generator.permutation(turns.shape[1])]

    def batch(self, step: int, rows: slice | np.ndarray = _ALL) -> Batch:
        """Batch `step`, or those of its rows [R] that `rows` selects (a host's share).

        Returns:
            input_ids, segment_ids, position_ids int32 [R, L]; read_positions int32 [R, S] or, of
            choices, [R, S, C]: where each of up to S examples begins. The features' other arrays
            [B, ...] as [R, S, ...], or [R, L] if they are by token. What is no example's has
            weight 0, False, and the label -100.

        Raises:
            InputError: a step so late that it needs more rows than R.
        """
        indices = self.indices(step)
        places = self._places(indices, self.length)
        if places.num_rows > self.rows:
            raise InputError(f"step {step}: needs {places.num_rows} rows, planned were {self.rows}")
        wanted = np.arange(self.rows)[rows]
        here = np.isin(places.rows, wanted)
        longest = int(self.features.lengths[indices].max())
        return _lay_out(
            self.features.batch(indices[here], longest),
            np.searchsorted(wanted, places.rows[here]),
            places.starts[here],
            places.slots[here],
            (len(wanted), self.length, self._most(self.length)),
            self.features.by_token,
        )

    def prefetch(
        self, start_step: int, depth: int = 2, rows: slice | np.ndarray = _ALL
    ) -> Prefetch:
        """Batches from `start_step` on, made ahead by a thread; close it when done."""
        return Prefetch(lambda step: self.batch(step, rows), start_step, depth)


def _lay_out(
    examples: Batch,
    rows: np.ndarray,
    starts: np.ndarray,
    numbers: np.ndarray,
    shape: tuple[int, int, int],
    by_token: tuple[str, ...],
) -> Batch:
    """Padded examples [n, ...] at their places [n] in the rows of a batch of shape (R, L, S)."""
    R, L, S = shape
    ids = examples["input_ids"]
    C = ids.shape[1] if ids.ndim == 3 else 1
    real = examples["attention_mask"].reshape(len(ids), C, ids.shape[-1])
    sizes = real.sum(-1)
    begins = starts[:, None] + sizes.cumsum(1) - sizes  # [n, C], of each choice
    example, choice, token = np.nonzero(real)
    at = rows[example], begins[example, choice] + token
    batch = {
        "input_ids": np.full((R, L), PAD_ID, np.int32),
        "segment_ids": np.zeros((R, L), np.int32),
        "position_ids": np.full((R, L), PAD_ID, np.int32),
        "read_positions": np.zeros((R, S, C), np.int32),
    }
    batch["input_ids"][at] = ids.reshape(real.shape)[example, choice, token]
    batch["segment_ids"][at] = 1 + numbers[example] * C + choice
    batch["position_ids"][at] = PAD_ID + 1 + token
    batch["read_positions"][rows, numbers] = np.where(sizes > 0, begins, 0)
    if ids.ndim == 2:
        batch["read_positions"] = batch["read_positions"][..., 0]
    for name in examples.keys() - {"input_ids", "attention_mask"}:
        values = examples[name]
        fill = IGNORE_INDEX if np.issubdtype(values.dtype, np.integer) else 0
        if name in by_token:
            batch[name] = np.full((R, L), fill, values.dtype)
            batch[name][at] = values[example, token]
            continue
        if name in _POSITIONS:
            values = np.where(values >= 0, values + starts, IGNORE_INDEX).astype(np.int32)
        batch[name] = np.full((R, S, *values.shape[1:]), fill, values.dtype)
        batch[name][rows, numbers] = values
    return batch

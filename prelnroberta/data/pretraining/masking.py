"""Which tokens of a row are masked, and how: a function of (seed, epoch, row index).

All forms of masking are one procedure. The maskable tokens of a row are partitioned into units
(tokens, whole words, or spans of whole words), and some units are selected at random. Each selected
unit is replaced by `<mask>`, replaced by random tokens, or kept, and scored in all three cases.
Every unit is selected with probability `rate`, whatever the units and the row, so every token is.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from prelnroberta.data.pretraining.packing import Row
from prelnroberta.data.tokenizer import UNK_ID
from prelnroberta.errors import InputError

SAMPLINGS = ("exact", "bernoulli")
UNITS = ("token", "word", "span")

_FIRST_REGULAR_ID = UNK_ID + 1  # smaller ids are special tokens

# A word is split after this many tokens, and a span ends with the word that reaches it. Otherwise,
# text without spaces, or a ruled line, would be one unit.
_MAX_UNIT_TOKENS = 24

# Cumulative probabilities of span lengths in words: geometric with p = 0.2, at most 10 (SpanBERT,
# Joshi et al. 2020, section 3.1). Renormalised to 1..10, the mean is the paper's 3.8; with the tail
# clipped to 10 it would be 4.5.
_SPAN_LENGTH_CDF = np.cumsum(0.2 * 0.8 ** np.arange(10)) / (1 - 0.8**10)

# The longest possible unit in tokens; for single tokens, the smallest useful number of positions.
_LONGEST_UNIT = {"token": 4, "word": _MAX_UNIT_TOKENS, "span": 2 * _MAX_UNIT_TOKENS - 1}

# E[s^2] / E[s] of the units' sizes s in tokens, by which the variance of a row's count scales.
# Measured on English docstrings with byte-level BPE: words 3.4 (V 8,192) to 6.7 (V 512).
_SIZE_DISPERSION = {"token": 1, "word": 4, "span": 12}

# What replaces a selected token: `<mask>`, a random token, or nothing.
MASK, RANDOM, KEEP = range(3)


@dataclass(frozen=True)
class Masking:
    """How to mask.

    Args:
        vocab_size: V. `<mask>` is V - 1.
        rate: share of tokens selected, in (0, 1).
        sampling: 'exact' selects floor(rate * units + U[0, 1)) units without replacement among all
            units of the row, special tokens included (fairseq/data/mask_tokens_dataset.py).
            'bernoulli' selects each unit independently with probability `rate`, and never a special
            token (transformers' DataCollatorForLanguageModeling).
        unit: 'token'; 'word', all tokens of a word; or 'span', 1 to 10 consecutive whole words,
            short spans more often (SpanBERT). Special tokens are units of their own. No word or
            span crosses a special token or the end of a segment or row. A word is split after 24
            tokens, and a span ends with the word in which it reaches 24.
        mask, random, keep: shares of the selected units that are replaced by `<mask>`, replaced by
            random tokens, and kept; they sum to 1. One draw decides for a whole unit, as in fairseq
            and SpanBERT. Random tokens are uniform over the vocabulary without the first four
            special tokens and `<mask>`; fairseq includes `<mask>`, transformers all special tokens.
        word_start_mask: bool [V], ids that begin a word; needed for 'word' and 'span'. A word also
            begins after each special token. Whitespace, newlines included, belongs to the word
            after it.

    Raises:
        InputError: naming the argument and its value.
    """

    vocab_size: int
    rate: float = 0.15
    sampling: str = "exact"
    unit: str = "token"
    mask: float = 0.8
    random: float = 0.1
    keep: float = 0.1
    word_start_mask: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.vocab_size < _FIRST_REGULAR_ID + 2:
            raise InputError(
                f"vocab_size={self.vocab_size}: expected at least {_FIRST_REGULAR_ID + 2}, "
                "five special tokens and one more"
            )
        if not 0 < self.rate < 1:
            raise InputError(
                f"mask rate={self.rate}: expected a number in (0, 1), for example 0.15"
            )
        if self.sampling not in SAMPLINGS:
            raise InputError(
                f"mask sampling={self.sampling!r}: expected one of {', '.join(SAMPLINGS)}"
            )
        if self.unit not in UNITS:
            raise InputError(f"mask unit={self.unit!r}: expected one of {', '.join(UNITS)}")
        split = (self.mask, self.random, self.keep)
        if not all(share >= 0 for share in split) or not abs(sum(split) - 1) <= 1e-6:
            raise InputError(
                f"mask={self.mask}, random={self.random}, keep={self.keep}: expected three shares "
                "of at least 0 that sum to 1, for example 0.8, 0.1, 0.1"
            )
        if self.unit != "token" and np.shape(self.word_start_mask) != (self.vocab_size,):
            raise InputError(
                f"mask unit={self.unit!r} needs word_start_mask for each of vocab_size="
                f"{self.vocab_size} ids, but got shape {np.shape(self.word_start_mask)}"
            )

    def max_masked_positions(self, length: int) -> int:
        """M: the maximal number of masked positions in a row of `length` tokens.

        With sampling 'exact' and unit 'token', the largest number that can be selected. Otherwise
        that number has no useful bound, and M is its mean plus 4 standard deviations, but at least
        4 tokens or one longest unit: each position costs a row of logits, and a normally
        distributed count exceeds M in 3 of 100,000 rows.

        If more are selected, random units are dropped until the others fit: the rest are whole
        units, a random subset of those selected; dropped units stay unchanged and unscored. At most
        this lowered the rate by 0.3 % of it (words, 15 %, L 64, docstrings).
        """
        mean = self.rate * length
        if self.sampling == "exact" and self.unit == "token":
            return min(length, math.ceil(mean))
        deviation = math.sqrt(mean * (1 - self.rate) * _SIZE_DISPERSION[self.unit])
        return min(length, max(_LONGEST_UNIT[self.unit], math.ceil(mean + 4 * deviation)))

    def apply(self, row: Row, seed: int, epoch: int, row_index: int) -> dict[str, np.ndarray]:
        """Masks a row.

        The random stream depends on (seed, epoch, row_index) alone: Philox with the seed as its
        key, and a counter that starts at a block of 2^128 draws of its own for each (epoch,
        row_index).

        Returns:
            input_ids, segment_ids, position_ids: int32 [L].
            masked_positions: int32 [M], ascending.
            masked_labels: int32 [M].
            masked_weights: float32 [M], 1 where scored. Unused entries have position 0, label 0
                and weight 0.
        """
        generator = np.random.Generator(
            np.random.Philox(
                key=np.array([seed, 0], np.uint64),
                counter=np.array([0, 0, row_index, epoch], np.uint64),
            )
        )
        max_masked = self.max_masked_positions(len(row.input_ids))
        positions, actions = self.choose_positions(row, max_masked, generator)

        input_ids = row.input_ids.copy()
        labels = input_ids[positions]
        input_ids[positions[actions == MASK]] = self.vocab_size - 1
        replaced = positions[actions == RANDOM]
        if len(replaced):
            input_ids[replaced] = generator.integers(
                _FIRST_REGULAR_ID, self.vocab_size - 1, len(replaced)
            )

        count = len(positions)
        masked_positions = np.zeros(max_masked, np.int32)
        masked_labels = np.zeros(max_masked, np.int32)
        masked_weights = np.zeros(max_masked, np.float32)
        masked_positions[:count] = positions
        masked_labels[:count] = labels
        masked_weights[:count] = 1.0
        return {
            "input_ids": input_ids,
            "segment_ids": row.segment_ids,
            "position_ids": row.position_ids,
            "masked_positions": masked_positions,
            "masked_labels": masked_labels,
            "masked_weights": masked_weights,
        }

    def choose_positions(
        self, row: Row, max_masked: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """At most `max_masked` positions, ascending, and MASK, RANDOM or KEEP for each."""
        maskable = row.segment_ids > 0
        if self.sampling == "bernoulli":
            maskable &= ~self._is_special(row)
        positions = maskable.nonzero()[0]
        if self.unit == "token":
            units = len(positions)
        else:
            # Special tokens are units of their own, so excluding them splits no unit.
            unit_of = np.cumsum(self._unit_starts(row, generator)[positions]) - 1
            sizes = np.bincount(unit_of)
            units = len(sizes)

        priorities, draws = generator.random((2, units))
        if self.sampling == "exact":
            count = int(self.rate * units + generator.random())
        else:
            count = int(np.count_nonzero(priorities < self.rate))
        # In order of priority, the first `count` units are selected; any prefix is a random subset.
        chosen = priorities.argsort()[:count]
        if self.unit == "token":
            chosen = np.sort(chosen[:max_masked])
            scored, draws = positions[chosen], draws[chosen]
        else:
            fits = np.zeros(units, bool)
            fits[chosen[np.cumsum(sizes[chosen]) <= max_masked]] = True
            selected = fits[unit_of]
            scored, draws = positions[selected], draws[unit_of[selected]]
        actions = (draws >= self.mask).view(np.int8) + (draws >= self.mask + self.random)
        return scored, actions

    def _is_special(self, row: Row) -> np.ndarray:
        return (row.input_ids < _FIRST_REGULAR_ID) | (row.input_ids == self.vocab_size - 1)

    def _unit_starts(self, row: Row, generator: np.random.Generator) -> np.ndarray:
        """bool [L]: positions where a word or a span begins."""
        special = self._is_special(row)
        breaks = special.copy()
        breaks[0] = True
        breaks[1:] |= special[:-1] | (row.segment_ids[1:] != row.segment_ids[:-1])
        starts = breaks | self.word_start_mask[row.input_ids]
        word_starts = starts.nonzero()[0]
        position_in_word = np.arange(len(starts)) - word_starts[np.cumsum(starts) - 1]
        starts = position_in_word % _MAX_UNIT_TOKENS == 0
        if self.unit == "word":
            return starts

        word_starts = starts.nonzero()[0]
        draws = generator.random(len(word_starts))
        span_ends = np.cumsum(1 + np.searchsorted(_SPAN_LENGTH_CDF, draws, side="right"))
        opens_span = breaks[word_starts]  # for each word
        opens_span[span_ends[span_ends < len(word_starts)]] = True
        span_starts = word_starts[opens_span][np.cumsum(opens_span) - 1]
        offset = word_starts - span_starts  # of each word in its span, in tokens
        opens_span[1:] |= offset[1:] // _MAX_UNIT_TOKENS != offset[:-1] // _MAX_UNIT_TOKENS
        starts[:] = False
        starts[word_starts[opens_span]] = True
        return starts

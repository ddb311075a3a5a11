"""Which tokens of a row are hidden, and behind what: a function of (seed, epoch, example).

Every form of masking here is one procedure. The row's maskable tokens are parted into units
(tokens, whole words, or spans of whole words), some units are chosen without looking inside them,
and each chosen unit is hidden behind `<mask>`, replaced by random tokens, or left as it is, but
scored. Since the units partition the row and each is chosen with probability `rate`, every token
is chosen with probability `rate`, whatever the unit and the row.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from prelnroberta.data.pretraining.packing import Row
from prelnroberta.data.tokenizer import UNK_ID
from prelnroberta.errors import InputError

SAMPLINGS = ("exact", "bernoulli")
UNITS = ("token", "word", "span")

_FIRST_ORDINARY = UNK_ID + 1  # the ids below are specials

# Tokens after which a word is cut, and past which a span ends with its word: text without spaces,
# or a ruled line, would else be one unit.
_LONG = 24

# Span lengths in words: geometric with p = 0.2, clipped at 10 (SpanBERT, Joshi et al. 2020, section
# 3.1). The paper's mean of 3.8 is that of the law renormalised to 1..10; piled up at 10 it is 4.5.
_SPAN_LENGTHS = np.cumsum(0.2 * 0.8 ** np.arange(10)) / (1 - 0.8**10)

# The longest unit each gives, in tokens; for tokens, the fewest slots worth having.
_LONGEST = {"token": 4, "word": _LONG, "span": 2 * _LONG - 1}

# E[s^2] / E[s] of the units' sizes s in tokens, which scales the variance of a row's count.
# Measured on English docstrings with byte-level BPE: words 3.4 (V 8,192) to 6.7 (V 512).
_SPREAD = {"token": 1, "word": 4, "span": 12}


# What stands in a chosen token's place: `<mask>`, a random token, or the token itself.
MASK, RANDOM, SAME = range(3)


@dataclass(frozen=True)
class Masking:
    """How to mask; validated on construction, InputError names the field and its value.

    vocab_size: V. `<mask>` is V - 1.
    rate: share of tokens chosen, inside (0, 1).
    sampling: 'exact' chooses floor(rate * units + U[0, 1)) units without replacement among all real
        ones, specials included (fairseq/data/mask_tokens_dataset.py). 'bernoulli' chooses each unit
        on its own with probability `rate`, and never a special (transformers'
        DataCollatorForLanguageModeling).
    unit: 'token'; 'word', all tokens of a word together; or 'span', consecutive whole words,
        1 to 10 of them, short ones more often (SpanBERT). Specials are units of their own, and no
        word or span crosses a special, a segment's end or the row's. A word is cut after 24 tokens,
        and a span ends with the word in which it comes to 24.
    mask, random, same: split of the chosen units between `<mask>`, random tokens and the token
        itself; they sum to 1. The draw is made once a unit, as fairseq and SpanBERT do. Random
        tokens are uniform over the vocabulary without the four first specials and `<mask>`;
        fairseq leaves `<mask>` in, transformers every special.
    word_start_mask: bool [V], ids that begin a word, needed for 'word' and 'span'. A word also begins
        after each special. Whitespace opens the word it precedes, a newline as a space does.
    """

    vocab_size: int
    rate: float = 0.15
    sampling: str = "exact"
    unit: str = "token"
    mask: float = 0.8
    random: float = 0.1
    same: float = 0.1
    word_start_mask: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.vocab_size < _FIRST_ORDINARY + 2:
            raise InputError(
                f"vocab_size={self.vocab_size}: expected at least {_FIRST_ORDINARY + 2}, "
                "five specials and one token"
            )
        if not 0 < self.rate < 1:
            raise InputError(f"mask rate={self.rate}: expected a number inside (0, 1), as 0.15")
        if self.sampling not in SAMPLINGS:
            raise InputError(
                f"mask sampling={self.sampling!r}: expected one of {', '.join(SAMPLINGS)}"
            )
        if self.unit not in UNITS:
            raise InputError(f"mask unit={self.unit!r}: expected one of {', '.join(UNITS)}")
        split = (self.mask, self.random, self.same)
        if not all(share >= 0 for share in split) or not abs(sum(split) - 1) <= 1e-6:
            raise InputError(
                f"mask={self.mask}, random={self.random}, same={self.same}: expected three shares "
                "of at least 0 that sum to 1, as 0.8, 0.1, 0.1"
            )
        if self.unit != "token" and np.shape(self.word_start_mask) != (self.vocab_size,):
            raise InputError(
                f"mask unit={self.unit!r} needs word_start_mask for each of vocab_size="
                f"{self.vocab_size} ids, but got shape {np.shape(self.word_start_mask)}"
            )

    def max_masked_positions(self, length: int) -> int:
        """M: how many masked positions a row of `length` tokens has room for.

        All there can be with sampling 'exact' and unit 'token'. Otherwise the count is open, and M
        is its mean plus 4 standard deviations, and no less than 4 tokens or one longest unit: each
        slot costs a row of logits, and a normal count exceeds M in 3 rows of 100,000.

        When more are chosen, units are dropped at random until the rest fits: what stays are whole
        units, a random subset of those chosen, and what is dropped is left as it was, unscored.
        The most that this took from the rate was 0.3 % of it (words, 15 %, L 64, docstrings).
        """
        mean = self.rate * length
        if self.sampling == "exact" and self.unit == "token":
            return min(length, math.ceil(mean))
        deviation = math.sqrt(mean * (1 - self.rate) * _SPREAD[self.unit])
        return min(length, max(_LONGEST[self.unit], math.ceil(mean + 4 * deviation)))

    def apply(self, row: Row, seed: int, epoch: int, example: int) -> dict[str, np.ndarray]:
        """Masks a row.

        The random stream belongs to (seed, epoch, example) alone: Philox keyed by the seed, its
        counter starting at a block of 2^128 draws that no other (epoch, example) reaches.

        Returns: `input_ids`, `segment_ids`, `position_ids` int32 [L]; `masked_positions` int32 [M],
        ascending; `masked_labels` int32 [M]; `masked_weights` float32 [M], 1 where scored.
        Slots left over point at position 0 with label 0 and weight 0.
        """
        generator = np.random.Generator(
            np.random.Philox(
                key=np.array([seed, 0], np.uint64),
                counter=np.array([0, 0, example, epoch], np.uint64),
            )
        )
        slots = self.max_masked_positions(len(row.input_ids))
        positions, actions = self.choose_positions(row, slots, generator)

        input_ids = row.input_ids.copy()
        labels = input_ids[positions]
        input_ids[positions[actions == MASK]] = self.vocab_size - 1
        replaced = positions[actions == RANDOM]
        if len(replaced):
            input_ids[replaced] = generator.integers(
                _FIRST_ORDINARY, self.vocab_size - 1, len(replaced)
            )

        count = len(positions)
        masked_positions = np.zeros(slots, np.int32)
        masked_labels = np.zeros(slots, np.int32)
        masked_weights = np.zeros(slots, np.float32)
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
        self, row: Row, slots: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Chosen positions, ascending, at most `slots`, and MASK, RANDOM or SAME at each."""
        maskable = row.segment_ids > 0
        if self.sampling == "bernoulli":
            maskable &= ~self._special(row)
        positions = maskable.nonzero()[0]
        if self.unit == "token":
            units = len(positions)
        else:
            # Specials are units of their own, so leaving them out above cut no unit in two.
            unit_of = np.cumsum(self._unit_starts(row, generator)[positions]) - 1
            sizes = np.bincount(unit_of)
            units = len(sizes)

        keys, draws = generator.random((2, units))
        if self.sampling == "exact":
            count = int(self.rate * units + generator.random())
        else:
            count = np.count_nonzero(keys < self.rate)
        # By ascending key, the first `count` units are the choice, and any shorter head is a random
        # subset of it.
        chosen = keys.argsort()[:count]
        if self.unit == "token":
            chosen = np.sort(chosen[:slots])
            scored, draws = positions[chosen], draws[chosen]
        else:
            fits = np.zeros(units, bool)
            fits[chosen[np.cumsum(sizes[chosen]) <= slots]] = True
            inside = fits[unit_of]
            scored, draws = positions[inside], draws[unit_of[inside]]
        actions = (draws >= self.mask).view(np.int8) + (draws >= self.mask + self.random)
        return scored, actions

    def _special(self, row: Row) -> np.ndarray:
        return (row.input_ids < _FIRST_ORDINARY) | (row.input_ids == self.vocab_size - 1)

    def _unit_starts(self, row: Row, generator: np.random.Generator) -> np.ndarray:
        """bool [L]: positions where a word or a span begins."""
        special = self._special(row)
        breaks = special.copy()
        breaks[0] = True
        breaks[1:] |= special[:-1] | (row.segment_ids[1:] != row.segment_ids[:-1])
        starts = breaks | self.word_start_mask[row.input_ids]
        begins = starts.nonzero()[0]
        inside = np.arange(len(starts)) - begins[np.cumsum(starts) - 1]
        starts = inside % _LONG == 0
        if self.unit == "word":
            return starts

        begins = starts.nonzero()[0]
        draws = generator.random(len(begins))
        ends = np.cumsum(1 + np.searchsorted(_SPAN_LENGTHS, draws, side="right"))
        opens = breaks[begins]  # words that begin a span
        opens[ends[ends < len(begins)]] = True
        lead = begins - begins[opens][np.cumsum(opens) - 1]
        opens[1:] |= lead[1:] // _LONG != lead[:-1] // _LONG
        starts[:] = False
        starts[begins[opens]] = True
        return starts

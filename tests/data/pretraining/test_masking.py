"""Masking: counts, rates, whole words and spans, and a random stream for each example."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelnroberta.data.pretraining.masking import SAMPLINGS, UNITS, Masking
from prelnroberta.data.pretraining.packing import Row
from prelnroberta.data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from prelnroberta.errors import InputError

V = 600
MASK_ID = V - 1
# Ids 4 .. 299 begin a word and 300 .. 598 go on with one.
WORD_STARTS = (np.arange(V) < 300) | (np.arange(V) == MASK_ID)


def text(generator, length):
    """Words of 1, 2, .. tokens, 1.7 on average."""
    starts = generator.random(length) < 0.6
    return np.where(
        starts, generator.integers(4, 300, length), generator.integers(300, 599, length)
    )


def row(length, seed=0, segment_sizes=None):
    """A row of segments `<s> text </s>` of the given sizes, padded to `length`."""
    generator = np.random.default_rng(seed)
    ids, segments, positions = (np.zeros(length, np.int32) for _ in range(3))
    ids[:] = positions[:] = PAD_ID
    at = 0
    for number, size in enumerate(segment_sizes or [length], 1):
        ids[at : at + size] = text(generator, size)
        ids[at], ids[at + size - 1] = BOS_ID, EOS_ID
        segments[at : at + size] = number
        positions[at : at + size] = PAD_ID + 1 + np.arange(size)
        at += size
    return Row(ids, segments, positions)


def make(**fields):
    return Masking(V, **{"word_start_mask": WORD_STARTS, **fields})


def chosen(masked):
    return masked["masked_positions"][masked["masked_weights"] > 0]


def eligible(example, sampling):
    real = example.segment_ids > 0
    special = (example.input_ids < 4) | (example.input_ids == MASK_ID)
    return real if sampling == "exact" else real & ~special


def words(example, positions):
    """Word number of each position, the slow way."""
    number, result = -1, {}
    ids, segments = example.input_ids, example.segment_ids
    for i in range(len(ids)):
        begins = i == 0 or ids[i] < 300 or ids[i - 1] < 4 or segments[i] != segments[i - 1]
        number += begins
        result[i] = number
    return [result[i] for i in positions]


ROWS = st.builds(
    lambda sizes, pad, seed: row(sum(sizes) + pad, seed, sizes),
    sizes=st.lists(st.integers(2, 60), min_size=1, max_size=6),
    pad=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
MASKINGS = st.builds(
    make,
    rate=st.sampled_from([0.01, 0.15, 0.4, 0.9]),
    sampling=st.sampled_from(SAMPLINGS),
    unit=st.sampled_from(UNITS),
)


@settings(max_examples=200, deadline=None)
@given(example=ROWS, masking=MASKINGS, epoch=st.integers(0, 5))
def test_masked_row_invariants(example, masking, epoch):
    before = example.input_ids.copy()
    masked = masking.apply(example, seed=3, epoch=epoch, row_index=7)
    slots = masking.max_masked_positions(len(before))
    for name, dtype in [("positions", np.int32), ("labels", np.int32), ("weights", np.float32)]:
        assert masked[f"masked_{name}"].shape == (slots,)
        assert masked[f"masked_{name}"].dtype == dtype
    weights = masked["masked_weights"]
    count = int(weights.sum())
    assert (weights[:count] == 1).all() and (weights[count:] == 0).all()
    assert (masked["masked_positions"][count:] == 0).all()
    positions = chosen(masked)
    assert (np.diff(positions) > 0).all(), "ascending, none twice"
    assert eligible(example, masking.sampling)[positions].all()
    np.testing.assert_array_equal(masked["masked_labels"][:count], before[positions])
    others = np.setdiff1d(np.arange(len(before)), positions)
    np.testing.assert_array_equal(masked["input_ids"][others], before[others])
    np.testing.assert_array_equal(example.input_ids, before, "the row itself is not touched")
    assert masked["input_ids"].dtype == np.int32
    np.testing.assert_array_equal(masked["segment_ids"], example.segment_ids)
    np.testing.assert_array_equal(masked["position_ids"], example.position_ids)
    again = masking.apply(example, seed=3, epoch=epoch, row_index=7)
    for name in masked:
        np.testing.assert_array_equal(masked[name], again[name])


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.4, 0.9])
@pytest.mark.parametrize("length", [3, 20, 128])
def test_exact_counts_are_floor_or_ceiling(rate, length):
    masking, example = make(rate=rate), row(length)
    counts = [len(chosen(masking.apply(example, 0, 0, i))) for i in range(4000)]
    assert set(counts) <= {math.floor(rate * length), math.ceil(rate * length)}
    spread = math.sqrt(0.25 / len(counts))
    assert np.mean(counts) == pytest.approx(rate * length, abs=5 * spread)
    assert masking.max_masked_positions(length) == math.ceil(rate * length)


def test_mask_count_of_packed_row_uses_real_tokens():
    example = row(100, segment_sizes=[20, 20])
    counts = [len(chosen(make(rate=0.25).apply(example, 0, 0, i))) for i in range(50)]
    assert set(counts) == {10}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("split", [(0.8, 0.1, 0.1), (1, 0, 0), (0, 0.5, 0.5)])
def test_rates_of_mask_keep_and_random_tokens(unit, split):
    masking = make(rate=0.4, unit=unit, **dict(zip(("mask", "random", "keep"), split, strict=True)))
    before, after = [], []
    for i in range(2200):
        example = row(128, seed=i % 50)
        masked = masking.apply(example, 0, 0, i)
        positions = chosen(masked)
        before.append(example.input_ids[positions])
        after.append(masked["input_ids"][positions])
    before, after = np.concatenate(before), np.concatenate(after)
    assert len(before) > 100_000
    replaced = (after != MASK_ID) & (after != before)
    assert np.mean(after == MASK_ID) == pytest.approx(split[0], abs=0.01)
    assert np.mean(replaced) == pytest.approx(split[1], abs=0.01)
    assert np.mean(after == before) == pytest.approx(split[2], abs=0.01)
    if not split[0]:
        assert not (after == MASK_ID).any(), "no random token is <mask>"
    if split[1]:
        drawn = after[replaced]
        counts = np.bincount(drawn, minlength=V)
        assert (counts[:4] == 0).all() and counts[MASK_ID] == 0
        ordinary = counts[4:MASK_ID]
        expected = ordinary.mean()
        chi2 = ((ordinary - expected) ** 2 / expected).sum()
        assert chi2 < len(ordinary) + 6 * math.sqrt(2 * len(ordinary)), "uniform"


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("rate", [0.01, 0.15, 0.4, 0.9])
def test_mask_rate_is_unbiased(unit, sampling, rate):
    """Mean share of chosen tokens, over rows of which half are packed, within 1 % of the rate.

    The bound widens to 4 standard errors where 1 % is less than chance allows.
    """
    masking = make(rate=rate, unit=unit, sampling=sampling)
    sizes = [[128], [50, 30, 40]]
    rows = [row(128, seed, sizes[seed % 2]) for seed in range(100)]
    totals = np.array([eligible(example, sampling).sum() for example in rows])
    repeats = 30
    counts = np.array(
        [
            [len(chosen(masking.apply(example, 0, epoch, i))) for i, example in enumerate(rows)]
            for epoch in range(repeats)
        ]
    )
    shares = counts.sum(1) / totals.sum()
    error = shares.std() / math.sqrt(repeats)
    assert shares.mean() == pytest.approx(rate, abs=max(0.01 * rate, 4 * error))
    assert error < 0.03 * rate or rate == 0.01, "the bound means something"


def test_every_position_is_masked_equally_often():
    """No position of a row is preferred: neither the ends of words nor those of the row."""
    for unit in UNITS:
        for sampling in SAMPLINGS:
            masking, example = make(rate=0.3, unit=unit, sampling=sampling), row(40, 5)
            n = 3000
            hits = sum(
                np.bincount(chosen(masking.apply(example, 0, 0, i)), minlength=40) for i in range(n)
            )
            shares = hits[eligible(example, sampling)] / n
            assert abs(shares - 0.3).max() < 4.5 * math.sqrt(0.3 * 0.7 / n), (unit, sampling)


def test_bernoulli_count_varies_and_exact_does_not():
    def spread(sampling):
        masking = make(rate=0.4, sampling=sampling)
        return np.std([len(chosen(masking.apply(row(128), 0, 0, i))) for i in range(2000)])

    assert spread("exact") < 0.5
    assert spread("bernoulli") == pytest.approx(math.sqrt(126 * 0.4 * 0.6), rel=0.1)


def test_exact_scheme_masks_special_tokens_like_fairseq():
    hits = [BOS_ID in make().apply(row(20), 0, 0, i)["masked_labels"][:1] for i in range(400)]
    assert 0 < sum(hits) < 400


@settings(max_examples=100, deadline=None)
@given(example=ROWS, sampling=st.sampled_from(SAMPLINGS), number=st.integers(0, 10))
def test_whole_words_are_masked_together(example, sampling, number):
    masking = make(rate=0.3, unit="word", sampling=sampling)
    masked = masking.apply(example, 0, 0, number)
    positions = chosen(masked)
    real = np.flatnonzero(example.segment_ids > 0)
    hidden = set(words(example, positions))
    whole = [i for i, word in zip(real, words(example, real), strict=True) if word in hidden]
    assert positions.tolist() == whole
    shown = masked["input_ids"][positions] == MASK_ID
    for word in hidden:
        assert (
            len(
                {
                    bool(m)
                    for m, w in zip(shown, words(example, positions), strict=True)
                    if w == word
                }
            )
            == 1
        )


def runs(positions):
    return np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)


def test_spans_are_runs_of_whole_words_inside_a_segment():
    """At a low rate a row holds one span at most, which shows the spans themselves."""
    masking = make(rate=0.02, unit="span", sampling="bernoulli")
    lengths = []
    for i in range(4000):
        example = row(240, i % 40, [100, 140])
        positions = chosen(masking.apply(example, 1, 0, i))
        if not len(positions):
            continue
        numbers = words(example, np.arange(240))
        hidden = {numbers[i] for i in positions}
        assert positions.tolist() == [i for i in range(240) if numbers[i] in hidden], "whole words"
        for run in runs(positions):
            assert len(set(example.segment_ids[run])) == 1
        if len(runs(positions)) == 1:
            lengths.append(len(hidden))
    lengths = np.array(lengths)
    law = 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)
    seen = np.bincount(lengths[lengths <= 10], minlength=11)[1:] / len(lengths)
    # The ends of segments cut some spans, and two that touch read as one.
    assert abs(seen - law).max() < 0.05
    assert lengths.mean() == pytest.approx(3.8, rel=0.1)


def test_text_without_spaces_is_not_one_word():
    """Scripts without spaces, and ruled lines: a word ends after 24 tokens."""
    example = row(128)
    example.input_ids[1:-1] = 400
    for unit in ("word", "span"):
        masking = make(rate=0.15, unit=unit)
        counts = [len(chosen(masking.apply(example, 0, 0, i))) for i in range(2000)]
        assert 0 < max(counts) < 127
        assert np.mean(counts) == pytest.approx(0.15 * 128, rel=0.1)


@pytest.mark.parametrize("unit", UNITS)
def test_overflow_keeps_a_random_subset_of_whole_units(unit):
    masking, example = make(rate=0.5, unit=unit, sampling="bernoulli"), row(64)

    def decide(slots, number):
        stream = np.random.Generator(np.random.Philox(key=number))
        return masking.choose_positions(example, slots, stream)

    hits = np.zeros(64)
    for number in range(3000):
        every, every_action = decide(64, number)
        kept, kept_action = decide(12, number)
        assert len(kept) <= 12 and np.isin(kept, every).all()
        np.testing.assert_array_equal(kept_action, every_action[np.isin(every, kept)])
        if unit == "token":
            assert len(kept) == min(12, len(every))
            hits[kept] += 1
        else:
            numbers, hidden = words(example, np.arange(64)), set(words(example, kept))
            assert kept.tolist() == [i for i in range(64) if numbers[i] in hidden]
    if unit == "token":
        shares = hits[1:-1] / 3000
        assert abs(shares - 12 / 62).max() < 5 * math.sqrt(0.2 * 0.8 / 3000), "none preferred"


def test_random_stream_depends_only_on_seed_epoch_and_example():
    masking, example = make(), row(128)
    picks = {
        (seed, epoch, number): tuple(chosen(masking.apply(example, seed, epoch, number)))
        for seed in range(4)
        for epoch in range(4)
        for number in range(4)
    }
    assert len(set(picks.values())) == len(picks)
    np.random.seed(0)
    np.random.random(5)
    for key in reversed(picks):
        assert tuple(chosen(masking.apply(example, *key))) == picks[key]


def test_random_streams_of_neighbouring_examples_are_independent():
    """The overlap of two examples' choices is what chance gives."""
    masking, example = make(rate=0.4), row(128)
    masks = np.zeros((400, 128))
    for number in range(400):
        masks[number, chosen(masking.apply(example, 0, number // 200, number % 200))] = 1
    for lag in (1, 2, 200):
        overlap = (masks[lag:] * masks[:-lag]).mean()
        assert overlap == pytest.approx(0.16, abs=0.01)


def test_random_stream_values_are_pinned():
    """A change of these numbers changes every run's data: it must be meant."""
    masked = make(rate=0.15).apply(row(40), seed=1, epoch=2, row_index=3)
    assert chosen(masked).tolist() == [3, 8, 9, 11, 32, 35]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 0.0}, r"rate=0\.0"),
        ({"rate": 1.0}, r"rate=1\.0"),
        ({"rate": 1.5}, r"rate=1\.5"),
        ({"rate": -0.1}, r"rate=-0\.1"),
        ({"rate": math.nan}, "rate=nan"),
        ({"sampling": "poisson"}, "sampling='poisson'"),
        ({"unit": "line"}, "unit='line'"),
        ({"mask": 0.9}, r"mask=0\.9.*sum to 1"),
        ({"mask": 1.2, "random": -0.2, "keep": 0.0}, r"random=-0\.2"),
        ({"mask": math.nan}, "mask=nan"),
        ({"unit": "word", "word_start_mask": None}, "word_start_mask"),
        ({"unit": "span", "word_start_mask": np.ones(7, bool)}, r"\(7,\)"),
        ({"vocab_size": 5}, "vocab_size=5"),
    ],
)
def test_bad_fields_raise(fields, message):
    with pytest.raises(InputError, match=message):
        Masking(**{"vocab_size": V, "word_start_mask": WORD_STARTS, **fields})

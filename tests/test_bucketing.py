"""Length buckets: few shapes, nothing lost, an order that follows from the seed and the step."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prelnroberta
from prelnroberta import heads
from prelnroberta.data.bucketing import (
    IGNORE,
    NOTHING,
    TrainingBatches,
    bucket_lengths,
    bucket_of,
    evaluation_batches,
    padded,
)
from prelnroberta.errors import InputError


class Rows:
    """Features whose batches say which examples they hold."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)

    def batch(self, indices, length):
        real = indices != NOTHING
        assert (self.lengths[indices[real]] <= length).all(), "an example longer than its row"
        return {"index": indices, "length": np.full(len(indices), length), "weights": real}


def ragged(n, seed=0):
    return Rows(np.random.default_rng(seed).geometric(0.05, n).clip(2, 120))


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def positions(lengths, buckets):
    return sum(bucket_of(length, buckets) for length in lengths)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.sampled_from([1, 4, 8]))
def test_buckets_are_the_best_there_are(lengths, count, multiple):
    found = bucket_lengths(np.array(lengths), count, multiple)
    assert list(found) == sorted(set(found)) and 1 <= len(found) <= count
    assert all(bucket % multiple == 0 for bucket in found[:-1])
    longest = max(lengths)
    assert max(longest, multiple) == found[-1] or found[-1] % multiple == 0
    sizes = sorted({-(-length // multiple) * multiple for length in lengths})
    best = min(
        positions(lengths, (*shorter, sizes[-1]))
        for k in range(count)
        for shorter in itertools.combinations(sizes[:-1], min(k, len(sizes) - 1))
    )
    assert positions(lengths, found) <= best


def test_buckets_stay_within_what_there_is():
    """A model of 510 positions gets rows of 510, not of 512."""
    assert bucket_lengths(np.array([510, 3]), 2) == (8, 510)
    assert bucket_lengths(np.array([5]), 6) == (8,)
    with pytest.raises(InputError, match="no examples"):
        bucket_lengths(np.array([], int))
    with pytest.raises(InputError, match="131 tokens is longer than the longest of"):
        bucket_of(131, (64, 128))


@pytest.mark.parametrize("pool", [1, 3, 50])
@pytest.mark.parametrize("n", [1, 7, 64, 101])
def test_an_epoch_is_every_example_once(n, pool):
    features = ragged(n)
    buckets = bucket_lengths(features.lengths)
    loader = TrainingBatches(features, 8, seed=5, buckets=buckets, pool=pool)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        batches = [loader.batch(step) for step in steps]
        assert {len(batch["index"]) for batch in batches} == {8}
        assert {int(batch["length"][0]) for batch in batches} <= set(buckets)
        seen = np.concatenate([batch["index"][batch["weights"]] for batch in batches])
        assert sorted(seen.tolist()) == list(range(n))
        assert sum(not batch["weights"].all() for batch in batches) == (n % 8 > 0)
        epochs.append(seen.tolist())
    if n > 7:
        assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_follows_from_seed_and_step_alone():
    features = ragged(203)
    buckets = bucket_lengths(features.lengths)

    def loader(seed):
        return TrainingBatches(features, 8, seed, buckets, pool=4)

    through = [loader(1).batch(step) for step in range(60)]
    for step in (37, 5, 59):  # a resumed run begins anywhere
        for name, array in loader(1).batch(step).items():
            np.testing.assert_array_equal(array, through[step][name])
    assert any((loader(2).indices(s) != through[s]["index"]).any() for s in range(60))
    with loader(1).prefetch(37) as ahead:
        for step in range(37, 42):
            np.testing.assert_array_equal(next(ahead)["index"], through[step]["index"])


def test_hosts_share_a_batch_without_overlap_and_in_one_shape():
    loader = TrainingBatches(ragged(61), 8, 0, (32, 64, 120), pool=2)
    for step in range(20):
        whole = loader.batch(step)
        parts = [loader.batch(step, slice(4 * host, 4 * host + 4)) for host in range(2)]
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_pools_save_padding_and_still_shuffle():
    features = ragged(2000)
    buckets = bucket_lengths(features.lengths)

    def run(pool):
        loader = TrainingBatches(features, 16, 0, buckets, pool)
        return [loader.batch(step) for step in range(loader.steps_per_epoch)]

    def cost(batches):
        return sum(int(batch["length"].sum()) for batch in batches)

    pooled, plain = run(50), run(1)
    assert cost(pooled) < 0.6 * cost(plain)
    assert cost(pooled) < 1.45 * features.lengths.sum()
    lengths = [int(batch["length"][0]) for batch in pooled]
    assert np.mean(np.diff(lengths[:50]) < 0) > 0.2, "not from the shortest to the longest"
    # A pool is a random draw: the first holds examples from all over the file.
    first = np.concatenate([batch["index"] for batch in pooled[:50]])
    assert first.min() < 50 and first.max() > 1950


def test_every_pool_and_epoch_turns_its_batches_differently():
    features = Rows(np.arange(1, 161))
    loader = TrainingBatches(features, 2, 0, (160,), pool=40)

    def turns(pool):  # the pool's batches, as places in the order of their lengths
        steps = range(40 * pool, 40 * pool + 40)
        return np.argsort([features.lengths[loader.indices(step)].sum() for step in steps]).tolist()

    orders = [turns(pool) for pool in range(4)]  # two epochs of two pools
    assert len({tuple(order) for order in orders}) == 4


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 300), st.integers(1, 3))
def test_evaluation_asks_for_every_row_once(lengths, count, tokens, multiple):
    features = Rows(lengths)
    buckets = bucket_lengths(features.lengths, count)
    shapes = set()
    found = []
    fillers = 0
    for indices, batch in evaluation_batches(features, buckets, tokens, multiple):
        length = int(batch["length"][0])
        assert len(indices) % multiple == 0 and len(indices) > 0
        assert len(indices) == multiple or len(indices) * length <= tokens
        assert (len(indices) + multiple) * length > tokens, "as many as there may be"
        shapes.add((len(indices), length))
        fillers += int((indices == NOTHING).any())
        found += indices[indices != NOTHING].tolist()
    assert len(shapes) <= len(buckets), "one program a bucket"
    assert fillers <= 1, "one batch at most is filled up"
    assert sorted(found) == list(range(len(lengths)))


def test_bad_loader_settings():
    features = ragged(10)
    for change in ({"batch_size": 0}, {"seed": -1}, {"pool": 0}, {"buckets": (8,)}):
        given = {"batch_size": 2, "seed": 0, "buckets": (120,), "pool": 1} | change
        with pytest.raises(InputError):
            TrainingBatches(features, **given)
    with pytest.raises(InputError, match="no examples to train on"):
        TrainingBatches(Rows([]), 2, 0, (8,))
    assert list(evaluation_batches(Rows([]), (8,), 64)) == []


def test_padding():
    rows = [np.array([1, 2]), np.array([3])]
    expected = [[3, 9, 9], [9, 9, 9], [1, 2, 9]]
    assert padded(rows, np.array([1, NOTHING, 0]), 3, 9).tolist() == expected


def test_data_and_metrics_load_no_jax():
    """Whoever prepares data needs numpy and tokenizers; the ignored label is one all the same."""
    package = Path(prelnroberta.__file__).parent
    names = [f"prelnroberta.data.{path.stem}" for path in package.glob("data/[a-z]*.py")]
    names += [f"prelnroberta.{name}_metrics" for name in ("task", "entity", "squad")]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += "print(sorted({'jax', 'flax', 'tokenizers', 'scipy', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert heads.IGNORE == IGNORE

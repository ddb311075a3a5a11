"""Loader: each row once an epoch, and a batch that is a function of its step alone."""

import threading
import time
from collections import Counter

import numpy as np
import pytest

from prelnroberta.data.pretraining.loader import Loader, evaluation_batches
from prelnroberta.data.pretraining.masking import Masking
from prelnroberta.data.pretraining.packing import Row
from prelnroberta.data.shuffle import Prefetch, permute
from prelnroberta.errors import InputError

LENGTH = 12
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 63, 64, 65, 100, 255, 256, 257, 1000, 4097]


class Rows:
    """n rows that carry their index in position 1, and ordinary text behind it."""

    fill = 1.0

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        assert 0 <= index < self.n
        ids = np.full(LENGTH, 5, np.int32)
        ids[0], ids[1] = 0, 10_000 + index
        return Row(ids, np.ones(LENGTH, np.int32), np.arange(2, 2 + LENGTH, dtype=np.int32))


def loader(n, batch_size, seed=0):
    return Loader(Rows(n), Masking(50_000, rate=0.3), batch_size, seed)


def indices(batch):
    """The rows' indices, put back where they were masked."""
    ids = batch["input_ids"].copy()
    for i in range(len(ids)):
        scored = batch["masked_weights"][i] > 0
        ids[i, batch["masked_positions"][i, scored]] = batch["masked_labels"][i, scored]
    return (ids[:, 1] - 10_000).tolist()


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
        assert one[name].dtype == two[name].dtype


@pytest.mark.parametrize("n", SIZES)
def test_permutation_is_one(n):
    for epoch in range(3):
        image = permute(np.arange(n), n, seed=1, epoch=epoch)
        assert image.dtype == np.int64
        assert sorted(image.tolist()) == list(range(n))


def test_permutation_of_any_part_is_that_part():
    whole = permute(np.arange(1000), 1000, 5, 2)
    picked = np.array([999, 0, 17, 500])
    np.testing.assert_array_equal(permute(picked, 1000, 5, 2), whole[picked])
    assert len(permute(np.array([], np.int64), 1000, 5, 2)) == 0
    huge = permute(np.arange(100), 10**12, 5, 2)
    assert len(set(huge.tolist())) == 100
    assert ((huge >= 0) & (huge < 10**12)).all()


def test_permutation_is_pinned():
    """A change of these numbers changes every run's data: it must be meant."""
    assert permute(np.arange(5), 1000, seed=1, epoch=2).tolist() == [387, 0, 390, 553, 329]


def test_permutations_differ_between_epochs_and_seeds():
    orders = {
        tuple(permute(np.arange(1000), 1000, seed, epoch))
        for seed in range(8)
        for epoch in range(8)
    }
    assert len(orders) == 64


@pytest.mark.parametrize("n", [2, 3, 7, 20, 70])
def test_permutation_is_unbiased(n):
    """Over epochs, every row is as likely at every place, and neighbours do not stay together."""
    epochs = 1500
    images = np.array([permute(np.arange(n), n, 0, epoch) for epoch in range(epochs)])
    counts = np.array([np.bincount(images[:, place], minlength=n) for place in range(n)])
    expected = epochs / n
    chi2 = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert abs(chi2 - freedom) < 6 * np.sqrt(2 * freedom) + 6
    if n >= 20:
        together = np.mean(np.abs(np.diff(images, axis=1)) == 1)
        assert together == pytest.approx(2 / n, rel=0.15)


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (1, 3), (2, 3), (7, 3), (7, 20), (1000, 32)])
def test_each_row_once_an_epoch(n, batch_size):
    data = loader(n, batch_size)
    epochs = 3
    steps = -(-epochs * n // batch_size)
    seen = [index for step in range(steps) for index in indices(data.batch(step))]
    orders = []
    for epoch in range(epochs):
        order = seen[epoch * n : (epoch + 1) * n]
        assert Counter(order) == Counter(range(n))
        orders.append(tuple(order))
    if n >= 7:
        assert len(set(orders)) == epochs


def test_batch_shapes_and_types():
    data = loader(10, 4)
    batch = data.batch(3)
    slots = data.masking.slots(LENGTH)
    for name in ("input_ids", "segment_ids", "position_ids"):
        assert batch.pop(name).shape == (4, LENGTH)
    for name in ("masked_positions", "masked_labels"):
        assert batch[name].shape == (4, slots) and batch.pop(name).dtype == np.int32
    assert batch["masked_weights"].dtype == np.float32 and batch.pop("masked_weights").any()
    assert not batch


def test_batch_is_a_function_of_the_step():
    forward, backward = loader(50, 8), loader(50, 8)
    batches = {step: forward.batch(step) for step in range(20)}
    for step in reversed(range(20)):
        assert_same(batches[step], backward.batch(step))


def test_rows_are_masked_by_seed_epoch_and_index():
    data = loader(5, 4, seed=9)
    batch = data.batch(3)  # examples 12 to 15: the end of epoch 2 and one of epoch 3
    for i, (epoch, index) in enumerate(zip([2, 2, 2, 3], indices(batch), strict=True)):
        expected = data.masking.apply(data.source[index], 9, epoch, index)
        assert_same(expected, {name: batch[name][i] for name in batch})


def test_masks_are_new_each_epoch():
    data = loader(1, 1)
    picks = {tuple(data.batch(step)["masked_positions"][0]) for step in range(20)}
    assert len(picks) > 10


def test_masks_belong_to_the_row_not_to_its_place_in_a_batch():
    """Another batch size, with the same seed, shows each row of an epoch under the same mask."""

    def shown(batch_size):
        data, found = loader(60, batch_size), {}
        for step in range(60 // batch_size):
            batch = data.batch(step)
            for i, index in enumerate(indices(batch)):
                found[index] = batch["masked_positions"][i].tolist()
        return found

    assert shown(4) == shown(15)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_parts_of_a_batch_make_the_whole(hosts):
    data = loader(21, 8)
    share = 8 // hosts
    for step in (0, 2, 5):
        parts = [data.batch(step, slice(h * share, (h + 1) * share)) for h in range(hosts)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert_same(joined, data.batch(step))


def test_evaluation_shows_each_row_once_in_order_and_the_same_each_time():
    source, masking = Rows(10), Masking(50_000, rate=0.3)
    one, two = (list(evaluation_batches(source, masking, 4, seed=0)) for _ in range(2))
    assert len(one) == 3
    for left, right in zip(one, two, strict=True):
        assert left["input_ids"].shape == (4, LENGTH)
        assert_same(left, right)
    assert [index for batch in one for index in indices(batch)][:10] == list(range(10))
    assert (one[-1]["masked_weights"][2:] == 0).all()
    assert all(batch["masked_weights"][i].any() for batch in one[:2] for i in range(4))
    halves = [list(evaluation_batches(source, masking, 4, 0, slice(h, h + 2))) for h in (0, 2)]
    for whole, *parts in zip(one, *halves, strict=True):
        assert_same(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


def alive():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_gives_what_batch_gives_and_ends():
    data = loader(50, 8)
    with data.prefetch(5) as ahead:
        for step, batch in zip(range(5, 25), ahead, strict=False):
            assert_same(batch, data.batch(step))
        assert alive()
    assert not alive()
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()  # twice is once


def test_prefetch_gives_a_host_its_rows():
    data = loader(50, 8)
    with data.prefetch(0, rows=slice(2, 4)) as ahead:
        assert_same(next(ahead), data.batch(0, slice(2, 4)))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_runs_ahead_by_its_depth_and_no_more(depth):
    made = []
    with Prefetch(lambda step: made.append(step) or {"step": step}, 0, depth) as ahead:
        deadline = time.monotonic() + 5
        while len(made) < depth + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == depth + 1  # `depth` wait in the queue, one in the thread's hands
        assert next(ahead) == {"step": 0}


def test_prefetch_raises_the_threads_error_at_its_place():
    def make(step):
        if step == 3:
            raise OSError("disk gone")
        return {"step": step}

    ahead = Prefetch(make, 0)
    assert [next(ahead)["step"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)
    assert not alive()
    with pytest.raises(StopIteration):
        next(ahead)


def test_closing_early_ends_the_thread():
    for _ in range(20):
        loader(50, 8).prefetch(0).close()
    ahead = Prefetch(lambda step: time.sleep(0.05), 0)  # closed in the midst of its work
    ahead.close()
    assert not alive()


@pytest.mark.parametrize(
    ("batch_size", "seed", "message"), [(0, 0, "batch size=0"), (4, -1, "seed=-1")]
)
def test_bad_arguments_are_named(batch_size, seed, message):
    with pytest.raises(InputError, match=message):
        loader(10, batch_size, seed)

"""The pretraining loader: each row once an epoch, and batches that depend on the step only."""

import time
from collections import Counter

import numpy as np
import pytest

from prelnroberta.data.pretraining.loader import Loader, masked_eval_batches
from prelnroberta.data.pretraining.masking import Masking
from prelnroberta.data.pretraining.packing import Row
from prelnroberta.data.shuffle import Prefetch
from prelnroberta.errors import InputError
from tests.helpers.threads import is_prefetch_thread_alive

LENGTH = 12


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


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (1, 3), (2, 3), (7, 3), (7, 20), (1000, 32)])
def test_epoch_holds_each_row_once(n, batch_size):
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
    slots = data.masking.max_masked_positions(LENGTH)
    for name in ("input_ids", "segment_ids", "position_ids"):
        assert batch.pop(name).shape == (4, LENGTH)
    for name in ("masked_positions", "masked_labels"):
        assert batch[name].shape == (4, slots) and batch.pop(name).dtype == np.int32
    assert batch["masked_weights"].dtype == np.float32 and batch.pop("masked_weights").any()
    assert not batch


def test_batch_depends_only_on_step():
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


def test_masks_differ_between_epochs():
    data = loader(1, 1)
    picks = {tuple(data.batch(step)["masked_positions"][0]) for step in range(20)}
    assert len(picks) > 10


def test_masks_do_not_depend_on_position_in_batch():
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
def test_parts_of_a_batch_concatenate_to_the_batch(hosts):
    data = loader(21, 8)
    share = 8 // hosts
    for step in (0, 2, 5):
        parts = [data.batch(step, slice(h * share, (h + 1) * share)) for h in range(hosts)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert_same(joined, data.batch(step))


def test_eval_batches_are_ordered_complete_and_deterministic():
    source, masking = Rows(10), Masking(50_000, rate=0.3)
    one, two = (list(masked_eval_batches(source, masking, 4, seed=0)) for _ in range(2))
    assert len(one) == 3
    for left, right in zip(one, two, strict=True):
        assert left["input_ids"].shape == (4, LENGTH)
        assert_same(left, right)
    assert [index for batch in one for index in indices(batch)][:10] == list(range(10))
    assert (one[-1]["masked_weights"][2:] == 0).all()
    assert all(batch["masked_weights"][i].any() for batch in one[:2] for i in range(4))
    halves = [list(masked_eval_batches(source, masking, 4, 0, slice(h, h + 2))) for h in (0, 2)]
    for whole, *parts in zip(one, *halves, strict=True):
        assert_same(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


def test_prefetch_matches_batch_and_ends():
    data = loader(50, 8)
    with data.prefetch(5) as ahead:
        for step, batch in zip(range(5, 25), ahead, strict=False):
            assert_same(batch, data.batch(step))
        assert is_prefetch_thread_alive()
    assert not is_prefetch_thread_alive()
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()  # twice is once


def test_prefetch_of_host_rows():
    data = loader(50, 8)
    with data.prefetch(0, rows=slice(2, 4)) as ahead:
        assert_same(next(ahead), data.batch(0, slice(2, 4)))


def test_closing_prefetch_early_ends_its_thread():
    for _ in range(20):
        loader(50, 8).prefetch(0).close()
    ahead = Prefetch(lambda step: time.sleep(0.05), 0)  # closed in the midst of its work
    ahead.close()
    assert not is_prefetch_thread_alive()


@pytest.mark.parametrize(
    ("batch_size", "seed", "message"), [(0, 0, "batch size=0"), (4, -1, "seed=-1")]
)
def test_bad_arguments_raise(batch_size, seed, message):
    with pytest.raises(InputError, match=message):
        loader(10, batch_size, seed)

"""Permutations by index and prefetching in a thread."""

import time

import numpy as np
import pytest

from prelnroberta.data.shuffle import Prefetch, permute
from tests.helpers.threads import is_prefetch_thread_alive

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 63, 64, 65, 100, 255, 256, 257, 1000, 4097]


@pytest.mark.parametrize("n", SIZES)
def test_permute_is_a_permutation(n):
    for epoch in range(3):
        image = permute(np.arange(n), n, seed=1, epoch=epoch)
        assert image.dtype == np.int64
        assert sorted(image.tolist()) == list(range(n))


def test_permute_of_some_indices_matches_permute_of_all():
    whole = permute(np.arange(1000), 1000, 5, 2)
    picked = np.array([999, 0, 17, 500])
    np.testing.assert_array_equal(permute(picked, 1000, 5, 2), whole[picked])
    assert len(permute(np.array([], np.int64), 1000, 5, 2)) == 0
    huge = permute(np.arange(100), 10**12, 5, 2)
    assert len(set(huge.tolist())) == 100
    assert ((huge >= 0) & (huge < 10**12)).all()


def test_permutation_values_are_pinned():
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


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_runs_ahead_by_its_depth_only(depth):
    made = []
    with Prefetch(lambda step: made.append(step) or {"step": step}, 0, depth) as ahead:
        deadline = time.monotonic() + 5
        while len(made) < depth + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == depth + 1  # `depth` wait in the queue, one in the thread's hands
        assert next(ahead) == {"step": 0}


def test_prefetch_reraises_thread_error_in_order():
    def make(step):
        if step == 3:
            raise OSError("disk gone")
        return {"step": step}

    ahead = Prefetch(make, 0)
    assert [next(ahead)["step"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)
    assert not is_prefetch_thread_alive()
    with pytest.raises(StopIteration):
        next(ahead)

"""Length buckets: few shapes, minimal padding, every row once."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prelnroberta
from prelnroberta.data.batches.buckets import bucket_lengths, bucketed_eval_batches, find_bucket
from prelnroberta.data.features.base import PADDING_INDEX, pad_rows
from prelnroberta.errors import InputError


class Rows:
    """Features whose batches say which examples they hold."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)

    def batch(self, indices, length):
        real = indices != PADDING_INDEX
        assert (self.lengths[indices[real]] <= length).all(), "an example longer than its row"
        return {"index": indices, "length": np.full(len(indices), length), "weights": real}


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def positions(lengths, buckets):
    return sum(find_bucket(length, buckets) for length in lengths)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.sampled_from([1, 4, 8]))
def test_bucket_lengths_minimize_padding(lengths, count, multiple):
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


def test_bucket_lengths_stay_within_longest_example():
    """A model of 510 positions gets rows of 510, not of 512."""
    assert bucket_lengths(np.array([510, 3]), 2) == (8, 510)
    assert bucket_lengths(np.array([5]), 6) == (8,)
    with pytest.raises(InputError, match="no examples"):
        bucket_lengths(np.array([], int))
    with pytest.raises(InputError, match="131 tokens is longer than the longest of"):
        find_bucket(131, (64, 128))


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 300), st.integers(1, 3))
def test_bucketed_batches_hold_every_row_once(lengths, count, tokens, multiple):
    features = Rows(lengths)
    buckets = bucket_lengths(features.lengths, count)
    shapes = set()
    found = []
    fillers = 0
    for indices, batch in bucketed_eval_batches(features, buckets, tokens, multiple):
        length = int(batch["length"][0])
        assert len(indices) % multiple == 0 and len(indices) > 0
        assert len(indices) == multiple or len(indices) * length <= tokens
        assert (len(indices) + multiple) * length > tokens, "as many as there may be"
        shapes.add((len(indices), length))
        fillers += int((indices == PADDING_INDEX).any())
        found += indices[indices != PADDING_INDEX].tolist()
    assert len(shapes) <= len(buckets), "one program a bucket"
    assert fillers <= 1, "one batch at most is filled up"
    assert sorted(found) == list(range(len(lengths)))


def test_bucketed_batches_of_no_rows():
    assert list(bucketed_eval_batches(Rows([]), (8,), 64)) == []


def test_padded_rows():
    rows = [np.array([1, 2]), np.array([3])]
    expected = [[3, 9, 9], [9, 9, 9], [1, 2, 9]]
    assert pad_rows(rows, np.array([1, PADDING_INDEX, 0]), 3, 9).tolist() == expected


def test_data_and_metrics_load_no_jax():
    """Preparing data needs numpy and tokenizers only."""
    package = Path(prelnroberta.__file__).parent
    files = [*package.glob("data/**/[a-z]*.py")]
    files += [
        package / "metrics" / f"{name}.py" for name in ("classification", "entities", "squad")
    ]
    names = [str(f.relative_to(package.parent).with_suffix("")).replace("/", ".") for f in files]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += "print(sorted({'jax', 'flax', 'tokenizers', 'scipy', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

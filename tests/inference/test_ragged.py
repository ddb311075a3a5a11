"""Packing a batch of sequences: every token once, and the same vectors as for single sequences."""

import jax
import numpy as np
import pytest

from prelnroberta import FlaxRobertaPreLayerNormModel
from prelnroberta.errors import InputError
from prelnroberta.inference.ragged import pack_sequences
from tests.helpers.small_models import TINY, random_params
from tests.helpers.tolerances import assert_close


def some_sequences(rng: np.random.Generator, n: int, longest: int) -> list[np.ndarray]:
    return [rng.integers(4, 500, size) for size in rng.integers(1, longest + 1, n)]


@pytest.mark.parametrize("seed", range(20))
def test_split_returns_packed_sequences_in_order(seed):
    rng = np.random.default_rng(seed)
    sequences = some_sequences(rng, 40, 16)
    packed = pack_sequences(sequences, 16)
    for found, given in zip(packed.unpack(packed.inputs["input_ids"]), sequences, strict=True):
        np.testing.assert_array_equal(found, given)
    for positions in packed.unpack(packed.inputs["position_ids"]):
        np.testing.assert_array_equal(positions, 2 + np.arange(len(positions)))
    for segments in packed.unpack(packed.inputs["segment_ids"]):
        assert len(set(segments)) == 1 and segments[0] > 0
    assert (packed.inputs["segment_ids"] > 0).sum() == sum(map(len, sequences))
    np.testing.assert_array_equal(
        packed.pack_values(sequences, 1, np.int32), packed.inputs["input_ids"]
    )
    # No two rows could have been one: best fit leaves at most one row half empty.
    filled = np.sort((packed.inputs["segment_ids"] > 0).sum(1))
    assert len(filled) == 1 or filled[0] + filled[1] > 16


def test_number_of_rows_is_padded_to_multiple():
    packed = pack_sequences([[5, 6], [7, 8, 9]], 3, pad_token_id=3, row_multiple=4)
    assert packed.inputs["input_ids"].shape == (4, 3)
    np.testing.assert_array_equal(packed.inputs["input_ids"][2:], 3)
    np.testing.assert_array_equal(packed.inputs["position_ids"][2:], 3)
    np.testing.assert_array_equal(packed.inputs["segment_ids"][2:], 0)


def test_packed_vectors_match_single_sequences():
    model = FlaxRobertaPreLayerNormModel(TINY, _do_init=False)
    params = jax.tree.map(jax.numpy.asarray, random_params(TINY, "base"))
    sequences = some_sequences(np.random.default_rng(3), 9, 12)
    packed = pack_sequences(sequences, 24)
    vectors = packed.unpack(model(**packed.inputs, params=params).last_hidden_state)
    rows = np.full((9, 12), TINY.pad_token_id)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    alone = np.asarray(model(rows, rows != TINY.pad_token_id, params=params).last_hidden_state)
    for found, row, sequence in zip(vectors, alone, sequences, strict=True):
        assert_close(found, row[: len(sequence)], "packed")


def test_sequences_that_fit_no_row_raise():
    with pytest.raises(InputError, match="sequence 1 has 4 tokens, expected 1 to 3"):
        pack_sequences([[1], [1, 2, 3, 4]], 3)
    with pytest.raises(InputError, match="sequence 0 has 0 tokens"):
        pack_sequences([[]], 3)

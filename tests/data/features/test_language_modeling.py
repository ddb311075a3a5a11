"""Blocks of a token stream, against transformers' group_texts."""

import numpy as np
import pytest

from prelnroberta.config import IGNORE_INDEX
from prelnroberta.data.features.language_modeling import TokenBlocks, token_stream
from prelnroberta.data.pretraining.loader import Loader
from prelnroberta.data.pretraining.masking import Masking
from prelnroberta.data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from prelnroberta.errors import InputError
from tests.helpers.random_texts import random_text


@pytest.mark.oracle
def test_blocks_match_transformers_group_texts(tokenizer, theirs):
    rng = np.random.default_rng(5)
    documents = [random_text(rng, 40) for _ in range(120)]
    documents = [document for document in documents if document.strip()]
    stream = token_stream([*documents, "", " \n"], tokenizer)
    flat = [i for ids in theirs(documents)["input_ids"] for i in ids]
    assert stream.tolist() == flat
    blocks = TokenBlocks(stream, 32)
    expected = [flat[i : i + 32] for i in range(0, len(flat), 32)]
    assert len(blocks) == len(expected)
    batch = blocks.batch(np.arange(len(blocks)), 32)
    for row, ids in zip(range(len(blocks)), expected, strict=True):
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        # Labels are the ids, unshifted; the first token of a row has none.
        assert batch["labels"][row, : len(ids)].tolist() == [IGNORE_INDEX, *ids[1:]]
        assert (batch["labels"][row, len(ids) :] == IGNORE_INDEX).all()
    np.testing.assert_array_equal(batch["attention_mask"], batch["input_ids"] != PAD_ID)


@pytest.mark.parametrize("overlap", [1, 2, 7, 15])
def test_overlapping_blocks_label_every_token_once(overlap):
    for size in range(2, 70):
        stream = np.arange(4, 4 + size, dtype=np.int32)
        blocks = TokenBlocks(stream, 16, overlap)
        indices = np.array([*range(len(blocks)), -1])
        batch = blocks.batch(indices, 16)
        asked = batch["labels"][:, 1:]  # the shift
        assert sorted(asked[asked != IGNORE_INDEX].tolist()) == stream[1:].tolist()
        context = np.flatnonzero((asked != IGNORE_INDEX).any(axis=1))
        assert len(context) == len(blocks), "no row without a question"
        assert (batch["labels"][-1] == IGNORE_INDEX).all() and batch["weights"][-1] == 0
        for row in range(1, len(blocks)):
            first = np.flatnonzero(asked[row] != IGNORE_INDEX)[0] + 1
            assert first == overlap, "at least that much context"


def test_blocks_feed_the_masking_loader(tokenizer):
    stream = token_stream(["one two three " * 30, "four " * 11], tokenizer)
    blocks = TokenBlocks(stream, 24)
    loader = Loader(blocks, Masking(tokenizer.get_vocab_size(), 0.3, "bernoulli"), 4, seed=0)
    batch = loader.batch(3)
    real = batch["segment_ids"] > 0
    np.testing.assert_array_equal(batch["position_ids"] > PAD_ID, real)
    rows = np.arange(4)[:, None]
    scored = batch["masked_weights"] > 0
    assert scored.any() and (batch["masked_labels"][scored] > EOS_ID).all(), "no special is asked"
    restored = batch["input_ids"].copy()
    restored[np.broadcast_to(rows, scored.shape)[scored], batch["masked_positions"][scored]] = (
        batch["masked_labels"][scored]
    )
    wanted = {blocks[i].input_ids.tobytes() for i in range(len(blocks))}
    assert all(row.tobytes() in wanted for row in restored)
    assert 0.9 < blocks.fill_ratio <= 1 and stream[0] == BOS_ID
    for length, overlap in ((1, 0), (8, 8), (8, -1)):
        with pytest.raises(InputError, match="rows of"):
            TokenBlocks(stream, length, overlap)
    with pytest.raises(InputError, match="no text"):
        token_stream([" ", ""], tokenizer)

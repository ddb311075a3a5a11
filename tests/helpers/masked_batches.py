"""Batches of masked rows for a one-layer masked language model."""

import numpy as np

from prelnroberta.config import RobertaPreLayerNormConfig
from tests.helpers.small_models import ragged_batch

# One layer: these tests compile more than they compute.
ONE_LAYER = RobertaPreLayerNormConfig.preset("tiny", num_hidden_layers=1, vocab_size=64)


def masked_batch(B=8, L=16, M=6, seed=0, empty=()):
    """Rows whose masks differ in number: row i has i % M + 1, those of `empty` none."""
    rng = np.random.default_rng(seed)
    counts = np.array([0 if i in empty else i % M + 1 for i in range(B)])
    positions = np.stack([np.sort(rng.choice(L, M, replace=False)) for _ in range(B)])
    return {
        "input_ids": ragged_batch(ONE_LAYER, 5, L, seed)["input_ids"][np.zeros(B, int)].astype(
            np.int32
        )
        + rng.integers(0, 5, (B, L), np.int32),
        "segment_ids": np.ones((B, L), np.int32),
        "position_ids": np.tile(np.arange(2, L + 2, dtype=np.int32), (B, 1)),
        "masked_positions": positions.astype(np.int32),
        "masked_labels": rng.integers(4, ONE_LAYER.vocab_size, (B, M)).astype(np.int32),
        "masked_weights": (np.arange(M) < counts[:, None]).astype(np.float32),
    }


def masked_rows(L, M, V=500):
    rng = np.random.default_rng(0)
    return {
        "input_ids": rng.integers(4, V, (4, L)),
        "segment_ids": np.ones((4, L), np.int32),
        "position_ids": np.tile(np.arange(L) + 2, (4, 1)),
        "masked_positions": rng.integers(0, L, (4, M)),
        "masked_labels": rng.integers(4, V, (4, M)),
        "masked_weights": (rng.random((4, M)) < 0.6).astype(np.float32),
    }

"""Small configurations, random parameters and batches with padding on every side."""

from __future__ import annotations

import numpy as np

import prelnroberta
from prelnroberta import params as parameters
from prelnroberta.config import ARCHITECTURES, RobertaPreLayerNormConfig

TINY = RobertaPreLayerNormConfig.preset("tiny")
# Odd on purpose: two token types, another pad id, sizes that share no factor with the defaults.
ODD = RobertaPreLayerNormConfig(
    vocab_size=101,
    hidden_size=42,
    num_hidden_layers=3,
    num_attention_heads=7,
    intermediate_size=37,
    hidden_act="gelu_new",
    max_position_embeddings=33,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    pad_token_id=3,
    tie_word_embeddings=False,
)


def random_params(
    config: RobertaPreLayerNormConfig, model: str = "masked_lm", seed: int = 0, scale: float = 0.3
) -> parameters.Tree:
    """A tree in which no parameter has its initial value: norms and biases are random as well."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, shape in parameters.shapes(config, model).items():
        value = scale * rng.standard_normal(shape)
        leaves[path] = (value + 1.0 if path.endswith("/scale") else value).astype(np.float32)
    return parameters.unflatten(leaves)


def ragged_batch(
    config: RobertaPreLayerNormConfig, B: int = 5, L: int = 16, seed: int = 0
) -> dict[str, np.ndarray]:
    """input_ids, attention_mask, token_type_ids and labels: no pads, pads right, left, in the
    middle, and a row of one token."""
    rng = np.random.default_rng(seed)
    pad = config.pad_token_id
    ids = rng.integers(4, config.vocab_size, (B, L))
    ids[1, L - 5 :] = pad
    ids[2, : L // 3] = pad
    ids[3, 4:7] = pad
    ids[4, 1:] = pad
    mask = (ids != pad).astype(np.int64)
    labels = np.where(
        (rng.random((B, L)) < 0.4) & (mask == 1), rng.integers(4, config.vocab_size, (B, L)), -100
    )
    labels[0, 0] = 5
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, config.type_vocab_size, (B, L)),
        "labels": labels,
    }


def with_tokens(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows with any visible token. In others, implementations of softmax differ."""
    mask = batch["attention_mask"]
    kept = mask.any(-1) if mask.ndim == 2 else mask.any(-1).all(-1)
    return {name: rows[kept] for name, rows in batch.items()}


SMALL = TINY.replace(vocab_size=60, hidden_size=16, intermediate_size=24, num_attention_heads=2)
TWO_TYPES = SMALL.replace(
    type_vocab_size=2, hidden_act="relu", layer_norm_eps=1e-12, pad_token_id=0, bos_token_id=1
)


def flax_class(model):
    name = ARCHITECTURES[model]
    return getattr(prelnroberta, "Flax" + name)


def flax_model(model, config, **options):
    if model == "encoder":
        options["add_pooling_layer"] = False
    return flax_class(model)(config, _do_init=False, **options)


MODELS = [model for model in ARCHITECTURES if model != "encoder"]
DECODER = SMALL.replace(is_decoder=True, add_cross_attention=True)
PLAIN_DECODER = SMALL.replace(is_decoder=True)
IDS = np.array([[0, 5, 6, 7, 2], [0, 9, 8, 2, 1]])


def small_config(model):
    return DECODER if model == "causal_lm" else SMALL


def small_flax_model(model, config=None, seed=0, **options):
    config = config or small_config(model)
    ours = flax_model(model, config, **options)
    ours.params = random_params(config, model, seed)
    return ours

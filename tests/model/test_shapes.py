"""Documented shapes, checked with a different size for every letter.

Nothing is computed: `jax.eval_shape` traces the functions. The letters are those of
`prelnroberta/params.py`.
"""

import jax
import jax.numpy as jnp
import pytest

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.model.encoder import Encoder
from prelnroberta.model.heads import MODULES
from prelnroberta.model.kv_cache import init_cache
from prelnroberta.model.losses import masked_lm_scores

# D = H x K; every other size is different, so that no two axes can be exchanged.
SIZES = {
    **{"B": 2, "L": 7, "M": 4, "T": 9, "S": 8, "A": 5},
    **{"D": 12, "H": 3, "K": 4, "F": 20, "N": 6, "V": 31, "C": 11, "Y": 1},
}
CONFIG = RobertaPreLayerNormConfig(
    vocab_size=SIZES["V"],
    hidden_size=SIZES["D"],
    num_hidden_layers=SIZES["N"],
    num_attention_heads=SIZES["H"],
    intermediate_size=SIZES["F"],
    max_position_embeddings=40,
    num_labels=SIZES["C"],
)


def shape(letters):
    return tuple(SIZES[letter] for letter in letters)


def ids(letters):
    return jax.ShapeDtypeStruct(shape(letters), jnp.int32)


def traced(model, input_ids, config=CONFIG, **kwargs):
    """The shapes of what the module returns."""
    module = MODULES[model](config)
    params = jax.eval_shape(lambda: parameters.init(config, jax.random.key(0), model))
    arrays = {name: value for name, value in kwargs.items() if hasattr(value, "shape")}
    others = {name: value for name, value in kwargs.items() if name not in arrays}
    return jax.eval_shape(
        lambda params, input_ids, arrays: module.apply(
            {"params": params}, input_ids, **arrays, **others
        ),
        params,
        input_ids,
        arrays,
    )


@pytest.mark.parametrize(
    ("model", "letters", "input_letters"),
    [
        ("base", "BD", "BL"),
        ("masked_lm", "BLV", "BL"),
        ("causal_lm", "BLV", "BL"),
        ("sequence_classification", "BC", "BL"),
        ("token_classification", "BLC", "BL"),
        ("multiple_choice", "BA", "BAL"),
    ],
)
def test_logits(model, letters, input_letters):
    config = CONFIG.replace(is_decoder=True) if model == "causal_lm" else CONFIG
    if model == "multiple_choice":
        config = config.replace(num_labels=1)
    logits, encoded = traced(model, ids(input_letters), config)
    assert logits.shape == shape(letters)
    if model != "multiple_choice":
        assert encoded.last_hidden_state.shape in (shape("BLD"), (*shape("B"), 1, SIZES["D"]))


def test_logits_of_question_answering():
    logits, _ = traced("question_answering", ids("BL"), CONFIG.replace(num_labels=2))
    assert logits.shape == (*shape("BL"), 2)


def test_logits_at_read_positions():
    logits, encoded = traced("masked_lm", ids("BL"), read_positions=ids("BM"))
    assert logits.shape == shape("BMV")
    assert encoded.last_hidden_state.shape == shape("BMD")


def test_residuals_and_attentions():
    encoded = traced("encoder", ids("BL"), keep_residuals=True, keep_attentions=True)
    assert [x.shape for x in encoded.residuals] == [shape("BLD")] * (SIZES["N"] + 1)
    assert [x.shape for x in encoded.attentions] == [shape("BHLL")] * SIZES["N"]


def test_cache():
    config = CONFIG.replace(is_decoder=True)
    cache = jax.eval_shape(lambda: init_cache(config, SIZES["B"], SIZES["T"]))
    assert cache["keys"].shape == cache["values"].shape == shape("NBTHK")
    params = jax.eval_shape(lambda: parameters.init(config, jax.random.key(0), "encoder"))
    encoded = jax.eval_shape(
        lambda params, input_ids, cache: Encoder(config).apply(
            {"params": params}, input_ids, cache=cache, keep_attentions=True
        ),
        params,
        ids("BL"),
        cache,
    )
    assert encoded.last_hidden_state.shape == shape("BLD")
    assert {name: x.shape for name, x in encoded.cache.items()} == {
        name: x.shape for name, x in cache.items()
    }
    assert [x.shape for x in encoded.attentions] == [shape("BHLT")] * SIZES["N"]


def test_cross_attention():
    config = CONFIG.replace(is_decoder=True, add_cross_attention=True)
    states = jax.ShapeDtypeStruct(shape("BSD"), jnp.float32)
    encoded = traced(
        "encoder", ids("BL"), config, encoder_hidden_states=states, keep_attentions=True
    )
    assert [x.shape for x in encoded.cross_attentions] == [shape("BHLS")] * SIZES["N"]


def test_scores_of_masked_lm_are_scalars():
    batch = {name: ids("BL") for name in ("input_ids", "segment_ids", "position_ids")}
    batch |= {name: ids("BM") for name in ("masked_positions", "masked_labels")}
    batch["masked_weights"] = jax.ShapeDtypeStruct(shape("BM"), jnp.float32)
    params = jax.eval_shape(lambda: parameters.init(CONFIG, jax.random.key(0)))
    scores = jax.eval_shape(
        lambda params, batch: masked_lm_scores(MODULES["masked_lm"](CONFIG), params, batch, None),
        params,
        batch,
    )
    assert scores.loss.shape == scores.correct.shape == scores.weight.shape == ()

"""Generation of the TensorFlow twin: the cache matches a full forward, tokens are those of Flax."""

import numpy as np
import pytest
import tensorflow as tf

from bridges.tensorflow import generation
from prelnroberta import InputError
from prelnroberta.inference import generation as flax_generation
from tests.helpers.small_models import TINY, random_params
from tests.helpers.tensorflow_models import tf_and_flax, tf_model

pytestmark = pytest.mark.tensorflow

PLAIN = TINY.replace(
    # Tokens that these models like to say end a row, so that beams end early and often.
    vocab_size=60,
    hidden_size=16,
    num_attention_heads=2,
    is_decoder=True,
    eos_token_id=(17, 41),
)
CROSS = PLAIN.replace(add_cross_attention=True)
PAD = PLAIN.pad_token_id
PROMPTS = np.array([[0, 5, 6, 7, 8], [PAD, PAD, 0, 9, 10], [11, 12, PAD, PAD, PAD]])
STATES = {
    "encoder_hidden_states": np.random.default_rng(1).standard_normal((3, 4, 16)).astype("f"),
    "encoder_attention_mask": np.array([[1, 1, 1, 0]] * 2 + [[1] * 4]),
}


@pytest.mark.parametrize("config", [PLAIN, CROSS], ids=["plain", "cross"])
def test_cached_decoding_matches_full_forward(config):
    """A prompt of four columns, then one, one and two: any padding, each row for itself."""
    ours, flax = tf_and_flax("causal_lm", config)
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 60, (5, 8))
    ids[1, :3] = ids[2, 2] = ids[3, 2:5] = ids[4, 6:] = PAD
    mask = (ids != PAD).astype(np.int32)
    cross = {}
    if config.add_cross_attention:
        cross["encoder_hidden_states"] = rng.standard_normal((5, 3, 16)).astype(np.float32)
        cross["encoder_attention_mask"] = np.array([[1, 1, 1], [1, 0, 0]] * 2 + [[0, 1, 1]])
    expected = flax(ids, mask, **cross).logits
    cache, found = ours.init_cache(5, 9), []
    step = tf.function(ours, jit_compile=True, autograph=False)
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 8)):
        given = cross if start == 0 else {}
        run = step if start == 4 else ours
        output = run(ids[:, start:stop], mask[:, start:stop], past_key_values=cache, **given)
        cache = output.past_key_values
        found.append(output.logits)
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache["count"], mask.sum(1))
    with pytest.raises(InputError, match="9 columns, 8 used: no room for 2 more"):
        ours(ids[:, :2], past_key_values=cache)
    fresh = ours(ids, mask, **cross, use_cache=True)
    assert fresh.past_key_values["valid"].shape == (5, config.max_length)
    np.testing.assert_allclose(fresh.logits[mask == 1], expected[mask == 1], rtol=1e-5, atol=1e-5)


WAYS = {
    "greedy": {"max_new_tokens": 12},
    "penalized": {"max_new_tokens": 9, "repetition_penalty": 1.5, "min_new_tokens": 6},
    "beams": {"max_new_tokens": 11, "num_beams": 4, "num_return_sequences": 3},
    "eager_beams": {
        "max_new_tokens": 8,
        "num_beams": 3,
        "length_penalty": 2.5,
        "early_stopping": True,
        "repetition_penalty": 1.3,
    },
    "patient_beams": {"max_length": 14, "min_length": 9, "num_beams": 3, "early_stopping": "never"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", [PLAIN, CROSS], ids=["plain", "cross"])
def test_generated_tokens_match_flax(way, config):
    if config is CROSS and way not in ("greedy", "beams"):
        return
    ours, flax = tf_and_flax("causal_lm", config)
    states = STATES if config.add_cross_attention else {}
    found, expected = (m.generate(PROMPTS, **WAYS[way], **states) for m in (ours, flax))
    np.testing.assert_array_equal(found.sequences, expected.sequences)
    assert (found.scores is None) == (expected.scores is None)
    if found.scores is not None:
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-5)
    if way == "greedy" and config is PLAIN:
        new = found.sequences.numpy()[:, PROMPTS.shape[1] :]
        assert len(np.unique(new)) > 4 and (new == PAD).any()


def test_generate_in_mixed_precision():
    params = random_params(CROSS, "causal_lm", scale=0.1)
    ours = tf_model("causal_lm", CROSS, params, dtype="mixed_bfloat16")
    found = ours.generate(PROMPTS, num_beams=3, max_new_tokens=4, **STATES)
    assert found.sequences.shape == (3, 9) and np.isfinite(found.scores).all()


def test_top_k_and_top_p_match_flax():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 30)).astype(np.float32) * 3
    logits[:, 3] = logits[:, 9]
    seen = rng.random((6, 30)) < 0.3
    for k, p in ((1, 0.1), (5, 0.6), (40, 0.95)):
        for name, value in (("keep_top_k", k), ("keep_top_p", p)):
            expected = getattr(flax_generation, name)(logits, value)
            found = getattr(generation, name)(tf.constant(logits), value)
            np.testing.assert_array_equal(found, expected, err_msg=name)
    np.testing.assert_allclose(
        generation.penalize_repetition(tf.constant(logits), seen, 1.7),
        flax_generation.penalize_repetition(logits, seen, 1.7),
        rtol=1e-6,
    )


def test_sampled_frequencies_match_distribution():
    ours = tf_model("causal_lm", PLAIN, random_params(PLAIN, "causal_lm", scale=0.15))
    prompt = PROMPTS[:1]
    settings = {"do_sample": True, "top_k": 6, "temperature": 1.4, "max_new_tokens": 1}
    draws = 3000
    found = ours.generate(prompt, num_return_sequences=draws, **settings, seed=1)
    counts = np.bincount(found.sequences.numpy()[:, -1], minlength=60)
    kept = generation.keep_top_k(ours(prompt).logits[:, -1] / 1.4, 6)
    expected = draws * tf.nn.softmax(kept).numpy()[0]
    assert (counts > 0).sum() == 6 and not counts[expected == 0].any()
    likely = expected > 0
    chi2 = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi2 < 20.5  # 5 degrees of freedom: one in a thousand


def test_samples_depend_only_on_seed_row_and_content():
    ours = tf_model("causal_lm", PLAIN, random_params(PLAIN, "causal_lm", scale=0.15))
    settings = {"do_sample": True, "max_new_tokens": 6, "top_p": 0.95, "eos_token_id": None}

    def new(prompts, seed=0, each=2):
        found = ours.generate(prompts, seed=seed, num_return_sequences=each, **settings)
        return found.sequences.numpy()[:, -6:]

    all_rows = new(PROMPTS)
    np.testing.assert_array_equal(all_rows[::2], new(PROMPTS, each=1))
    np.testing.assert_array_equal(all_rows, new(PROMPTS))
    np.testing.assert_array_equal(all_rows[:4], new(PROMPTS[:2]))
    assert (all_rows != new(PROMPTS, seed=1)).any()
    moved = PROMPTS.copy()
    moved[1] = [0, 9, 10, PAD, PAD]
    np.testing.assert_array_equal(new(moved), all_rows)
    twins = new(np.repeat(PROMPTS[:1], 2, 0))
    assert len(np.unique(twins, axis=0)) == 4


def test_invalid_generation_arguments_raise():
    ours = tf_model("causal_lm", PLAIN)
    for prompts, settings, complaint in (
        (PROMPTS, {"max_new_tokens": 61}, r"continuation of 65 tokens .*64"),
        (PROMPTS, {"top_k": 3}, "top_k=3, expected None unless do_sample"),
        (PROMPTS, {"eos_token_id": 60}, "eos or pad id 60"),
        (np.full((1, 3), PAD), {}, "a token in every row"),
        ([[0, 60]], {}, r"input_ids\[0, 1\] is 60"),
    ):
        with pytest.raises(InputError, match=complaint):
            ours.generate(prompts, **settings)

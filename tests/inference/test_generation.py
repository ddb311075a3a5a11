"""Generation against independent references: argmax over a full forward, brute force over all
sequences, and a beam search in plain Python."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prelnroberta.errors import InputError
from prelnroberta.inference.generation import (
    generate,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    reorder_cache,
)
from prelnroberta.inference.generation_config import GenerationConfig
from tests.helpers.toy_decoders import (
    PAD,
    TOY_PROMPTS,
    constant_decoder,
    generate_from_logits,
    pad_toy_prompts,
    toy_cache,
    toy_decode,
    toy_generate,
    toy_logits,
    toy_params,
    trigram,
)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_greedy_matches_argmax_of_full_forward(side):
    params, settings = toy_params(seed=8), GenerationConfig(max_new_tokens=9, eos_token_id=2)
    new, scores = toy_generate(params, TOY_PROMPTS, settings, side=side)
    assert scores is None
    ends = 0
    for prompt, row in zip(TOY_PROMPTS, new.tolist(), strict=True):
        expected, tokens = [], prompt
        while len(expected) < 9 and 2 not in expected:
            expected.append(int(toy_logits(params, tokens).argmax()))
            tokens = (*prompt, *expected)
        ends += 2 in expected
        assert row == expected + [PAD] * (9 - len(expected))
    assert 0 < ends < len(TOY_PROMPTS), "a row should end early, and one should not"


# ---------------------------------------------------------------------------------------------
# Beam search.


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@functools.cache
def toy_log_p(seed: int, V: int, tokens: tuple[int, ...]) -> np.ndarray:
    return log_softmax(toy_logits(toy_params(seed, V), tokens))


def all_sequences(log_p, V: int, G: int, eos: int, length_penalty: float):
    """Every continuation that ends with eos or has G tokens: [(score, tokens)], best first."""
    found = []
    for length in range(1, G + 1):
        for tokens in itertools.product(range(V), repeat=length):
            if eos in tokens[:-1] or (tokens[-1] != eos and length < G):
                continue
            total = sum(log_p(tokens[:i])[token] for i, token in enumerate(tokens))
            found.append((total / length**length_penalty, tokens))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_exhaustive_beams_rank_every_sequence(length_penalty):
    V, G, prompts = 4, 4, [(3, 0, 3), (0,)]
    W = 121  # sequences of at most 4 tokens: 1 + 3 + 9 + 27 end with eos, 81 do not
    settings = GenerationConfig(
        max_new_tokens=G, num_beams=W, num_return_sequences=W, length_penalty=length_penalty
    )
    for seed in range(3):
        new, scores = toy_generate(toy_params(seed, V), prompts, settings)
        for row, prompt in enumerate(prompts):
            expected = all_sequences(
                lambda tokens, prompt=prompt, seed=seed: toy_log_p(seed, V, prompt + tokens),
                *(V, G, 2, length_penalty),
            )
            assert len(expected) == W
            found = [tuple(tokens) for tokens in new[row * W : row * W + W].tolist()]
            assert len(set(found)) == W
            # Of logits of size ten, in float32: 1.5e-5 apart where it is most (AVX2).
            np.testing.assert_allclose(
                scores[row * W : row * W + W],
                [score for score, _ in expected],
                rtol=1e-5,
                atol=3e-5,
            )
            assert found[:9] == [tokens + (PAD,) * (G - len(tokens)) for _, tokens in expected[:9]]


def reference_beams(log_p, settings: GenerationConfig, most: int, least: int):
    """Beam search with lists: [(score, tokens)] of ended sequences, best first."""
    W, eos = settings.num_beams, settings.eos_token_ids
    running, ended = [(0.0, ())], []
    for length in range(1, most + 1):
        extended = []
        for total, tokens in running:
            for token, value in enumerate(log_p(tokens)):
                if token not in eos or length > least:
                    extended.append((total + value, (*tokens, token)))
        running = []
        for rank, (total, tokens) in enumerate(sorted(extended, reverse=True)):
            if tokens[-1] not in eos and length < most:
                running.append((total, tokens))
            elif rank < W:
                ended.append((total / length**settings.length_penalty, tokens))
        running, ended = running[:W], sorted(ended, reverse=True)[:W]
        if len(ended) == W:
            hopeful = settings.early_stopping == "never" and settings.length_penalty > 0
            best = running and running[0][0] / (most if hopeful else length) ** (
                settings.length_penalty
            )
            if settings.early_stopping is True or not running or best <= ended[-1][0]:
                break
    return ended


BEAMS = [
    {"num_beams": 2, "length_penalty": 2.0, "early_stopping": False},
    {"num_beams": 2, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 2, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": -0.5, "early_stopping": "never"},
    {"num_beams": 3, "min_new_tokens": 3},
    {"num_beams": 4, "eos_token_id": None, "num_return_sequences": 1},
]


@functools.cache
def beam_results(case: int):
    """What both searches find for every seed and prompt: [(found, scores, expected)]."""
    G = 6
    changes = {"eos_token_id": (2, 6, 9), "num_return_sequences": BEAMS[case]["num_beams"]}
    settings = GenerationConfig(max_new_tokens=G, **(changes | BEAMS[case]))
    results = []
    for seed in range(4):
        new, scores = toy_generate(toy_params(seed), TOY_PROMPTS, settings)
        new = new.reshape(len(TOY_PROMPTS), -1, G).tolist()
        for prompt, found, score in zip(
            TOY_PROMPTS, new, scores.reshape(len(new), -1), strict=True
        ):
            expected = reference_beams(
                lambda tokens, prompt=prompt, seed=seed: toy_log_p(seed, 11, prompt + tokens),
                *(settings, G, settings.min_new_tokens or 0),
            )[: settings.num_return_sequences]
            expected = [(score, [*t, *[PAD] * (G - len(t))]) for score, t in expected]
            results.append((found, score, expected))
    return results


@pytest.mark.parametrize("case", range(len(BEAMS)), ids=lambda case: str(BEAMS[case]))
def test_beams_match_reference_search(case):
    for found, scores, expected in beam_results(case):
        assert found == [tokens for _, tokens in expected]
        np.testing.assert_allclose(scores, [score for score, _ in expected], 1e-5, 1e-5)


def test_early_stopping_changes_some_results():
    """Or the test above would not notice it ignored."""
    kept, stopped, never = ([found for found, _, _ in beam_results(i)] for i in range(3))
    assert kept != stopped and stopped != never and kept != never


def test_fewer_sequences_than_requested():
    """Three can be said in all: the fourth is pads with score -inf."""
    ids, mask = pad_toy_prompts([(0,)])
    settings = GenerationConfig(
        max_new_tokens=2, num_beams=4, num_return_sequences=4, pad_token_id=0
    )
    logits = jnp.array([-jnp.inf, 0.0, 1.0])
    output = generate(constant_decoder, logits, {}, ids, mask, settings)
    assert output.sequences[:, 1:].tolist() == [[2, 0], [1, 2], [1, 1], [0, 0]]
    a, b = log_softmax(np.array([0.0, 1.0]))
    np.testing.assert_allclose(output.scores, [b, (a + b) / 2, a, -np.inf], atol=1e-6)


# ---------------------------------------------------------------------------------------------
# Filters.


def test_top_p_keeps_smallest_sufficient_set():
    logits = np.log(np.float32([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]))
    for p, kept in ((0.3, 1), (0.41, 2), (0.65, 2), (0.75, 3), (0.95, 4)):
        found = np.isfinite(keep_top_p(jnp.array(logits[:1]), p))[0]
        assert found.tolist() == (np.exp(logits[0]) >= sorted(np.exp(logits[0]))[-kept]).tolist()
    equal = np.isfinite(keep_top_p(jnp.array(logits[1:]), 0.6))
    assert equal.sum() == 3, "equal tokens are kept in number, not by value"
    assert np.isfinite(keep_top_k(jnp.array(logits[1:]), 2)).all(), "those equal to the k-th stay"


# ---------------------------------------------------------------------------------------------
# Sampling.


def distribution(logits, temperature=1.0, top_k=None, top_p=1.0):
    """The probabilities [V] a token is drawn by, from the definitions."""
    p = np.exp(log_softmax(np.float64(logits) / temperature))
    order = np.argsort(-p)[:top_k]
    p = np.where(np.isin(np.arange(p.size), order), p, 0.0)
    p /= p.sum()
    kept = [t for i, t in enumerate(order) if p[order[:i]].sum() < top_p]
    p = np.where(np.isin(np.arange(p.size), kept), p, 0.0)
    return p / p.sum()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 4},
        {"top_p": 0.7},
        # Each of these tells one order of the three from another.
        {"temperature": 0.5, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 3, "top_p": 0.75},
    ],
    ids=str,
)
def test_sampled_frequencies_match_distribution(changes):
    logits, n = np.float32([1.0, -0.5, 2.0, 0.3, 1.6, -2.0, 0.9]), 4000
    settings = GenerationConfig(
        max_new_tokens=2, do_sample=True, eos_token_id=None, num_return_sequences=n, **changes
    )
    drawn = np.array(generate_from_logits(logits, [(3, 4), (5,)], settings, jax.random.key(7)))
    assert drawn.shape == (2 * n, 2)
    expected = distribution(logits, **changes)
    for sample in (drawn[:n, 0], drawn[:n, 1], drawn[n:, 0], drawn[n:, 1]):
        counts = np.bincount(sample, minlength=logits.size)
        assert not counts[expected == 0].any()
        held, freedom = expected > 0, (expected > 0).sum() - 1
        chi_square = ((counts - n * expected)[held] ** 2 / (n * expected)[held]).sum()
        assert chi_square < freedom + 5 * np.sqrt(2 * freedom), (counts, n * expected)
    # The draws of one step, row or sample say nothing of another's.
    for a, b in ((drawn[:n, 0], drawn[:n, 1]), (drawn[:n, 0], drawn[n:, 0])):
        assert abs((a == b).mean() - (expected**2).sum()) < 5 / np.sqrt(4 * n)


def test_samples_do_not_depend_on_other_rows():
    params, key = toy_params(seed=8), jax.random.key(3)
    settings = GenerationConfig(max_new_tokens=6, do_sample=True, num_return_sequences=3)
    new, _ = toy_generate(params, TOY_PROMPTS, settings, key)
    assert len({tuple(row) for row in new.tolist()}) > 6
    changed = [*TOY_PROMPTS[:2], (9, 9, 9, 9, 9)]
    other, _ = toy_generate(params, changed, settings, key, side="both", width=7)
    np.testing.assert_array_equal(other[:6], new[:6])
    other, _ = toy_generate(params, TOY_PROMPTS, settings, jax.random.key(4))
    assert (other != new).any()


def test_low_temperature_samples_are_greedy():
    params = toy_params(seed=8)
    cold = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=1e-5)
    sampled, _ = toy_generate(params, TOY_PROMPTS, cold, jax.random.key(0))
    greedy, _ = toy_generate(params, TOY_PROMPTS, GenerationConfig(max_new_tokens=9))
    np.testing.assert_array_equal(sampled, greedy)


# ---------------------------------------------------------------------------------------------
# Exact small cases.


def test_repetition_penalty_counts_prompt_tokens_but_not_padding():
    settings = GenerationConfig(
        max_new_tokens=5, repetition_penalty=2.0, eos_token_id=None, pad_token_id=0
    )
    logits = [1.0, 0.9, 0.8, -0.1]
    assert generate_from_logits(logits, [(3,), (0,)], settings) == [
        [0, 1, 2, 0, 0],
        [1, 2, 0, 0, 0],
    ]
    # Row 0 is padded by token 1 here, which is no reason to avoid it.
    assert generate_from_logits(logits, [(3,), (2, 0)], settings)[0] == [0, 1, 2, 0, 0]
    assert generate_from_logits([-1.0, -1.5, -1.9, -9.0], [(3,)], settings) == [[0, 1, 2, 0, 0]]


def test_repetition_penalty_divides_positive_logits():
    seen = jnp.array([[True, True, False, True]])
    found = penalize_repetition(jnp.array([[3.0, -2.0, 5.0, -jnp.inf]]), seen, 1.5)
    np.testing.assert_allclose(found, [[2.0, -3.0, 5.0, -np.inf]])


def test_min_and_max_new_tokens():
    logits = [0.0, 1.0, 5.0, 4.0]  # eos 2 is the likeliest, then 3
    prompts = [(0, 0), (0,)]

    def row(**changes):
        a, b = generate_from_logits(logits, prompts, GenerationConfig(**changes))
        assert a == b
        return a

    assert row(max_new_tokens=4) == [2, PAD, PAD, PAD]
    assert row(max_new_tokens=5, min_new_tokens=3) == [3, 3, 3, 2, PAD]
    assert row(max_length=7, min_length=5) == [3, 3, 3, 2, PAD]
    assert row(max_new_tokens=3, min_length=1) == [2, PAD, PAD]
    assert row(max_new_tokens=2, min_new_tokens=2) == [3, 3]
    assert row(max_new_tokens=3, eos_token_id=[2, 3], min_new_tokens=1) == [1, 2, PAD]
    assert row(max_new_tokens=3, eos_token_id=None) == [2, 2, 2]
    assert row(min_new_tokens=20) == [3] * 20


@pytest.mark.parametrize(
    ("beams", "reads"),
    # The best is 4 4 2; the second beam, which begins with less likely 4 0, goes on to 4 4 2.
    [({}, [3, 1, 1]), ({"num_beams": 2, "early_stopping": True}, [3, 1, 1, 1, 1])],
    ids=str,
)
def test_prompt_is_read_once_and_loop_stops_when_all_rows_end(beams, reads):
    traced, run = [], []

    def decode(params, input_ids, attention_mask, cache):
        traced.append(input_ids.shape)
        jax.debug.callback(lambda ids: run.append(ids.shape[1]), input_ids)
        return trigram(params, input_ids, attention_mask, cache)

    def columns_read(table):
        run.clear()
        ids, mask = pad_toy_prompts([(3, 0), (4, 0, 3)])
        cache = {"pair": jnp.zeros((2, 2), jnp.int32)}
        settings = GenerationConfig(max_new_tokens=8, **beams)
        jax.block_until_ready(generate(decode, table, cache, ids, mask, settings))
        jax.effects_barrier()
        return list(run)

    table = np.zeros((5, 5, 5), np.float32)
    table[:, :, 4] = 9.0  # 4 follows everything, and the end follows two of them
    table[4, 4] = [0, 0, 99, 0, 0]
    assert columns_read(table) == reads
    assert len(traced) == 2, "one trace of the prompt, one of the loop"
    table[:, :, 2] = -99.0
    assert columns_read(table) == [3] + [1] * 7, "the last token is not read"
    assert len(traced) == 2, "equal settings and shapes are compiled once"


def test_generate_under_outer_jit_and_with_last_token_logits_only():
    params, settings = toy_params(seed=8), GenerationConfig(max_new_tokens=5, num_beams=2)
    ids, mask = pad_toy_prompts(TOY_PROMPTS, side="both")

    def last_alone(params, input_ids, attention_mask, cache):
        logits, cache = toy_decode(params, input_ids, attention_mask, cache)
        columns = jnp.where(attention_mask != 0, jnp.arange(input_ids.shape[1]), 0).max(axis=1)
        return jnp.take_along_axis(logits, columns[:, None, None], axis=1), cache

    @jax.jit
    def outer(params, ids, mask):
        cache = toy_cache(params, len(TOY_PROMPTS), 12)
        return generate(last_alone, params, cache, ids, mask, settings)

    plain = generate(toy_decode, params, toy_cache(params, 4, 12), ids, mask, settings)
    output = outer(params, ids, mask)
    np.testing.assert_array_equal(output.sequences, plain.sequences)
    np.testing.assert_allclose(output.scores, plain.scores, rtol=1e-6)


def test_reorder_cache_selects_rows_of_every_leaf():
    rng = np.random.default_rng(0)
    shapes = {"keys": (2, 3, 5, 2, 4), "values": (2, 3, 5, 2, 4), "valid": (3, 5), "count": (3,)}
    shapes |= {"cross_keys": (2, 3, 7, 2, 4), "cross_values": (2, 3, 7, 2, 4)}
    shapes |= {"cross_valid": (3, 7), "index": ()}
    cache = {name: jnp.array(rng.integers(0, 99, shape)) for name, shape in shapes.items()}
    index = [2, 0, 0, 1]
    for name, leaf in reorder_cache(cache, jnp.array(index)).items():
        stacked = name in ("keys", "values", "cross_keys", "cross_values")
        leaf, whole = np.asarray(leaf), np.asarray(cache[name])
        expected = whole[:, index] if stacked else whole if name == "index" else whole[index]
        np.testing.assert_array_equal(leaf, expected, name)


# ---------------------------------------------------------------------------------------------
# Bad input.


def test_bad_arguments_raise():
    ids, mask = pad_toy_prompts(TOY_PROMPTS)
    params = toy_params()

    def refused(*parts, ids=ids, mask=mask, T=40, decode=toy_decode, **fields):
        with pytest.raises(InputError) as error:
            cache = toy_cache(params, len(ids), T)
            generate(decode, params, cache, ids, mask, GenerationConfig(**fields))
        assert all(part in str(error.value) for part in parts), error.value

    refused("input_ids", "[4]", ids=ids[:, 0])
    refused("input_ids", "[4, 0]", ids=ids[:, :0], mask=mask[:, :0])
    refused("input_ids", "float32", ids=np.float32(ids))
    refused("attention_mask", "[4, 3]", "[4, 4]", mask=mask[:, 1:])
    refused("row 2", "token", mask=mask * np.int32([[1], [1], [0], [1]]))
    refused("max_length=4", "4 columns", max_length=4)
    refused("min_new_tokens=9", "5", max_length=9, min_new_tokens=9)
    refused("min_length=25", "20", min_length=25)
    refused("22 columns", "23", "4 of the prompt", "20 new", T=22)
    refused("key=None", do_sample=True)
    refused("pad id 11", "V=11", pad_token_id=11)
    refused("eos", "11", "V=11", eos_token_id=(2, 11))

"""What must change nothing: padding, packing, scan, remat, reading in part, batching, vmap and
pmap."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from prelnroberta import params as parameters
from prelnroberta.errors import InputError
from prelnroberta.model import encoder
from prelnroberta.model.encoder import Encoder, Execution
from prelnroberta.model.heads import MaskedLM
from prelnroberta.model.layers import ACTIVATIONS
from prelnroberta.model.losses import Scores, cross_entropy, masked_lm_scores
from tests.helpers.small_models import ODD, TINY, random_params

SIMILAR = {"rtol": 2e-5, "atol": 2e-5}


def encode(config, params, ids, execution=None, **options):
    module = Encoder(config, execution or Execution())
    return module.apply({"params": params}, jnp.asarray(ids), **options)


def some_ids(config):
    return np.random.default_rng(1).integers(4, config.vocab_size, (3, 12))


@pytest.fixture(scope="module", params=[TINY, ODD], ids=["tiny", "odd"])
def case(request):
    config = request.param
    return config, random_params(config, "encoder"), some_ids(config)


@pytest.mark.parametrize("places", ["right", "left", "middle"])
def test_padding_changes_nothing(case, places):
    config, params, ids = case
    plain = encode(config, params, ids).last_hidden_state
    where = {"right": [12] * 4, "left": [0] * 4, "middle": [3, 3, 7, 9]}[places]
    padded = np.insert(ids, where, config.pad_token_id, axis=1)
    real = padded != config.pad_token_id
    output = encode(config, params, padded, attention_mask=jnp.asarray(real)).last_hidden_state
    np.testing.assert_allclose(output[real].reshape(plain.shape), plain, **SIMILAR)


def test_fully_padded_row_is_finite_and_does_not_disturb_others(case):
    config, params, ids = case
    padded = np.concatenate([ids, np.full((1, 12), config.pad_token_id)])
    mask = jnp.asarray(padded != config.pad_token_id)
    output = encode(config, params, padded, attention_mask=mask).last_hidden_state
    assert np.isfinite(output).all()
    plain = encode(config, params, ids).last_hidden_state
    np.testing.assert_allclose(output[:3], plain, **SIMILAR)


def test_packing_is_separate_rows(case):
    config, params, ids = case
    pad = config.pad_token_id
    pieces = [ids[0, :5], ids[1, :4], ids[2, :2]]
    row = np.concatenate([*pieces, [pad]])
    segments = np.repeat([1, 2, 3, 0], [5, 4, 2, 1])
    positions = np.concatenate([np.arange(n) + pad + 1 for n in (5, 4, 2)] + [[pad]])
    packed = encode(
        config, params, row[None], segment_ids=segments[None], position_ids=positions[None]
    ).last_hidden_state[0]
    start = 0
    for piece in pieces:
        alone = encode(config, params, piece[None]).last_hidden_state[0]
        np.testing.assert_allclose(packed[start : start + len(piece)], alone, **SIMILAR)
        start += len(piece)
    assert np.isfinite(packed).all()


def test_gradient_reaches_all_of_a_segment_and_nothing_else():
    """Which embeddings can influence one output: its own segment's, no pad's, no neighbour's."""
    params = random_params(TINY, "encoder")
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 0, 0]])
    ids = jnp.asarray([[5, 6, 7, 8, 9, 10, 1, 1]])
    positions = jnp.asarray([[2, 3, 4, 2, 3, 4, 1, 1]])

    def output(word):
        tree = {**params, "embeddings": {**params["embeddings"], "word": word}}
        options = {"segment_ids": segments, "position_ids": positions}
        # Not a plain sum: a normed vector sums to nearly the same whatever its input.
        return (encode(TINY, tree, ids, **options).last_hidden_state[0, 4] ** 3).sum()

    gradient = np.abs(jax.grad(output)(jnp.asarray(params["embeddings"]["word"]))).sum(-1)
    assert (gradient[[8, 9, 10]] > 0).all()
    assert (np.delete(gradient, [8, 9, 10]) == 0).all()


@pytest.mark.parametrize(
    "execution",
    [
        Execution(scan_layers=True),
        Execution(scan_layers=False, remat="full"),
        Execution(scan_layers=True, remat="dots"),
        Execution(remat="full"),
    ],
    ids=["scan", "remat", "scan_dots", "scan_remat"],
)
def test_execution_changes_nothing(execution):
    """Outputs and gradients, dropout included: keys belong to layers, not to loops."""
    expected, expected_gradient = with_dropout(Execution(scan_layers=False))
    found, gradient = with_dropout(execution)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **SIMILAR)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1, np.abs(b).max()))


@functools.cache
def with_dropout(execution):
    """Outputs and gradients of a loss that reads all of them."""
    config = ODD
    params, ids = random_params(config, "encoder"), some_ids(config)
    # A generator that compiles faster than the default one.
    key = jax.random.key(7, impl="rbg")

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params):
        output = encode(
            config,
            params,
            ids,
            execution,
            deterministic=False,
            rngs={"dropout": key},
            read_positions=jnp.asarray([[1, 5]] * 3),
            keep_residuals=True,
        )
        streams = sum((r.astype(jnp.float32) ** 2).mean() for r in output.residuals)
        return (output.last_hidden_state**3).sum() + streams, output

    (_, output), gradients = run(params)
    return output, gradients


def test_reading_some_positions_is_exact(case):
    config, params, ids = case
    ids = ids.copy()
    ids[0, 9:] = config.pad_token_id
    mask = jnp.asarray(ids != config.pad_token_id)
    read = jnp.asarray([[0, 3, 3], [11, 0, 5], [2, 1, 0]])
    for options in ({"attention_mask": mask}, {"segment_ids": mask.astype(jnp.int32)}):
        whole = encode(config, params, ids, **options).last_hidden_state
        part = encode(config, params, ids, read_positions=read, **options).last_hidden_state
        np.testing.assert_allclose(part, jnp.take_along_axis(whole, read[..., None], 1), **SIMILAR)
        part = encode(config, params, ids, read_positions=read[:1], **options).last_hidden_state
        np.testing.assert_allclose(part, whole[:, read[0]], **SIMILAR)


def test_reading_some_positions_of_a_decoder_is_exact():
    """Causal and cross-attention masks are narrowed with the queries, those of three axes too."""
    config = TINY.replace(is_decoder=True, add_cross_attention=True)
    params, ids, rng = random_params(config, "encoder"), some_ids(config), np.random.default_rng(0)
    read = jnp.asarray([[0, 3, 3], [11, 0, 5], [2, 1, 0]])
    square = rng.random((3, 12, 4)) < 0.5
    states = jnp.asarray(rng.standard_normal((3, 4, config.hidden_size)), jnp.float32)
    options = {"encoder_hidden_states": states, "encoder_attention_mask": jnp.asarray(square)}
    whole = encode(config, params, ids, **options).last_hidden_state
    part = encode(config, params, ids, read_positions=read, **options).last_hidden_state
    np.testing.assert_allclose(part, jnp.take_along_axis(whole, read[..., None], 1), **SIMILAR)


def test_vmap_is_a_loop():
    """Over models (an ensemble) and, of the gradient, over rows: per-example gradients."""
    config, params, ids = TINY, random_params(TINY, "encoder"), some_ids(TINY)
    trees = [params, random_params(config, "encoder", seed=1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def run(params, ids):
        return encode(config, params, ids, read_positions=jnp.zeros((1, 1), int)).last_hidden_state

    found = jax.vmap(run, (0, None))(stacked, ids)
    for one, tree in zip(found, trees, strict=True):
        np.testing.assert_allclose(one, run(tree, ids), **SIMILAR)
    gradient = jax.grad(lambda params, ids: (run(params, ids) ** 3).sum())
    by_row = jax.jit(jax.vmap(gradient, (None, 0)))(params, ids[:, None])
    whole = jax.jit(gradient)(params, ids)
    for a, b in zip(jax.tree.leaves(by_row), jax.tree.leaves(whole), strict=True):
        bound = 1e-5 * max(1, np.abs(b).max())
        np.testing.assert_allclose(a.sum(0), b, rtol=1e-4, atol=bound)


def test_pmap_of_every_module():
    script = Path(__file__).parents[1] / "oracle" / "eight_devices.py"
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2]), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, script], check=True, timeout=600, env=environment)


def test_a_batch_is_its_rows_and_jit_is_no_jit(case):
    config, params, ids = case
    whole = encode(config, params, ids).last_hidden_state
    jitted = jax.jit(lambda p, x: encode(config, p, x).last_hidden_state)(params, ids)
    np.testing.assert_allclose(jitted, whole, **SIMILAR)
    for row in range(3):
        alone = encode(config, params, ids[row : row + 1]).last_hidden_state
        np.testing.assert_allclose(alone[0], whole[row], **SIMILAR)


def test_masks_in_two_and_three_dimensions_agree(case):
    config, params, ids = case
    mask = np.ones(ids.shape, np.int32)
    mask[:, 8:] = 0
    flat = encode(config, params, ids, attention_mask=jnp.asarray(mask)).last_hidden_state
    square = jnp.asarray(np.repeat(mask[:, None], ids.shape[1], 1))
    full = encode(config, params, ids, attention_mask=square).last_hidden_state
    np.testing.assert_allclose(full, flat, **SIMILAR)


def test_positions_count_real_tokens():
    ids = jnp.asarray([[12, 31, 13, 1], [1, 12, 31, 1], [1, 1, 1, 1]])
    found = encoder.default_position_ids(ids, 1)
    np.testing.assert_array_equal(found, [[2, 3, 4, 1], [1, 2, 3, 1], [1, 1, 1, 1]])


def test_layer_norm_keeps_its_precision_far_from_zero():
    """At mean 100 and deviation 1, Flax's one-pass variance is off by 1.7e-3."""
    x = np.random.default_rng(0).standard_normal((64, 256)) + 100
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    unit = {"scale": jnp.ones(256), "bias": jnp.zeros(256)}
    found = encoder.layer_norm(unit, jnp.asarray(x), 1e-12)
    assert np.abs(found - expected).max() < 3e-5


@pytest.mark.parametrize(
    ("equation", "inputs", "kernel", "fan_in"),
    [
        ("bld,df->blf", (3, 5, 8), (8, 12), 1),  # wider, by halves
        ("bld,df->blf", (3, 5, 4), (4, 7), 1),  # wider, no halves
        ("blf,fd->bld", (3, 5, 12), (12, 8), 1),
        ("bld,dhk->blhk", (3, 5, 8), (8, 2, 4), 1),
        ("bmhk,hkd->bmd", (3, 5, 2, 4), (2, 4, 8), 2),
        ("...d,dc->...c", (0, 8), (8, 3), 1),
    ],
)
def test_projection_is_einsum_in_value_and_every_derivative(equation, inputs, kernel, fan_in):
    """Forwards, backwards and one after the other: it has a derivative rule of its own."""
    rng = np.random.default_rng(0)
    shapes = inputs, kernel, kernel[fan_in:]
    at, along = (tuple(rng.standard_normal(shape) for shape in shapes) for _ in range(2))

    def projected(x, kernel, bias):
        return encoder.project({"kernel": kernel, "bias": bias}, equation, x)

    def plain(x, kernel, bias):
        return jnp.einsum(equation, x, kernel) + bias

    def derivatives(function):
        def loss(*values):
            return jnp.sin(function(*values)).sum()

        gradient = jax.grad(loss, (0, 1, 2))
        return (
            function(*at),
            jax.jvp(gradient, at, along),
            jax.grad(
                lambda *values: sum(
                    (g * t).sum() for g, t in zip(gradient(*values), along, strict=True)
                ),
                (0, 1, 2),
            )(*at),
        )

    with jax.enable_x64(True):
        found, expected = derivatives(projected), derivatives(plain)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected
    )


def test_gelu_is_as_close_to_float64_as_torch_is():
    x = np.linspace(-8, 8, 100_001).astype(np.float32)
    expected = torch.nn.functional.gelu(torch.tensor(x, dtype=torch.float64)).numpy()
    theirs = torch.nn.functional.gelu(torch.tensor(x)).numpy()

    def error(found):
        return np.sqrt(np.mean((np.asarray(found, np.float64) - expected) ** 2))

    assert error(ACTIVATIONS["gelu"](jnp.asarray(x))) < 1.5 * error(theirs)


def test_dropout_draws_for_every_head_and_example_and_keeps_the_mean():
    x = jnp.ones((8, 4, 32, 32))
    dropped = np.asarray(encoder.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(4 / 3)}
    assert abs(dropped.mean() - 1) < 0.02
    flat = dropped.reshape(32, -1)
    assert len({row.tobytes() for row in flat}) == 32
    assert encoder.dropout(x, 0.25, None) is x


@pytest.mark.parametrize("shape", [(64, 4097), (64, 3, 1367), (4096, 1)])
def test_dropout_draws_are_independent(shape):
    """Four draws share a block of random bits: neither they nor neighbours know of each other."""
    rate, n = 0.1, np.prod(shape)
    dropped = np.asarray(encoder.dropout(jnp.ones(shape), rate, jax.random.key(1))) == 0
    spread = 5 / np.sqrt(n)
    assert abs(dropped.mean() - rate) < spread * np.sqrt(rate * (1 - rate))
    flat = dropped.reshape(len(dropped), -1) - rate
    size = flat.shape[1]
    for lag in {1, 2, 3, size // 4, size // 2, size - 1} - {0}:
        pairs = flat[:, :-lag] * flat[:, lag:]
        if pairs.size:
            assert abs(pairs.mean()) < 5 / np.sqrt(pairs.size) * rate * (1 - rate), lag
    rows = flat[:-1] * flat[1:]
    assert abs(rows.mean()) < 5 / np.sqrt(rows.size) * rate * (1 - rate)


def test_dropout_takes_keys_of_every_kind():
    module = Encoder(TINY, Execution())
    params, ids = random_params(TINY, "encoder"), some_ids(TINY)

    def drawn(key):
        return module.apply(
            {"params": params}, ids, deterministic=False, rngs={"dropout": key}
        ).last_hidden_state

    np.testing.assert_array_equal(drawn(jax.random.PRNGKey(3)), drawn(jax.random.key(3)))
    rbg = [drawn(jax.random.key(seed, impl="rbg")) for seed in (3, 4)]
    assert np.isfinite(rbg[0]).all() and not np.array_equal(*rbg)


def test_layers_that_stand_apart_are_the_same_layers(case):
    """Bit for bit; and on a CPU, in the same memory."""
    config, params, ids = case
    params = jax.device_put(params)
    apart = parameters.unstack(params)
    stacked = params["encoder"]["layers"]["mlp"]["wi"]["kernel"]
    kernel = apart["encoder"]["layers"][1]["mlp"]["wi"]["kernel"]
    if stacked[0].nbytes % 64 == 0:
        offset = kernel.unsafe_buffer_pointer() - stacked.unsafe_buffer_pointer()
        assert offset == stacked[0].nbytes
    find = functools.partial(encode, config, ids=ids, keep_residuals=True, keep_attentions=True)
    jax.tree.map(np.testing.assert_array_equal, find(params=apart), find(params=params))
    with pytest.raises(InputError, match="unstack"):
        encode(config, apart, ids, Execution(scan_layers=True))


def test_cross_entropy_counts_what_it_is_told_to():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 7, 11)).astype(np.float32)
    labels = rng.integers(0, 11, (4, 7))
    weights = (rng.random((4, 7)) < 0.5).astype(np.float32)
    scores = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights))
    wide = logits.astype(np.float64)
    log_p = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    assert float(scores.loss) == pytest.approx(-(picked * weights).sum(), rel=1e-6)
    assert float(scores.correct) == ((logits.argmax(-1) == labels) * weights).sum()
    assert float(scores.weight) == weights.sum()
    empty = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), jnp.zeros((4, 7)))
    assert float(empty.loss) == float(empty.weight) == 0.0


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


def test_scores_of_rows_add_up():
    params = random_params(TINY)
    batch = masked_rows(10, 3)
    score = jax.jit(functools.partial(masked_lm_scores, MaskedLM(TINY)))
    whole = score(params, batch)
    rows = [score(params, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(4)]
    total = sum(rows, Scores.zero())
    for name in ("loss", "correct", "weight"):
        assert float(getattr(total, name)) == pytest.approx(float(getattr(whole, name)), rel=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scan_copies_no_parameters(remat):
    """Neither what the loop takes nor its gradient nor what the backward pass finds stored."""
    config = TINY.replace(
        num_hidden_layers=12, hidden_size=256, num_attention_heads=4, intermediate_size=1024
    )
    module = MaskedLM(config, Execution(scan_layers=True, remat=remat))
    params, batch = random_params(config), masked_rows(1, 4)
    keys = jax.random.split(jax.random.key(0), 1)

    def clipped_step(params):
        # Both of its uses, as an optimizer that clips has them.
        gradient = jax.grad(lambda p: masked_lm_scores(module, p, batch, keys).loss)(params)
        norm = sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient))
        return jax.tree.map(lambda p, g: p - g * norm, params, gradient)

    compiled = jax.jit(clipped_step, donate_argnums=0).lower(params).compile()
    layers = sum(leaf.nbytes for leaf in jax.tree.leaves(params["encoder"]["layers"]))
    # The gradient is once all layers; the rest is of single layers and activations.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.7 * layers


def test_logits_in_parts_are_the_same_in_less_memory():
    config = TINY.replace(vocab_size=20_000)
    params, batch = random_params(config), masked_rows(32, 26)
    keys = jax.random.split(jax.random.key(0), 4)

    def compiled(at_once):
        module = MaskedLM(config, Execution(logits_chunk_size=at_once))

        def loss(params):
            scores = masked_lm_scores(module, params, batch, keys)
            return scores.loss, scores

        return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params).compile()

    whole, parts = compiled(0), compiled(8)  # 26 is no multiple of 8: the last part is filled up
    memory = [c.memory_analysis().temp_size_in_bytes for c in (whole, parts)]
    assert memory[1] < 0.6 * memory[0]
    ((_, expected), gradient), ((_, found), other) = whole(params), parts(params)
    for name in ("loss", "correct", "weight"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-5 * np.abs(gradient["lm_head"]["bias"]).max()
        )

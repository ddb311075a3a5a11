"""The encoder's results do not depend on padding, packing, scan, remat, selected positions,
batching, vmap and pmap."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prelnroberta import params as parameters
from prelnroberta.errors import InputError
from prelnroberta.model.encoder import Encoder, Execution
from prelnroberta.model.heads import MaskedLM
from prelnroberta.model.losses import masked_lm_scores
from tests.helpers.masked_batches import masked_rows
from tests.helpers.programs import ROOT
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
def test_padding_does_not_change_real_outputs(case, places):
    config, params, ids = case
    plain = encode(config, params, ids).last_hidden_state
    where = {"right": [12] * 4, "left": [0] * 4, "middle": [3, 3, 7, 9]}[places]
    padded = np.insert(ids, where, config.pad_token_id, axis=1)
    real = padded != config.pad_token_id
    output = encode(config, params, padded, attention_mask=jnp.asarray(real)).last_hidden_state
    np.testing.assert_allclose(output[real].reshape(plain.shape), plain, **SIMILAR)


def test_fully_padded_row_is_finite_and_does_not_affect_others(case):
    config, params, ids = case
    padded = np.concatenate([ids, np.full((1, 12), config.pad_token_id)])
    mask = jnp.asarray(padded != config.pad_token_id)
    output = encode(config, params, padded, attention_mask=mask).last_hidden_state
    assert np.isfinite(output).all()
    plain = encode(config, params, ids).last_hidden_state
    np.testing.assert_allclose(output[:3], plain, **SIMILAR)


def test_packed_segments_match_separate_rows(case):
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


def test_gradient_reaches_exactly_its_own_segment():
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
def test_execution_settings_do_not_change_results(execution):
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


def test_computing_selected_positions_is_exact(case):
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


def test_computing_selected_positions_of_a_decoder_is_exact():
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


def test_vmap_matches_loop():
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
    command = [sys.executable, "-m", "tests.programs.pmap_every_module"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, timeout=600, env=environment, cwd=ROOT)


def test_batch_matches_single_rows_and_jit_matches_eager(case):
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


def test_dropout_accepts_keys_of_every_type():
    module = Encoder(TINY, Execution())
    params, ids = random_params(TINY, "encoder"), some_ids(TINY)

    def drawn(key):
        return module.apply(
            {"params": params}, ids, deterministic=False, rngs={"dropout": key}
        ).last_hidden_state

    np.testing.assert_array_equal(drawn(jax.random.PRNGKey(3)), drawn(jax.random.key(3)))
    rbg = [drawn(jax.random.key(seed, impl="rbg")) for seed in (3, 4)]
    assert np.isfinite(rbg[0]).all() and not np.array_equal(*rbg)


def test_unstacked_layers_match_stacked_layers(case):
    """Bit for bit; and on a CPU, in the same memory."""
    config, params, ids = case
    params = jax.device_put(params)
    apart = parameters.unstack_layers(params)
    stacked = params["encoder"]["layers"]["mlp"]["wi"]["kernel"]
    kernel = apart["encoder"]["layers"][1]["mlp"]["wi"]["kernel"]
    if stacked[0].nbytes % 64 == 0:
        offset = kernel.unsafe_buffer_pointer() - stacked.unsafe_buffer_pointer()
        assert offset == stacked[0].nbytes
    find = functools.partial(encode, config, ids=ids, keep_residuals=True, keep_attentions=True)
    jax.tree.map(np.testing.assert_array_equal, find(params=apart), find(params=params))
    with pytest.raises(InputError, match="unstack_layers"):
        encode(config, apart, ids, Execution(scan_layers=True))


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

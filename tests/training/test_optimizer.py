"""Schedules, AdamW, LAMB, weight decay, clipping, layer decay and frozen parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prelnroberta import params as parameters
from prelnroberta.errors import InputError
from prelnroberta.training.optimizer import (
    OptimizerConfig,
    adamw,
    learning_rate_multipliers,
    learning_rate_schedule,
    make_optimizer,
    weight_decay_mask,
)
from tests.helpers.small_models import TINY, random_params


def settings(**changes):
    return OptimizerConfig(**{"steps": 100, "learning_rate": 0.4, "warmup_steps": 20} | changes)


# Half way down: step 60 of 20..100, from 0.4 to 0.1.
HALF = {
    "linear": 0.25,
    "cosine": 0.25,
    "polynomial": 0.1 + 0.3 * 0.5**3,
    "constant": 0.4,
}


@pytest.mark.parametrize("schedule", HALF)
def test_schedules(schedule):
    rate = learning_rate_schedule(
        settings(schedule=schedule, end_learning_rate=0.1, polynomial_power=3.0)
    )
    np.testing.assert_allclose(rate(0), 0.0)
    np.testing.assert_allclose(rate(5), 0.1, rtol=1e-6)
    np.testing.assert_allclose(rate(20), 0.4, rtol=1e-6)
    np.testing.assert_allclose(rate(60), HALF[schedule], rtol=1e-6)
    end = 0.4 if schedule == "constant" else 0.1
    np.testing.assert_allclose([rate(100), rate(500)], end, rtol=1e-6)
    if schedule == "cosine":  # slow, fast, slow
        expected = 0.1 + 0.3 * (1 + np.cos(np.pi / 4)) / 2
        np.testing.assert_allclose(rate(40), expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", HALF)
def test_first_step_has_peak_rate_without_warmup(schedule):
    np.testing.assert_allclose(
        learning_rate_schedule(settings(schedule=schedule, warmup_steps=0))(0), 0.4
    )


def test_warmup_may_last_the_whole_run():
    rate = learning_rate_schedule(settings(warmup_steps=100))
    np.testing.assert_allclose([rate(50), rate(99)], [0.2, 0.396], rtol=1e-6)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_weight_decay_applies_to_selected_kinds(biases, norms):
    """Without a gradient AdamW only decays: p becomes p * (1 - rate * decay), or stays."""
    chosen = settings(
        warmup_steps=0,
        weight_decay=0.5,
        decay_biases=biases,
        decay_norms=norms,
        schedule="constant",
    )
    params = jax.tree.map(jnp.asarray, random_params(TINY))
    optimizer = adamw(chosen, TINY)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    after = parameters.flatten(optax.apply_updates(params, updates))
    before = parameters.flatten(params)
    mask = parameters.flatten(weight_decay_mask(chosen, TINY))
    kinds = {"kernel": True, "embedding": True, "bias": biases, "norm": norms}
    seen = set()
    for path, row in parameters.table(TINY).items():
        decays = kinds[row.kind]
        assert mask[path] is decays, path
        np.testing.assert_allclose(after[path], before[path] * (0.8 if decays else 1.0), rtol=1e-6)
        seen.add(row.kind)
    assert seen == set(kinds)
    # By name, so that the table's kinds are held to something, too.
    assert not kinds["norm"] or mask["embeddings/norm/bias"] is norms
    for path, decays in {
        "embeddings/word": True,
        "encoder/layers/attention/query/kernel": True,
        "encoder/layers/attention/query/bias": biases,
        "encoder/layers/mlp_norm/scale": norms,
        "encoder/layers/mlp_norm/bias": norms,
        "encoder/final_norm/scale": norms,
        "lm_head/bias": biases,
    }.items():
        assert mask[path] is decays, path


def first_update(gradient, **changes):
    params = jax.tree.map(jnp.asarray, random_params(TINY))
    optimizer = adamw(settings(warmup_steps=0, weight_decay=0.0, adam_epsilon=1.0, **changes), TINY)
    return optimizer.update(gradient, optimizer.init(params), params)[0]


def test_clipping_uses_global_norm():
    gradient = jax.tree.map(lambda x: jnp.asarray(x) * 0.1, random_params(TINY, seed=1))
    norm = float(optax.global_norm(gradient))
    shorter = jax.tree.map(lambda g: g / norm, gradient)

    def assert_same(a, b):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-9), a, b)

    assert norm > 2
    assert_same(first_update(gradient, clip_norm=1.0), first_update(shorter))
    assert_same(first_update(gradient, clip_norm=2 * norm), first_update(gradient))
    assert_same(first_update(gradient, clip_norm=0.0), first_update(gradient))
    changed = optax.global_norm(first_update(gradient)), optax.global_norm(first_update(shorter))
    assert float(changed[0]) > 1.2 * float(changed[1])


def test_adam_matches_hand_computed_steps():
    """Two steps by hand, on one bias: bias-corrected moments, epsilon outside the root."""
    chosen = settings(warmup_steps=0, schedule="constant", adam_beta1=0.8, adam_beta2=0.6)
    params = jax.tree.map(jnp.asarray, random_params(TINY))
    optimizer = adamw(chosen, TINY)
    state = optimizer.init(params)
    value = np.float64(params["lm_head"]["bias"])
    m = v = np.zeros_like(value)
    for number, slope in enumerate((0.3, -0.1), 1):
        gradient = jax.tree.map(lambda p, slope=slope: jnp.full_like(p, slope), params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.8 * m + 0.2 * slope, 0.6 * v + 0.4 * slope**2
        value -= 0.4 * (m / (1 - 0.8**number)) / (np.sqrt(v / (1 - 0.6**number)) + 1e-6)
    np.testing.assert_allclose(params["lm_head"]["bias"], value, rtol=1e-5, atol=1e-6)


def test_lamb_step_length_is_layer_norm_times_rate():
    """Of each layer by itself, and in the direction of Adam; what is zero takes Adam's step."""
    chosen = settings(warmup_steps=0, schedule="constant", weight_decay=0.0, optimizer="lamb")
    params = jax.tree.map(jnp.asarray, random_params(TINY))
    params["lm_head"]["bias"] = jnp.zeros_like(params["lm_head"]["bias"])
    gradient = jax.tree.map(jnp.asarray, random_params(TINY, seed=1))
    updates = {}
    for name in ("lamb", "adamw"):
        optimizer = make_optimizer(dataclasses.replace(chosen, optimizer=name), TINY)
        updates[name], _ = optimizer.update(gradient, optimizer.init(params), params)
    updates = {name: parameters.flatten(tree) for name, tree in updates.items()}
    for path, row in parameters.table(TINY).items():
        value, ours, adam = (
            np.float64(tree[path]).reshape(TINY.num_hidden_layers if row.is_stacked else 1, -1)
            for tree in (parameters.flatten(params), updates["lamb"], updates["adamw"])
        )
        if path == "lm_head/bias":
            np.testing.assert_allclose(ours, adam, rtol=1e-5)
            continue
        length = np.linalg.norm(value, axis=1, keepdims=True)
        expected = 0.4 * length * adam / np.linalg.norm(adam, axis=1, keepdims=True)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-7, err_msg=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"steps": 0}, "steps=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": 101}, "warmup_steps=101, expected 0 to steps=100"),
        ({"schedule": "step"}, "schedule='step'"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"end_learning_rate": 0.5}, "end_learning_rate=0.5"),
        ({"polynomial_power": 0.0}, "polynomial_power=0.0"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0"),
        ({"adam_beta2": -0.1}, "adam_beta2=-0.1"),
        ({"adam_epsilon": 0.0}, "adam_epsilon=0.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"clip_norm": float("nan")}, "clip_norm=nan"),
    ],
)
def test_bad_fields_raise(changes, message):
    with pytest.raises(InputError) as error:
        settings(**changes)
    assert message in str(error.value) and "expected" in str(error.value)


def stepped(gradient=1.0, **changes):
    """The leaves that one AdamW step leaves, over where they began: path -> factor by element."""
    settings = OptimizerConfig(
        steps=10, learning_rate=0.1, weight_decay=0.0, adam_epsilon=1e-12, **changes
    )
    model = "token_classification"
    params = random_params(TINY, model)
    optimizer = make_optimizer(settings, TINY, model)
    gradients = jax.tree.map(lambda x: np.full_like(x, gradient), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return parameters.flatten(updates)


def test_layerwise_learning_rates():
    N, decay = TINY.num_hidden_layers, 0.5
    for path, update in stepped(layer_decay=decay).items():
        if path.startswith("embeddings/"):
            expected = decay ** (N + 1)
        elif path.startswith("encoder/layers/"):
            by_layer = decay ** (N - np.arange(N))
            expected = by_layer.reshape(N, *(1 for _ in update.shape[1:]))
        else:
            expected = 1.0
        np.testing.assert_allclose(
            update, np.broadcast_to(-0.1 * expected, update.shape), rtol=1e-5
        )


def test_frozen_parameters_stay_and_do_not_count_in_the_norm():
    updates = stepped(freeze_layers=1, freeze=("*/key/*", "classifier/bias"), clip_norm=1.0)
    for path, update in updates.items():
        if path.startswith("embeddings/") or "/key/" in path or path == "classifier/bias":
            assert not np.any(update), path
        elif path.startswith("encoder/layers/"):
            assert not np.any(update[0]) and np.all(update[1:]), path
        else:
            assert np.all(update), path
    # Clipping sees what moves and nothing else.
    rates = learning_rate_multipliers(
        OptimizerConfig(steps=1, learning_rate=1, freeze=("embeddings/*",)), TINY, "encoder"
    )
    params = random_params(TINY, "encoder")
    settings = OptimizerConfig(steps=1, learning_rate=1, clip_norm=1.0, freeze=("embeddings/*",))
    huge = jax.tree.map(
        lambda p, rate: np.full_like(p, 1.0 if np.all(rate) else 1e9), params, rates
    )
    optimizer = make_optimizer(settings, TINY, "encoder")
    _, state = optimizer.update(huge, optimizer.init(params), params)
    moments = [
        s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")
    ]
    np.testing.assert_allclose(optax.tree.norm(moments[0].mu), 0.1, rtol=1e-5)


def test_bad_settings_raise():
    with pytest.raises(InputError, match="freeze_layers=9, expected 0 to 2"):
        make_optimizer(OptimizerConfig(steps=1, learning_rate=1, freeze_layers=9), TINY)
    with pytest.raises(InputError, match="freeze='encodr/"):
        make_optimizer(OptimizerConfig(steps=1, learning_rate=1, freeze=("encodr/*",)), TINY)
    with pytest.raises(InputError, match="layer_decay"):
        OptimizerConfig(steps=1, learning_rate=1, layer_decay=1.5)

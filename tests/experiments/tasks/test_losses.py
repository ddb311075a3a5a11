"""Losses with class weights and smoothing against torch; learning rates by layer, frozen parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from prelnroberta import params as parameters
from prelnroberta.config import IGNORE_INDEX
from prelnroberta.errors import InputError
from prelnroberta.model import losses
from prelnroberta.model.losses import LossSettings
from prelnroberta.training.optimizer import (
    OptimizerConfig,
    learning_rate_multipliers,
    make_optimizer,
)
from tests.helpers.small_models import TINY, random_params

WEIGHTS = (0.3, 1.7, 2.0, 0.9, 1.1)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs(weights, smoothing):
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((4, 7, 5)).astype(np.float32)
    labels = rng.integers(0, 5, (4, 7))
    labels[rng.random((4, 7)) < 0.3] = IGNORE_INDEX
    settings = LossSettings(class_weights=weights, label_smoothing=smoothing)

    def ours(logits):
        return losses.label_scores(logits, jnp.asarray(labels), settings).mean

    inputs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(
        inputs.reshape(-1, 5),
        torch.tensor(labels).reshape(-1),
        weight=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        label_smoothing=smoothing,
    )
    theirs.backward()
    loss, gradient = jax.value_and_grad(ours)(logits)
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, inputs.grad.numpy(), atol=1e-7)


def test_rows_that_fill_a_batch_count_in_no_loss():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((6, 3)).astype(np.float32)
    labels = rng.random((6, 3)).round().astype(np.float32)
    weights = np.float32([1, 1, 1, 1, 0, 0])
    for score in (losses.multi_label_scores, losses.regression_scores):
        alone, among = score(logits[:4], labels[:4]), score(logits, labels, weights)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), alone, among)
    one = losses.regression_scores(logits[:, :1], labels[:, 0])
    np.testing.assert_allclose(one.loss, ((logits[:, 0] - labels[:, 0]) ** 2).sum(), rtol=1e-6)
    assert one.weight == 6


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


def test_each_layer_learns_at_its_own_rate():
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


def test_frozen_parts_stay_and_count_in_no_norm():
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


def test_bad_settings_are_named():
    with pytest.raises(InputError, match="freeze_layers=9, expected 0 to 2"):
        make_optimizer(OptimizerConfig(steps=1, learning_rate=1, freeze_layers=9), TINY)
    with pytest.raises(InputError, match="freeze 'encodr/"):
        make_optimizer(OptimizerConfig(steps=1, learning_rate=1, freeze=("encodr/*",)), TINY)
    with pytest.raises(InputError, match="layer_decay"):
        OptimizerConfig(steps=1, learning_rate=1, layer_decay=1.5)

"""Losses are sums with weights that add up over rows, parts and batches."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prelnroberta.model import losses
from prelnroberta.model.encoder import Execution
from prelnroberta.model.heads import MaskedLM
from prelnroberta.model.losses import Scores, cross_entropy, masked_lm_scores
from tests.helpers.masked_batches import masked_rows
from tests.helpers.small_models import TINY, random_params


def test_filler_rows_do_not_count_in_losses():
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


def test_cross_entropy_is_weighted():
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


def test_scores_of_rows_add_up():
    params = random_params(TINY)
    batch = masked_rows(10, 3)
    score = jax.jit(functools.partial(masked_lm_scores, MaskedLM(TINY)))
    whole = score(params, batch)
    rows = [score(params, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(4)]
    total = sum(rows, Scores.zero())
    for name in ("loss", "correct", "weight"):
        assert float(getattr(total, name)) == pytest.approx(float(getattr(whole, name)), rel=1e-5)


def test_chunked_logits_match_in_less_memory():
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


def test_label_smoothing_ignores_masked_classes():
    """Of four logits two are no class: the loss is that of the two others alone."""
    logits, labels = np.float32([[0.3, -1.2, -1e30, -1e30]]), np.array([1])
    smooth = losses.LossSettings(label_smoothing=0.3)
    alone = losses.label_scores(logits[:, :2], labels, smooth)
    np.testing.assert_allclose(losses.label_scores(logits, labels, smooth).loss, alone.loss)

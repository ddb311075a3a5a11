"""The train step: exact sums under gradient accumulation, windows of scores, and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prelnroberta import params as parameters
from prelnroberta.distributed.sharding import Layout, Parallelism
from prelnroberta.model.heads import MaskedLM
from prelnroberta.model.losses import Scores, masked_lm_scores
from prelnroberta.training.train_step import TrainState, compile_eval_step, make_train_step
from tests.helpers.masked_batches import ONE_LAYER, masked_batch
from tests.helpers.small_models import random_params

MODULE = MaskedLM(ONE_LAYER)


def score(params, batch, key):
    del key  # no dropout
    return masked_lm_scores(MODULE, params, batch, None)


def after(steps, accumulate, optimizer=None, **batch):
    optimizer = optimizer or optax.sgd(0.1)
    step = jax.jit(
        make_train_step(score, optimizer, seed=0, gradient_accumulation_steps=accumulate)
    )
    state = TrainState.create(jax.device_put(random_params(ONE_LAYER)), optimizer)
    for number in range(steps):
        state, scores = step(state, masked_batch(seed=number, **batch))
    return state, scores


def test_gradient_accumulation_matches_whole_batch():
    (whole, one), (parts, four) = after(3, 1), after(3, 4)
    assert float(one.weight) == float(four.weight) == 21 + 3  # rows 0..7: 1..6, 1, 2
    for path, value in parameters.flatten(whole.params).items():
        np.testing.assert_allclose(parameters.flatten(parts.params)[path], value, atol=1e-6)
    np.testing.assert_allclose(whole.gradient_norm, parts.gradient_norm, rtol=1e-5)
    np.testing.assert_allclose(one.loss, four.loss, rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_rows_without_masks_have_no_weight(accumulate):
    """Two rows of four have none, in one slice of the accumulation all rows."""
    state, scores = after(1, accumulate, optax.adam(1e-3), empty=(0, 1, 5))
    assert float(scores.weight) == 24 - (1 + 2 + 6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    batch = masked_batch(empty=(0, 1, 5))
    changed = batch | {"masked_labels": batch["masked_labels"].copy()}
    changed["masked_labels"][[0, 1, 5]] = 7
    gradient = jax.jit(jax.grad(lambda params, batch: score(params, batch, None).loss))
    gradients = [gradient(random_params(ONE_LAYER), b) for b in (batch, changed)]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


def test_batch_without_masks_changes_only_the_step():
    state, scores = after(1, 2, optax.sgd(1.0), empty=range(8))
    assert float(scores.weight) == 0 and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, random_params(ONE_LAYER))


def test_window_sums_scores_since_reset():
    step = jax.jit(make_train_step(score, optax.sgd(0.1), seed=0))
    state = TrainState.create(jax.device_put(random_params(ONE_LAYER)), optax.sgd(0.1))
    total = Scores.zero()
    for number in range(3):
        state, scores = step(state, masked_batch(seed=number, empty=(number,)))
        total += scores
    jax.tree.map(np.testing.assert_array_equal, state.window, total)
    assert all(float(x) == 0 for x in jax.tree.leaves(state.reset_window().window))


def test_dropout_depends_only_on_seed_step_and_row():
    config = ONE_LAYER.replace(hidden_dropout_prob=0.3)
    module = MaskedLM(config)

    def noisy(params, batch, key):
        return masked_lm_scores(module, params, batch, key)

    optimizer = optax.sgd(0.0)
    state = TrainState.create(random_params(ONE_LAYER), optimizer)

    def losses(seed, accumulate, *numbers):
        step = jax.jit(make_train_step(noisy, optimizer, seed, accumulate))
        return [
            float(step(state.replace(step=jnp.int32(n)), masked_batch())[1].loss) for n in numbers
        ]

    first, again, later = losses(0, 1, 1, 1, 2)
    assert first == again
    assert len({first, later, *losses(1, 1, 1)}) == 3
    np.testing.assert_allclose(losses(0, 4, 1), first, rtol=1e-6)


def test_evaluation_has_no_dropout():
    layout = Layout(Parallelism(), ONE_LAYER)
    score = compile_eval_step(lambda p, b, key: Scores(*[jnp.float32(key is None)] * 3), layout)
    found = score({}, layout.shard_batch(masked_batch()))
    assert float(found.loss) == 1

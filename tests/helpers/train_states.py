"""Small training states for tests of checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prelnroberta.training.train_step import TrainState


def train_state(step, seed=None, size=60):
    params = {"w": jax.random.normal(jax.random.key(seed or step), (size, size)), "b": jnp.ones(3)}
    made = TrainState.create(params, optax.adam(1e-3))
    window = dataclasses.replace(made.window, loss=jnp.float32(step / 3))
    return made.replace(step=jnp.int32(step), window=window)


def assert_same_state(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)

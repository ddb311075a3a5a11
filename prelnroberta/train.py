"""Training state and the one pure step; `as_jit` compiles it.

The step knows no model, no data and no device: it is given a function from (params, batch,
dropout key) to `Scores`, whose sums over rows make its gradient exact under any accumulation or
sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from prelnroberta.heads import Scores
from prelnroberta.params import Tree

Batch = dict[str, jax.Array]
ScoreFn = Callable[[Tree, Batch, jax.Array | None], Scores]


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes; a checkpoint holds all of it.

    Attributes:
        step: [] int32, optimizer steps taken.
        params: the parameter tree, float32.
        opt_state: optax's.
        window: scores summed since they were last reported. They live here so that what is
            reported after a resume is what an uninterrupted run reports.
        gradient_norm: [] float32, of the last step's mean gradient, before clipping.
    """

    step: jax.Array
    params: Tree
    opt_state: Any
    window: Scores
    gradient_norm: jax.Array

    @classmethod
    def create(cls, params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            window=Scores.zero(),
            gradient_norm=jnp.zeros((), jnp.float32),
        )

    def new_window(self) -> TrainState:
        return self.replace(window=Scores.zero())


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Scores]]


def train_step(
    score: ScoreFn, optimizer: optax.GradientTransformation, seed: int, accumulate: int = 1
) -> TrainStep:
    """The pure training step (state, batch) -> (next state, scores of this batch).

    Args:
        score: batch -> summed scores; its loss sum is differentiated.
        seed: dropout keys are a function of (seed, step, slice of the batch), nothing else.
        accumulate: slices that the batch's rows [B, ...] are cut into, one after the other;
            gradients of sums add up, and are divided by the total weight once.
    """

    def gradient(params: Tree, batch: Batch, key: jax.Array) -> tuple[Scores, Tree]:
        def loss(params: Tree) -> tuple[jax.Array, Scores]:
            scores = score(params, batch, key)
            return scores.loss, scores

        (_, scores), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return scores, gradients

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Scores]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate == 1:
            scores, gradients = gradient(state.params, batch, key)
        else:
            slices = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

            def add(total: tuple[Scores, Tree], part: tuple[Batch, jax.Array]):
                rows, key = part
                return jax.tree.map(jnp.add, total, gradient(state.params, rows, key)), None

            start = (Scores.zero(), jax.tree.map(jnp.zeros_like, state.params))
            keys = jax.random.split(key, accumulate)
            (scores, gradients), _ = jax.lax.scan(add, start, (slices, keys))
        mean = 1.0 / jnp.maximum(scores.weight, 1.0)
        gradients = jax.tree.map(lambda g: g * mean, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        after = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            window=state.window + scores,
            gradient_norm=optax.tree.norm(gradients),
        )
        return after, scores

    return step


def as_jit(step: TrainStep) -> TrainStep:
    """Compiles the step; the old state's memory becomes the new one's."""
    return jax.jit(step, donate_argnums=0)


def evaluate(score: ScoreFn) -> Callable[[Tree, Batch], Scores]:
    """Compiles (params, batch) -> scores without dropout."""
    return jax.jit(lambda params, batch: score(params, batch, None))

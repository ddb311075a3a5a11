"""The training state and the training step, compiled for one device or many.

The step is a pure function that knows no model, no data and no device. It takes a `ScoreFn`, a
function of (params, batch, dropout rngs) that returns `Scores`. Scores are sums over rows, so the
gradient is exact under any gradient accumulation or sharding. Each row has its own dropout rng,
a function of (seed, step, row of the batch): the number of devices, hosts and microbatches does not
change the dropout masks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax

from prelnroberta.distributed.sharding import Layout
from prelnroberta.model.losses import Scores
from prelnroberta.params import Tree

Batch = dict[str, jax.Array]
# (params, batch, dropout rngs [B] or None) -> sums over the rows of the batch
ScoreFn = Callable[[Tree, Batch, jax.Array | None], Scores]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and writes. A checkpoint holds all of it.

    Attributes:
        step: [] int32, optimizer steps taken.
        params: the parameter tree, float32.
        opt_state: the optax state.
        window: scores summed since the last report. They are part of the state so that a resumed
            run reports the same numbers as an uninterrupted one.
        gradient_norm: [] float32, global norm of the last mean gradient, before clipping.
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

    def reset_window(self) -> TrainState:
        return self.replace(window=jax.tree.map(jnp.zeros_like, self.window))


# Scores and the gradient of their loss, both summed over rows.
SummedGradients = tuple[Scores, Tree]


def _no_reduction(sums: SummedGradients) -> SummedGradients:
    return sums


class TrainStep(Protocol):
    """(state, batch) -> (next state, scores of the batch).

    A device that has only some rows of the batch also passes `first_row`, the index of its first
    row, and `reduce`, which sums over devices. `compile_train_step` does this for pmap.
    """

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        first_row: jax.Array | int = 0,
        reduce: Callable[[SummedGradients], SummedGradients] = _no_reduction,
    ) -> tuple[TrainState, Scores]: ...


def make_train_step(
    score_fn: ScoreFn,
    optimizer: optax.GradientTransformation,
    seed: int,
    gradient_accumulation_steps: int = 1,
) -> TrainStep:
    """Returns the pure training step.

    Args:
        score_fn: returns the summed scores of a batch; the step differentiates their loss.
        seed: with the step and the index of a row in the batch, determines the row's dropout rng.
        gradient_accumulation_steps: microbatches that the rows [B, ...] are split into. They are
            computed one after the other. Their gradients, which are sums, are added up and divided
            by the total weight once.
    """

    def sum_gradients(params: Tree, batch: Batch, dropout_rngs: jax.Array) -> SummedGradients:
        def loss_fn(params: Tree) -> tuple[jax.Array, Scores]:
            scores = score_fn(params, batch, dropout_rngs)
            return scores.loss, scores

        (_, scores), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return scores, gradients

    def split_microbatches(x: jax.Array) -> jax.Array:
        """[B, ...] -> [steps, B / steps, ...]: row r goes to microbatch r % steps. When the rows
        are sharded over devices, each device has its share of every microbatch and no row moves."""
        return x.reshape(-1, gradient_accumulation_steps, *x.shape[1:]).swapaxes(0, 1)

    def accumulate_gradients(
        params: Tree, batch: Batch, dropout_rngs: jax.Array
    ) -> SummedGradients:
        def add(
            sums: SummedGradients, microbatch: tuple[Batch, jax.Array]
        ) -> tuple[SummedGradients, None]:
            return jax.tree.map(jnp.add, sums, sum_gradients(params, *microbatch)), None

        zeros = (Scores.zero(), jax.tree.map(jnp.zeros_like, params))
        microbatches = jax.tree.map(split_microbatches, (batch, dropout_rngs))
        return jax.lax.scan(add, zeros, microbatches)[0]

    def step(
        state: TrainState,
        batch: Batch,
        first_row: jax.Array | int = 0,
        reduce: Callable[[SummedGradients], SummedGradients] = _no_reduction,
    ) -> tuple[TrainState, Scores]:
        step_rng = jax.random.fold_in(jax.random.key(seed), state.step)
        rows = first_row + jnp.arange(len(jax.tree.leaves(batch)[0]))
        dropout_rngs = jax.vmap(partial(jax.random.fold_in, step_rng))(rows)
        compute = sum_gradients if gradient_accumulation_steps == 1 else accumulate_gradients
        scores, gradients = reduce(compute(state.params, batch, dropout_rngs))
        inverse_weight = 1.0 / jnp.maximum(scores.weight, 1.0)
        gradients = jax.tree.map(lambda g: g * inverse_weight, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        next_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            window=state.window + scores,
            gradient_norm=optax.tree.norm(gradients),
        )
        return next_state, scores

    return step


def compile_train_step(step: TrainStep, layout: Layout) -> Callable:
    """Returns (state, batch) -> (state, scores), jitted for the devices of a layout.

    The old state is donated: its memory becomes that of the new one. Make the state with
    `layout.init_sharded` and the batch with `layout.shard_batch`. Call the function, or
    `.lower(state, batch).compile()`, inside `layout.use_mesh()`.
    """
    return _pmap_train_step(step, layout) if layout.is_pmap else _jit_train_step(step, layout)


def _jit_train_step(step: TrainStep, layout: Layout) -> Callable:
    """One program over the mesh: XLA's partitioner inserts the sums over devices."""

    def constrained_step(state: TrainState, batch: Batch) -> tuple[TrainState, Scores]:
        state, scores = step(state, batch)
        state = jax.lax.with_sharding_constraint(state, layout.shardings(state))
        return state, jax.lax.with_sharding_constraint(scores, layout.replicated)

    return jax.jit(constrained_step, donate_argnums=0)


_PMAP_AXIS = "devices"


def _pmap_train_step(step: TrainStep, layout: Layout) -> Callable:
    """The step on every device, on its own rows. Gradients and weights are summed over devices
    before the division."""

    def device_step(state: TrainState, batch: Batch) -> tuple[TrainState, Scores]:
        num_rows = len(jax.tree.leaves(batch)[0])
        first_row = jax.lax.axis_index(_PMAP_AXIS) * num_rows
        return step(state, batch, first_row, partial(jax.lax.psum, axis_name=_PMAP_AXIS))

    return _pmap(device_step, layout, donate_argnums=0)


def _pmap(function: Callable, layout: Layout, **options: Any) -> Callable:
    """f(replicated, [devices, ...]) -> replicated."""
    devices = list(layout.mesh.devices.flat)
    return jax.pmap(
        function, _PMAP_AXIS, in_axes=(None, 0), out_axes=None, devices=devices, **options
    )


def compile_eval_step(score_fn: ScoreFn, layout: Layout) -> Callable[[Tree, Batch], Scores]:
    """Returns (params, batch) -> scores of all rows, without dropout, jitted for a layout."""

    def device_scores(params: Tree, batch: Batch) -> Scores:
        return jax.lax.psum(score_fn(params, batch, None), _PMAP_AXIS)

    if layout.is_pmap:
        return _pmap(device_scores, layout)
    return jax.jit(
        lambda params, batch: score_fn(params, batch, None), out_shardings=layout.replicated
    )


def compile_predict_step(
    function: Callable[[Tree, Batch], Any], layout: Layout
) -> Callable[[Tree, Batch], Any]:
    """Returns (params, batch) -> the outputs of `function` for all rows, jitted for a layout.

    The outputs are a pytree of arrays [rows, ...], gathered from all devices in the order of rows
    and available on every host. An output that is summed over the rows of a device must have shape
    [1, ...]; the caller adds up the parts of the devices.
    """

    def device_outputs(params: Tree, batch: Batch) -> Any:
        gather = partial(jax.lax.all_gather, axis_name=_PMAP_AXIS, tiled=True)
        return jax.tree.map(gather, function(params, batch))

    if layout.is_pmap:
        return _pmap(device_outputs, layout)
    return jax.jit(function, out_shardings=layout.replicated)

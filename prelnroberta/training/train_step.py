"""Training state and the one pure step; `parallel` compiles it for one device or many.

The step knows no model, no data and no device: it is given a function from (params, batch,
dropout keys) to `Scores`, whose sums over rows make its gradient exact under any accumulation or
sharding. Dropout keys are the rows' own: what is drawn follows from (seed, step, row of the batch),
on however many devices and hosts, and in however many parts, the batch is computed.
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
# (params, batch, dropout keys [B] or None) -> sums over the batch's rows
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

    def reset_window(self) -> TrainState:
        return self.replace(window=jax.tree.map(jnp.zeros_like, self.window))


Sums = tuple[Scores, Tree]


def _one_device(sums: Sums) -> Sums:
    return sums


class TrainStep(Protocol):
    """(state, batch) -> (next state, scores of this batch). The rest is for those who compile it
    for many devices, each with some of the rows: `parallel` does."""

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        first_row: jax.Array | int = 0,
        total: Callable[[Sums], Sums] = _one_device,
    ) -> tuple[TrainState, Scores]: ...


def make_train_step(
    score: ScoreFn, optimizer: optax.GradientTransformation, seed: int, gradient_accumulation_steps: int = 1
) -> TrainStep:
    """The pure training step.

    Args:
        score: batch -> summed scores; its loss sum is differentiated.
        seed: a row's dropout key is a function of (seed, step, its place in the batch), no more.
        gradient_accumulation_steps: slices that the batch's rows [B, ...] are dealt out to, computed one after the
            other; gradients of sums add up, and are divided by the total weight once.
    """

    def gradient(params: Tree, batch: Batch, keys: jax.Array) -> Sums:
        def loss(params: Tree) -> tuple[jax.Array, Scores]:
            scores = score(params, batch, keys)
            return scores.loss, scores

        (_, scores), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return scores, gradients

    def deal(x: jax.Array) -> jax.Array:
        """[B, ...] -> [gradient_accumulation_steps, B / gradient_accumulation_steps, ...], row r to slice r % gradient_accumulation_steps: where the
        rows are cut over devices, each has its share of every slice, and none moves."""
        return x.reshape(-1, gradient_accumulation_steps, *x.shape[1:]).swapaxes(0, 1)

    def step(
        state: TrainState,
        batch: Batch,
        first_row: jax.Array | int = 0,
        total: Callable[[Sums], Sums] = _one_device,
    ) -> tuple[TrainState, Scores]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        rows = first_row + jnp.arange(len(jax.tree.leaves(batch)[0]))
        keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
        if gradient_accumulation_steps == 1:
            sums = gradient(state.params, batch, keys)
        else:

            def add(sums: Sums, part: tuple[Batch, jax.Array]) -> tuple[Sums, None]:
                return jax.tree.map(jnp.add, sums, gradient(state.params, *part)), None

            start = (Scores.zero(), jax.tree.map(jnp.zeros_like, state.params))
            sums, _ = jax.lax.scan(add, start, jax.tree.map(deal, (batch, keys)))
        scores, gradients = total(sums)
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


def compile_train_step(step: TrainStep, layout: Layout) -> Callable:
    """Compiles (state, batch) -> (state, scores) for the devices of a layout.

    The old state's memory becomes the new one's. The state comes from `layout.init_sharded`, the batch from
    `layout.shard_batch`; call it, or `.lower(state, batch).compile()`, while `layout.use_mesh()`.
    """
    return _pmap_train_step(step, layout) if layout.is_pmap else _jit_train_step(step, layout)


def _jit_train_step(step: TrainStep, layout: Layout) -> Callable:
    """One program over the mesh: XLA's partitioner puts in the sums over devices."""

    def whole_batch(state: TrainState, batch: Batch) -> tuple[TrainState, Scores]:
        after, scores = step(state, batch)
        after = jax.lax.with_sharding_constraint(after, layout.shardings(after))
        return after, jax.lax.with_sharding_constraint(scores, layout.replicated)

    return jax.jit(whole_batch, donate_argnums=0)


_DEVICES = "devices"


def _pmap_train_step(step: TrainStep, layout: Layout) -> Callable:
    """The whole step on every device, on its part of the rows; gradients and weights are summed
    over devices before they are divided."""

    def part(state: TrainState, batch: Batch) -> tuple[TrainState, Scores]:
        rows = len(jax.tree.leaves(batch)[0])
        first_row = jax.lax.axis_index(_DEVICES) * rows
        return step(state, batch, first_row, partial(jax.lax.psum, axis_name=_DEVICES))

    return _pmap(part, layout, donate_argnums=0)


def _pmap(function: Callable, layout: Layout, **options: Any) -> Callable:
    """f(same on all, [devices, ...]) -> same on all."""
    devices = list(layout.mesh.devices.flat)
    return jax.pmap(
        function, _DEVICES, in_axes=(None, 0), out_axes=None, devices=devices, **options
    )


def compile_eval_step(score: ScoreFn, layout: Layout) -> Callable[[Tree, Batch], Scores]:
    """Compiles (params, batch) -> scores of all rows, without dropout, as `parallel` does."""

    def part(params: Tree, batch: Batch) -> Scores:
        return jax.lax.psum(score(params, batch, None), _DEVICES)

    if layout.is_pmap:
        return _pmap(part, layout)
    return jax.jit(lambda params, batch: score(params, batch, None), out_shardings=layout.replicated)


def compile_predict_step(function: Callable[[Tree, Batch], Any], layout: Layout) -> Callable[[Tree, Batch], Any]:
    """Compiles (params, placed batch) -> what `function` makes of its rows: a pytree of arrays
    [rows, ...], those of all devices in order, to be had on every host.

    A sum over the rows of a device has one row, and is summed up by the caller.
    """

    def part(params: Tree, batch: Batch) -> Any:
        gather = partial(jax.lax.all_gather, axis_name=_DEVICES, tiled=True)
        return jax.tree.map(gather, function(params, batch))

    if layout.is_pmap:
        return _pmap(part, layout)
    return jax.jit(function, out_shardings=layout.replicated)

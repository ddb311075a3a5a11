"""AdamW and LAMB: schedule, decay mask from the parameter table, clipping."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError

Schedule = Literal["linear", "cosine", "polynomial", "constant"]
Rule = Literal["adamw", "lamb"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the parameters move.

    Attributes:
        steps: optimizer steps of the whole run; the schedule ends there.
        learning_rate: the peak, reached after warm-up.
        optimizer: adamw, or lamb (You et al., 2020): each parameter's step scaled to its norm,
            for batches of tens of thousands of rows.
        warmup_steps: steps of linear rise from 0.
        schedule: the way from the peak down to `end_learning_rate` at `steps`; constant stays.
        polynomial_power: of the polynomial schedule; 1 is linear.
        adam_beta1, adam_beta2, adam_epsilon: as in AdamW (Loshchilov and Hutter, 2019).
        weight_decay: decoupled; scaled by the learning rate.
        decay_biases, decay_norms: whether these decay, too. fairseq decays everything, BERT and
            most fine-tuning neither. Kernels and embedding tables always do.
        clip_norm: largest global gradient norm; 0 does not clip.
        layer_decay: each layer learns at this times the rate of the one above it: the head and the
            final norm at the full rate, the last layer at `layer_decay` times it, the embeddings at
            its (N + 1)-th power (ELECTRA, Clark et al., 2020). 1 is one rate for all.
        freeze_layers: the embeddings and so many of the first layers stay as they are; 0: none do.
        freeze: patterns of paths, as in a shell, of what else stays as it is.

    Raises:
        InputError: naming the field, its value and what was expected.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 0
    schedule: Schedule = "linear"
    end_learning_rate: float = 0.0
    polynomial_power: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    weight_decay: float = 0.01
    decay_biases: bool = False
    decay_norms: bool = False
    clip_norm: float = 0.0
    layer_decay: float = 1.0
    freeze_layers: int = 0
    freeze: Sequence[str] = ()
    optimizer: Rule = "adamw"

    def __post_init__(self) -> None:
        def require(holds: bool, field: str, expected: str) -> None:
            if not holds:
                raise InputError(f"{field}={getattr(self, field)!r}, expected {expected}")

        require(self.steps > 0, "steps", "1 or more")
        require(0 <= self.warmup_steps <= self.steps, "warmup_steps", f"0 to steps={self.steps}")
        require(self.schedule in get_args(Schedule), "schedule", f"one of {get_args(Schedule)}")
        require(self.optimizer in get_args(Rule), "optimizer", f"one of {get_args(Rule)}")
        require(_positive(self.learning_rate), "learning_rate", "a number > 0")
        require(
            0 <= self.end_learning_rate <= self.learning_rate,
            "end_learning_rate",
            f"0 to learning_rate={self.learning_rate}",
        )
        require(_positive(self.polynomial_power), "polynomial_power", "a number > 0")
        require(0 <= self.adam_beta1 < 1, "adam_beta1", "a number in [0, 1)")
        require(0 <= self.adam_beta2 < 1, "adam_beta2", "a number in [0, 1)")
        require(_positive(self.adam_epsilon), "adam_epsilon", "a number > 0")
        require(self.weight_decay == 0 or _positive(self.weight_decay), "weight_decay", "0 or more")
        require(self.clip_norm == 0 or _positive(self.clip_norm), "clip_norm", "0 (off) or more")
        require(0 < self.layer_decay <= 1, "layer_decay", "a number in (0, 1]")
        require(self.freeze_layers >= 0, "freeze_layers", "0 (none) or more")


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def learning_rate_schedule(settings: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the number of steps already taken."""
    peak, end, warmup = settings.learning_rate, settings.end_learning_rate, settings.warmup_steps
    fall_steps = max(settings.steps - warmup, 1)
    if settings.schedule == "constant":
        fall = optax.constant_schedule(peak)
    elif settings.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, fall_steps, alpha=end / peak)
    else:
        power = settings.polynomial_power if settings.schedule == "polynomial" else 1.0
        fall = optax.polynomial_schedule(peak, end, power, fall_steps)
    if warmup == 0:
        return fall
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), fall], [warmup])


def weight_decay_mask(
    settings: OptimizerConfig, config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> parameters.Tree:
    """A tree of bools: which leaves decay, by the kinds of the parameter table."""
    decays = {
        "kernel": True,
        "embedding": True,
        "bias": settings.decay_biases,
        "norm": settings.decay_norms,
    }
    rows = parameters.table(config, model)
    return parameters.unflatten({path: decays[row.kind] for path, row in rows.items()})


def freeze_labels(params: parameters.Tree, patterns: Sequence[str]) -> parameters.Tree:
    """A tree of "frozen" and "trained" for `optax.multi_transform`, by patterns of paths.

    `optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)` leaves
    frozen leaves as they are and keeps no moments of them.

    Args:
        patterns: as in a shell, over whole paths: "embeddings/*", "*/key/bias".

    Raises:
        InputError: a pattern that matches no path.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    paths = parameters.flatten(params)
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise InputError(
                f"freeze {pattern!r}: matches no parameter; one is {next(iter(paths))}"
            )
    return parameters.unflatten(
        {
            path: "frozen" if any(fnmatch.fnmatch(path, p) for p in patterns) else "trained"
            for path in paths
        }
    )


def learning_rate_multipliers(
    settings: OptimizerConfig, config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> parameters.Tree | None:
    """What each leaf's learning rate is multiplied by: a tree of float32 arrays that broadcast
    against the leaves ([N, 1, ...] for stacked ones), 0 where frozen; None if all are 1.

    Raises:
        InputError: more frozen layers than there are, or a pattern that matches no path.
    """
    if settings.layer_decay == 1 and not settings.freeze_layers and not settings.freeze:
        return None
    N = config.num_hidden_layers
    if settings.freeze_layers > N:
        raise InputError(f"freeze_layers={settings.freeze_layers}, expected 0 to {N}, the layers")
    depths = np.arange(N + 2)  # embeddings, layers, and what stands above them
    rates = np.float32(settings.layer_decay) ** (N + 1 - depths)
    if settings.freeze_layers:
        rates[: settings.freeze_layers + 1] = 0.0
    shapes = parameters.shapes(config, model)
    labels = parameters.flatten(freeze_labels(parameters.unflatten(shapes), settings.freeze))

    def rate(path: str, row: parameters.Parameter) -> np.ndarray:
        if labels[path] == "frozen":
            return np.float32(0.0)
        if row.stacked:
            return rates[1:-1].reshape(N, *(1 for _ in shapes[path][1:]))
        return rates[0] if path.startswith("embeddings/") else rates[-1]

    rows = parameters.table(config, model)
    return parameters.unflatten({path: rate(path, row) for path, row in rows.items()})


def scale_learning_rates(
    optimizer: optax.GradientTransformation, rates: parameters.Tree
) -> optax.GradientTransformation:
    """Multiplies the steps of `optimizer` by `rates`. What is frozen counts in no gradient norm."""

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gradients = jax.tree.map(lambda g, rate: g * (rate > 0), gradients, rates)
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(lambda u, rate: u * rate, updates, rates), state

    return optax.GradientTransformation(optimizer.init, update)


def adamw(
    settings: OptimizerConfig, config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> optax.GradientTransformation:
    """The optimizer: clip by global norm, then AdamW. Moments are float32."""
    steps = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    steps.append(
        optax.adamw(
            learning_rate_schedule(settings),
            b1=settings.adam_beta1,
            b2=settings.adam_beta2,
            eps=settings.adam_epsilon,
            mu_dtype=jnp.float32,
            weight_decay=settings.weight_decay,
            mask=weight_decay_mask(settings, config, model),
        )
    )
    return optax.chain(*steps)


def lamb(
    settings: OptimizerConfig, config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> optax.GradientTransformation:
    """LAMB: as `adamw`, but each parameter's step has the length of the parameter, times the rate.

    A parameter is a layer's own: of stacked leaves [N, ...] each layer has its norm, where
    `optax.lamb` would take one for all of them.
    """
    rows = parameters.table(config, model)

    def lengths(x: jax.Array, stacked: bool) -> jax.Array:
        return jnp.linalg.norm(x.reshape(len(x) if stacked else 1, -1), axis=1)

    def scale(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        stacked = rows[jax.tree_util.keystr(path, simple=True, separator="/")].stacked
        ours, theirs = lengths(param, stacked), lengths(update, stacked)
        ratio = jnp.where((ours > 0) & (theirs > 0), ours / jnp.where(theirs > 0, theirs, 1.0), 1.0)
        return update * ratio.reshape(-1, *(1,) * (update.ndim - 1))

    def trust(updates: parameters.Tree, state: Any, params: parameters.Tree) -> tuple:
        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    steps = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    steps += [
        optax.scale_by_adam(
            settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon, mu_dtype=jnp.float32
        ),
        optax.add_decayed_weights(settings.weight_decay, weight_decay_mask(settings, config, model)),
        optax.GradientTransformation(lambda params: optax.EmptyState(), trust),
        optax.scale_by_learning_rate(learning_rate_schedule(settings)),
    ]
    return optax.chain(*steps)


def make_optimizer(
    settings: OptimizerConfig, config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> optax.GradientTransformation:
    """The optimizer that the settings name, at each layer's rate."""
    optimizer = {"adamw": adamw, "lamb": lamb}[settings.optimizer](settings, config, model)
    rates = learning_rate_multipliers(settings, config, model)
    return optimizer if rates is None else scale_learning_rates(optimizer, rates)

"""AdamW and LAMB with learning-rate schedule, weight-decay mask, layer-wise rates and clipping."""

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

ScheduleName = Literal["linear", "cosine", "polynomial", "constant"]
OptimizerName = Literal["adamw", "lamb"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule, weight decay and frozen parameters.

    Attributes:
        steps: optimizer steps of the whole run, where the schedule ends.
        learning_rate: the peak learning rate, reached after warm-up.
        optimizer: adamw, or lamb (You et al., 2020), which scales the update of each parameter to
            its norm, for batches of tens of thousands of rows.
        warmup_steps: steps of linear warm-up from 0.
        schedule: decay from the peak to `end_learning_rate` at `steps`; constant does not decay.
        polynomial_power: power of the polynomial schedule; 1 is linear.
        adam_beta1, adam_beta2, adam_epsilon: as in AdamW (Loshchilov and Hutter, 2019).
        weight_decay: decoupled weight decay, scaled by the learning rate.
        decay_biases, decay_norms: whether weight decay applies to biases and to norm parameters.
            fairseq decays both, BERT and most fine-tuning recipes neither. Kernels and embedding
            tables always decay.
        clip_norm: largest global gradient norm; 0 disables clipping.
        layer_decay: ratio of a layer's learning rate to that of the layer above it. The head and
            the final norm have the full rate, the last layer has `layer_decay` times it, and the
            embeddings have its (N + 1)-th power (ELECTRA, Clark et al., 2020). 1 disables it.
        freeze_layers: freeze the embeddings and this many of the first layers; 0 freezes none.
        freeze: shell-style patterns of the paths of other parameters to freeze.

    Raises:
        InputError: names the field, its value and what was expected.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 0
    schedule: ScheduleName = "linear"
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
    optimizer: OptimizerName = "adamw"

    def __post_init__(self) -> None:
        def require(condition: bool, field: str, expected: str) -> None:
            if not condition:
                raise InputError(f"{field}={getattr(self, field)!r}, expected {expected}")

        require(self.steps > 0, "steps", "1 or more")
        require(0 <= self.warmup_steps <= self.steps, "warmup_steps", f"0 to steps={self.steps}")
        for field, names in (("schedule", ScheduleName), ("optimizer", OptimizerName)):
            require(getattr(self, field) in get_args(names), field, f"one of {get_args(names)}")
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
    """Returns the learning rate as a function of the number of steps taken so far."""
    peak, end, warmup = settings.learning_rate, settings.end_learning_rate, settings.warmup_steps
    decay_steps = max(settings.steps - warmup, 1)
    if settings.schedule == "constant":
        decay = optax.constant_schedule(peak)
    elif settings.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=end / peak)
    else:
        power = settings.polynomial_power if settings.schedule == "polynomial" else 1.0
        decay = optax.polynomial_schedule(peak, end, power, decay_steps)
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def weight_decay_mask(
    settings: OptimizerConfig, config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> parameters.Tree:
    """Returns a tree of bools: which leaves decay, by their kind in the parameter table."""
    decays = {
        "kernel": True,
        "embedding": True,
        "bias": settings.decay_biases,
        "norm": settings.decay_norms,
    }
    rows = parameters.table(config, model)
    return parameters.unflatten({path: decays[row.kind] for path, row in rows.items()})


def freeze_labels(params: parameters.Tree, patterns: Sequence[str]) -> parameters.Tree:
    """Returns a tree of "frozen" and "trained" labels for `optax.multi_transform`.

    `optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)` leaves
    frozen leaves unchanged and stores no moments for them.

    Args:
        patterns: shell-style patterns of whole paths: "embeddings/*", "*/key/bias".

    Raises:
        InputError: a pattern matches no path.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    paths = parameters.flatten(params)
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise InputError(
                f"freeze={pattern!r} matches no parameter, expected a pattern of paths such as "
                f"{next(iter(paths))}"
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
    """Returns the factor on the learning rate of each leaf, or None if all are 1.

    The factors are a tree of float32 arrays that broadcast against the leaves ([N, 1, ...] for
    stacked ones). They are 0 for frozen leaves.

    Raises:
        InputError: `freeze_layers` exceeds the number of layers, or a pattern matches no path.
    """
    if settings.layer_decay == 1 and not settings.freeze_layers and not settings.freeze:
        return None
    N = config.num_hidden_layers
    if settings.freeze_layers > N:
        raise InputError(
            f"freeze_layers={settings.freeze_layers}, expected 0 to {N}, the number of layers"
        )
    depths = np.arange(N + 2)  # embeddings, N layers, final norm and head
    factors = np.float32(settings.layer_decay) ** (N + 1 - depths)
    if settings.freeze_layers:
        factors[: settings.freeze_layers + 1] = 0.0
    shapes = parameters.shapes(config, model)
    labels = parameters.flatten(freeze_labels(parameters.unflatten(shapes), settings.freeze))

    def factor(path: str, row: parameters.Parameter) -> np.ndarray | np.float32:
        if labels[path] == "frozen":
            return np.float32(0.0)
        if row.is_stacked:
            return factors[1:-1].reshape(N, *(1 for _ in shapes[path][1:]))
        return factors[0] if path.startswith("embeddings/") else factors[-1]

    rows = parameters.table(config, model)
    return parameters.unflatten({path: factor(path, row) for path, row in rows.items()})


def scale_learning_rates(
    optimizer: optax.GradientTransformation, multipliers: parameters.Tree
) -> optax.GradientTransformation:
    """Multiplies the updates of `optimizer` by `multipliers`.

    Frozen leaves (multiplier 0) have zero gradients, so they do not count in gradient norms.
    """

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gradients = jax.tree.map(lambda g, factor: g * (factor > 0), gradients, multipliers)
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(lambda u, factor: u * factor, updates, multipliers), state

    return optax.GradientTransformation(optimizer.init, update)


def _clipping(settings: OptimizerConfig) -> list[optax.GradientTransformation]:
    return [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []


def adamw(
    settings: OptimizerConfig, config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> optax.GradientTransformation:
    """Returns clipping by global norm followed by AdamW, with float32 moments."""
    transforms = _clipping(settings)
    transforms.append(
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
    return optax.chain(*transforms)


def lamb(
    settings: OptimizerConfig, config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> optax.GradientTransformation:
    """Returns LAMB: as `adamw`, with each parameter's update scaled to the parameter's norm.

    Each layer of a stacked leaf [N, ...] is a parameter of its own; `optax.lamb` would use one norm
    for all layers.
    """
    rows = parameters.table(config, model)

    def norms(x: jax.Array, stacked: bool) -> jax.Array:
        return jnp.linalg.norm(x.reshape(len(x) if stacked else 1, -1), axis=1)

    def scale(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        stacked = rows[jax.tree_util.keystr(path, simple=True, separator="/")].is_stacked
        p, u = norms(param, stacked), norms(update, stacked)
        trust_ratio = jnp.where((p > 0) & (u > 0), p / jnp.where(u > 0, u, 1.0), 1.0)
        return update * trust_ratio.reshape(-1, *(1,) * (update.ndim - 1))

    def apply_trust_ratio(updates: parameters.Tree, state: Any, params: parameters.Tree) -> tuple:
        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    transforms = _clipping(settings)
    transforms += [
        optax.scale_by_adam(
            settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon, mu_dtype=jnp.float32
        ),
        optax.add_decayed_weights(
            settings.weight_decay, weight_decay_mask(settings, config, model)
        ),
        optax.GradientTransformation(lambda params: optax.EmptyState(), apply_trust_ratio),
        optax.scale_by_learning_rate(learning_rate_schedule(settings)),
    ]
    return optax.chain(*transforms)


def make_optimizer(
    settings: OptimizerConfig, config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> optax.GradientTransformation:
    """Returns the configured optimizer, with the learning rate of each layer."""
    optimizer = {"adamw": adamw, "lamb": lamb}[settings.optimizer](settings, config, model)
    multipliers = learning_rate_multipliers(settings, config, model)
    return optimizer if multipliers is None else scale_learning_rates(optimizer, multipliers)

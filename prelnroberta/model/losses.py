"""Losses, each as a (sum, weight) pair: `Scores`.

The mean is taken once, over all rows, accumulation steps and devices. A mean of means is wrong as
soon as the numbers of counted targets differ.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from prelnroberta.config import (
    IGNORE_INDEX,
    MASKED_LOGIT,
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    RobertaPreLayerNormConfig,
)
from prelnroberta.model.heads import MaskedLM, lm_logits

Array = jax.Array


@flax.struct.dataclass
class Scores:
    """Sums over counted targets. Divide by `weight` once, at the very end.

    Attributes:
        loss: [] float32, summed negative log likelihood in nats.
        correct: [] float32, targets that are the most likely class (token, span end, side of a
            multi-label decision); 0 in regression.
        weight: [] float32, how many targets counted.
    """

    loss: Array
    correct: Array
    weight: Array

    def __add__(self, other: Scores) -> Scores:
        return jax.tree.map(jnp.add, self, other)

    @property
    def mean(self) -> Array:
        """[] float32: the loss per target; 0 if no target counted."""
        return self.loss / jnp.where(self.weight > 0, self.weight, 1.0)

    @classmethod
    def zero(cls) -> Scores:
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Options of a cross entropy. The default counts every target the same.

    Attributes:
        class_weights: one number per class, by which a target of that class counts; None: 1.
        label_smoothing: share of each target that is distributed evenly over all classes, in
            [0, 1).

    Both work as in torch's `cross_entropy` (mean reduction): the smoothed part counts each class
    by its own weight, and the whole is divided by the weights of the targets.
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0


DEFAULT_LOSS = LossSettings()


def cross_entropy(
    logits: Array, labels: Array, weights: Array, settings: LossSettings = DEFAULT_LOSS
) -> Scores:
    """Scores of logits [..., C] against labels [...] int, counted by weights [...] float32."""
    logits = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    smoothing, target_weights = settings.label_smoothing, weights
    if settings.class_weights is not None:
        class_weights = jnp.asarray(settings.class_weights, jnp.float32)
        weights = weights * class_weights[labels]
    loss = ((log_normalizer - label_logits) * weights).sum()
    if smoothing:
        # Masked logits take no part in smoothing.
        is_class = logits > MASKED_LOGIT / 2
        class_losses = jnp.where(is_class, log_normalizer[..., None] - logits, 0.0)
        if settings.class_weights is not None:
            class_losses = class_losses * class_weights
        mean = class_losses.sum(axis=-1) / jnp.maximum(is_class.sum(axis=-1), 1)
        smoothing_loss = (mean * target_weights).sum()
        loss = (1.0 - smoothing) * loss + smoothing * smoothing_loss
    return Scores(
        loss=loss,
        correct=((logits.argmax(axis=-1) == labels) * weights).sum(),
        weight=weights.sum(),
    )


def label_scores(logits: Array, labels: Array, settings: LossSettings = DEFAULT_LOSS) -> Scores:
    """Cross entropy of logits [..., C] against labels [...] int; -100 does not count.

    For masked tokens, token classes, single-label classification and choices.
    """
    counted = labels != IGNORE_INDEX
    weights = counted.astype(jnp.float32)
    return cross_entropy(logits, jnp.where(counted, labels, 0), weights, settings)


def causal_lm_scores(logits: Array, labels: Array, settings: LossSettings = DEFAULT_LOSS) -> Scores:
    """Scores of logits [B, L, V] at t against labels [B, L] at t + 1; -100 does not count."""
    return label_scores(logits[:, :-1], labels[:, 1:], settings)


def regression_scores(outputs: Array, labels: Array, weights: Array | None = None) -> Scores:
    """Squared errors of outputs [B] or [B, C] against labels of the same size.

    `weights` [B] float32 weighs examples; None: each counts once. For packed rows, [R, Q] in place
    of [B].
    """
    squares = jnp.square(outputs.astype(jnp.float32).reshape(labels.shape) - labels)
    return _weighted_scores(squares, jnp.zeros_like(squares), weights)


def multi_label_scores(logits: Array, labels: Array, weights: Array | None = None) -> Scores:
    """Binary cross entropy of logits [B, C] against labels [B, C] in [0, 1].

    Each of the B * C decisions is a target. `weights` [B] float32 weighs examples; None: each
    counts once. For packed rows, [R, Q] in place of [B].
    """
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    loss = jax.nn.softplus(logits) - labels * logits
    return _weighted_scores(loss, (logits > 0) == (labels > 0.5), weights)


def _weighted_scores(loss: Array, correct: Array, weights: Array | None) -> Scores:
    """Sums over all axes of `loss` and `correct` [B, ...], weighted along their first axes."""
    weights = jnp.ones((), jnp.float32) if weights is None else weights
    weights = weights.reshape(weights.shape + (1,) * (loss.ndim - weights.ndim))
    weights = jnp.broadcast_to(weights, loss.shape)
    return Scores((loss * weights).sum(), (correct * weights).sum(), weights.sum())


def infer_problem_type(config: RobertaPreLayerNormConfig, labels: Array) -> str:
    """The config's problem type, or the one that num_labels and the labels' dtype imply.

    As transformers infers it, except that the result is never written to the config.
    """
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return REGRESSION
    is_integer = jnp.issubdtype(labels.dtype, jnp.integer)
    return SINGLE_LABEL if is_integer else MULTI_LABEL


def sequence_scores(
    config: RobertaPreLayerNormConfig,
    logits: Array,
    labels: Array,
    settings: LossSettings = DEFAULT_LOSS,
    weights: Array | None = None,
) -> Scores:
    """Scores of logits [B, C] by problem type.

    Args:
        labels: [B] int for single labels, where -100 does not count; [B, C] float for multiple
            labels; [B] or [B, C] for regression.
        settings: applies to single labels.
        weights: [B], applies to the other two.

    For packed rows, [R, Q] in place of [B] everywhere.
    """
    problem_type = infer_problem_type(config, labels)
    if problem_type == SINGLE_LABEL:
        return label_scores(logits, labels, settings)
    if problem_type == REGRESSION:
        return regression_scores(logits, labels, weights)
    return multi_label_scores(logits, labels, weights)


def span_scores(
    logits: Array,
    starts: Array,
    ends: Array,
    settings: LossSettings = DEFAULT_LOSS,
    segment_ids: Array | None = None,
) -> tuple[Scores, Scores]:
    """Scores of the starts and of the ends, from logits [B, L, 2] and positions [B] int.

    Positions outside of the row do not count. transformers' loss is the mean of the two means;
    training adds the two sums.

    Args:
        segment_ids: [R, L] int, of packed rows. Positions are then [R, Q], those of segments 1 to
            Q. Only the tokens of a position's own segment are its classes: neither other tokens
            nor pads, which transformers' loss includes.
    """
    L = logits.shape[1]

    def score(side: int, positions: Array) -> Scores:
        inside = (positions >= 0) & (positions < L)
        side_logits = logits[:, :, side].astype(jnp.float32)
        if segment_ids is not None:
            segments = 1 + jnp.arange(positions.shape[1])
            own = segment_ids[:, None] == segments[:, None]  # [R, Q, L]
            side_logits = jnp.where(own, side_logits[:, None], MASKED_LOGIT)
        return label_scores(side_logits, jnp.where(inside, positions, IGNORE_INDEX), settings)

    return score(0, starts), score(1, ends)


def masked_lm_scores(
    module: MaskedLM, params: dict, batch: dict[str, Array], dropout_rngs: Array | None = None
) -> Scores:
    """Scores of one batch of masked rows. Logits are computed at masked positions alone.

    With `execution.logits_chunk_size`, the logits of only so many positions of each row are in
    memory at the same time.

    Args:
        batch: input_ids, segment_ids, position_ids [B, L] int; masked_positions, masked_labels
            [B, M] int; masked_weights [B, M] float32 (`data/pretraining/loader.py` makes it).
        dropout_rngs: [B], one per row; None evaluates without dropout.
    """
    hidden: Any = module.apply(
        {"params": params},
        batch["input_ids"],
        position_ids=batch["position_ids"],
        segment_ids=batch["segment_ids"],
        read_positions=batch["masked_positions"],
        dropout_rngs=dropout_rngs,
        method=MaskedLM.hidden,
    )
    targets = hidden, batch["masked_labels"], batch["masked_weights"]

    def score(hidden: Array, labels: Array, weights: Array) -> Scores:
        return cross_entropy(lm_logits(params, module.config, hidden), labels, weights)

    M, chunk_size = hidden.shape[1], module.execution.logits_chunk_size
    if not chunk_size or chunk_size >= M:
        return score(*targets)

    def add_chunk(total: Scores, chunk: tuple[Array, Array, Array]) -> tuple[Scores, None]:
        # The backward pass computes the chunk's logits again instead of storing them.
        return total + jax.checkpoint(score, prevent_cse=False)(*chunk), None

    chunks = jax.tree.map(lambda x: _split_chunks(x, chunk_size), targets)
    return jax.lax.scan(add_chunk, Scores.zero(), chunks)[0]


def _split_chunks(x: Array, size: int) -> Array:
    """[B, M, ...] -> [chunks, B, size, ...], padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

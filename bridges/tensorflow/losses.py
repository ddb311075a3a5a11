"""Losses, each as a (sum, weight) pair, with the conventions of `prelnroberta/model/losses.py`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from prelnroberta.config import (
    IGNORE_INDEX,
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    RobertaPreLayerNormConfig,
)
from prelnroberta.model import losses as jax_losses

Tensor = tf.Tensor


class Scores(NamedTuple):
    """Summed loss, and the number of targets that count: both [] float32."""

    loss: Tensor
    weight: Tensor

    @property
    def mean(self) -> Tensor:
        """[] float32: the loss per target; 0 if no target counts."""
        return tf.math.divide_no_nan(self.loss, self.weight)


def label_scores(logits: Tensor, labels: Tensor) -> Scores:
    """Cross entropy of logits [..., C] against labels [...] int; -100 does not count."""
    weights = tf.cast(labels != IGNORE_INDEX, tf.float32)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(
        tf.where(labels == IGNORE_INDEX, 0, labels), tf.cast(logits, tf.float32)
    )
    return Scores(tf.reduce_sum(loss * weights), tf.reduce_sum(weights))


def causal_lm_scores(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of logits [B, L, V] at t against labels [B, L] at t + 1; -100 does not count."""
    return label_scores(logits[:, :-1], labels[:, 1:])


def regression_scores(outputs: Tensor, labels: Tensor) -> Scores:
    """Squared errors of outputs against labels of as many numbers."""
    outputs, labels = (tf.reshape(tf.cast(x, tf.float32), [-1]) for x in (outputs, labels))
    errors = tf.square(outputs - labels)
    return Scores(tf.reduce_sum(errors), tf.cast(tf.size(errors), tf.float32))


def multi_label_scores(logits: Tensor, labels: Tensor) -> Scores:
    """Binary cross entropy of logits [B, C] against labels [B, C] in [0, 1]."""
    logits, labels = tf.cast(logits, tf.float32), tf.cast(labels, tf.float32)
    loss = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
    return Scores(tf.reduce_sum(loss), tf.cast(tf.size(loss), tf.float32))


def infer_problem_type(config: RobertaPreLayerNormConfig, labels: Tensor) -> str:
    """The config's problem type, or the one that the labels' dtype implies."""
    return jax_losses.infer_problem_type(config, np.empty(0, labels.dtype.as_numpy_dtype))


def sequence_scores(config: RobertaPreLayerNormConfig, logits: Tensor, labels: Tensor) -> Scores:
    """Scores of logits [B, C]: against labels [B] int, [B, C] float, or in regression [B(, C)]."""
    score = {
        REGRESSION: regression_scores,
        SINGLE_LABEL: label_scores,
        MULTI_LABEL: multi_label_scores,
    }
    return score[infer_problem_type(config, labels)](logits, labels)


def span_labels(positions: Tensor, length: Tensor | int) -> Tensor:
    """Positions [B] of a span's start or end as labels; those outside the row do not count."""
    inside = (positions >= 0) & (positions < length)
    return tf.where(inside, positions, IGNORE_INDEX)

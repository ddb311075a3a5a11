"""What stands on the encoder: heads, and their losses as (sum, weight).

Functions and conventions are those of `prelnroberta/model/heads.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from bridges.tensorflow.encoder import ACTIVATIONS, Dropout, Norm, Part, Projection
from bridges.tensorflow.kv_cache import sizes
from prelnroberta.config import IGNORE_INDEX, RobertaPreLayerNormConfig
from prelnroberta.model.losses import infer_problem_type

Tensor = tf.Tensor


class Pooler(Projection):
    """[B, L, D] -> [B, D]: tanh of a dense layer over the first position."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("pooler", (config.hidden_size,), (config.hidden_size,))

    def call(self, hidden: Tensor) -> Tensor:
        return super().call(hidden[:, 0], activation=tf.tanh)


class LanguageModelHead(Part):
    """[B, L, D] -> logits [B, L, V] float32, by the word table or its own `decoder`.

    The activation is the exact gelu whatever `hidden_act` says, as in transformers.
    """

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("lm_head")
        self.config = config
        self.dense = Projection("dense", (config.hidden_size,), (config.hidden_size,))
        self.norm = Norm("norm", config)

    def build(self) -> None:
        V, D = self.config.vocab_size, self.config.hidden_size
        self.dense.build()
        self.norm.build()
        self.bias = self.variable("bias", (V,))
        if not self.config.tie_word_embeddings:
            self.decoder = self.variable("decoder", (V, D))

    def call(self, hidden: Tensor, word: Tensor) -> Tensor:
        table = word if self.config.tie_word_embeddings else self.decoder.value
        x = self.norm(self.dense(hidden, activation=ACTIVATIONS["gelu"]))
        V, D = table.shape
        flat = tf.matmul(tf.reshape(x, [-1, D]), tf.cast(table, x.dtype), transpose_b=True)
        logits = tf.nn.bias_add(tf.cast(flat, tf.float32), self.bias.value)
        return tf.reshape(logits, [*sizes(x)[:-1], V])


class ClassificationHead(Part):
    """Vectors of `<s>` [B, D] -> logits [B, C] by two layers, with dropout before each."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("classifier")
        D = (config.hidden_size,)
        self.rate = classifier_dropout(config)
        self.dense = Projection("dense", D, D)
        self.output_projection = Projection("output", D, (config.num_labels,))

    def build(self) -> None:
        self.dense.build()
        self.output_projection.build()

    def call(self, x: Tensor, drop: Dropout) -> Tensor:
        x = self.dense(drop(x, self.rate), activation=tf.tanh)
        return self.output_projection(drop(x, self.rate))


def classifier_dropout(config: RobertaPreLayerNormConfig) -> float:
    rate = config.classifier_dropout
    return config.hidden_dropout_prob if rate is None else rate


class Scores(NamedTuple):
    """Summed loss, and how many targets counted: both [] float32."""

    loss: Tensor
    weight: Tensor

    @property
    def mean(self) -> Tensor:
        """[] float32: the loss of one target; a finite 0 where none counted."""
        return tf.math.divide_no_nan(self.loss, self.weight)


def label_scores(logits: Tensor, labels: Tensor) -> Scores:
    """Cross entropy of logits [..., C] against labels [...] int; -100 does not count."""
    counted = tf.cast(labels != IGNORE_INDEX, tf.float32)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        tf.where(labels == IGNORE_INDEX, 0, labels), tf.cast(logits, tf.float32)
    )
    return Scores(tf.reduce_sum(losses * counted), tf.reduce_sum(counted))


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
    losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
    return Scores(tf.reduce_sum(losses), tf.cast(tf.size(losses), tf.float32))


def problem_type(config: RobertaPreLayerNormConfig, labels: Tensor) -> str:
    """The config's, or what the labels' dtype says."""
    return infer_problem_type(config, np.empty(0, labels.dtype.as_numpy_dtype))


def sequence_scores(config: RobertaPreLayerNormConfig, logits: Tensor, labels: Tensor) -> Scores:
    """Scores of logits [B, C]: against labels [B] int, [B, C] float, or in regression [B(, C)]."""
    score = {
        "regression": regression_scores,
        "single_label_classification": label_scores,
        "multi_label_classification": multi_label_scores,
    }
    return score[problem_type(config, labels)](logits, labels)


def span_labels(positions: Tensor, length: Tensor | int) -> Tensor:
    """Positions [B] of an answer's side as labels: outside of the row they do not count."""
    inside = (positions >= 0) & (positions < length)
    return tf.where(inside, positions, IGNORE_INDEX)

"""Task heads: layers from the encoder's hidden states to logits."""

from __future__ import annotations

import tensorflow as tf

from bridges.tensorflow.encoder import ACTIVATIONS, Dropout, Float32Layer, LayerNorm, Projection
from bridges.tensorflow.shapes import shape_list
from prelnroberta.config import RobertaPreLayerNormConfig

Tensor = tf.Tensor


class Pooler(Projection):
    """[B, L, D] -> [B, D]: tanh of a dense layer over the first position."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("pooler", (config.hidden_size,), (config.hidden_size,))

    def call(self, hidden: Tensor) -> Tensor:
        return super().call(hidden[:, 0], activation=tf.tanh)


class LanguageModelHead(Float32Layer):
    """[B, L, D] -> logits [B, L, V] float32, by the word table or its own `decoder`.

    The activation is the exact gelu whatever `hidden_act` is, as in transformers.
    """

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("lm_head")
        self.config = config
        self.dense = Projection("dense", (config.hidden_size,), (config.hidden_size,))
        self.norm = LayerNorm("norm", config)

    def build(self) -> None:
        V, D = self.config.vocab_size, self.config.hidden_size
        self.dense.build()
        self.norm.build()
        self.bias = self.make_variable("bias", (V,))
        if not self.config.tie_word_embeddings:
            self.decoder = self.make_variable("decoder", (V, D))

    def call(self, hidden: Tensor, word_table: Tensor) -> Tensor:
        table = word_table if self.config.tie_word_embeddings else self.decoder.value
        x = self.norm(self.dense(hidden, activation=ACTIVATIONS["gelu"]))
        V, D = table.shape
        logits = tf.matmul(tf.reshape(x, [-1, D]), tf.cast(table, x.dtype), transpose_b=True)
        logits = tf.nn.bias_add(tf.cast(logits, tf.float32), self.bias.value)
        return tf.reshape(logits, [*shape_list(x)[:-1], V])


class ClassificationHead(Float32Layer):
    """Hidden states of `<s>` [B, D] -> logits [B, C]: two layers, with dropout before each."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("classifier")
        D = (config.hidden_size,)
        self.dropout_rate = classifier_dropout_rate(config)
        self.dense = Projection("dense", D, D)
        self.output_projection = Projection("output", D, (config.num_labels,))

    def build(self) -> None:
        self.dense.build()
        self.output_projection.build()

    def call(self, x: Tensor, dropout: Dropout) -> Tensor:
        x = self.dense(dropout(x, self.dropout_rate), activation=tf.tanh)
        return self.output_projection(dropout(x, self.dropout_rate))


def classifier_dropout_rate(config: RobertaPreLayerNormConfig) -> float:
    rate = config.classifier_dropout
    return config.hidden_dropout_prob if rate is None else rate

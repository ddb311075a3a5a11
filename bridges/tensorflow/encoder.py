"""RoBERTa-PreLayerNorm's encoder in Keras: Embeddings -> Attention -> Mlp -> Block -> Encoder.

The same function as `prelnroberta/model/encoder.py`, from which this file differs where TensorFlow does:
layers own their variables, one set a layer; matrix products see two axes, so that TensorFlow fuses
them with bias and activation; keys and values of a cache lie head by head.

    B batch  L length  D hidden  H heads  K head dim  F mlp  N layers  V vocab
    M queries (L, or 1 where one position is read)  T keys, cached ones too  S encoder states
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from bridges.tensorflow import kv_cache as caches
from bridges.tensorflow.kv_cache import Cache, sizes
from prelnroberta.config import RobertaPreLayerNormConfig

Tensor = tf.Tensor
Dropout = Callable[[Tensor, float], Tensor]

# Added to the scores of keys that may not be seen. No score leaves a trace beside it in float32, so
# that a query that sees nothing attends evenly, as by Flax's choice between scores and a constant,
# which TensorFlow computes more slowly than this sum.
INVISIBLE = -1e30

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": tf.nn.gelu,  # the exact erf form is TensorFlow's default, not Keras'
    "gelu_new": lambda x: tf.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: tf.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * tf.sigmoid(1.702 * x),
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}


class Part(keras.layers.Layer):
    """A layer of float32 variables that computes in the dtype of its input.

    Keras' own casting is off: it would round float32 arguments on their way into a layer.
    Variables start at zero, because a model is always filled from a parameter tree.
    """

    def __init__(self, name: str):
        super().__init__(name=name, dtype="float32", autocast=False)

    def variable(self, name: str, shape: tuple[int, ...]) -> keras.Variable:
        return self.add_weight(name=name, shape=shape, initializer="zeros", autocast=False)


class Norm(Part):
    """LayerNorm of the last axis; statistics in float32 by two passes, result in x's dtype."""

    def __init__(self, name: str, config: RobertaPreLayerNormConfig):
        super().__init__(name)
        self.size, self.epsilon = config.hidden_size, config.layer_norm_eps

    def build(self) -> None:
        self.scale = self.variable("scale", (self.size,))
        self.bias = self.variable("bias", (self.size,))

    def call(self, x: Tensor) -> Tensor:
        wide = tf.cast(x, tf.float32)
        centred = wide - tf.reduce_mean(wide, axis=-1, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
        normed = centred * tf.math.rsqrt(variance + self.epsilon)
        return tf.cast(normed * self.scale.value + self.bias.value, x.dtype)


class Projection(Part):
    """x times a kernel, plus a bias: [..., *inputs] -> [..., *outputs], in x's dtype.

    Args:
        inputs, outputs: sizes of the axes that are summed over, and of those that come instead.
    """

    def __init__(self, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]):
        super().__init__(name)
        self.inputs, self.outputs = inputs, outputs

    def build(self) -> None:
        self.kernel = self.variable("kernel", (*self.inputs, *self.outputs))
        self.bias = self.variable("bias", self.outputs)

    def call(self, x: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        taken, given = math.prod(self.inputs), math.prod(self.outputs)
        kernel = tf.cast(tf.reshape(self.kernel.value, [taken, given]), x.dtype)
        bias = tf.cast(tf.reshape(self.bias.value, [given]), x.dtype)
        y = tf.nn.bias_add(tf.matmul(tf.reshape(x, [-1, taken]), kernel), bias)
        y = y if activation is None else activation(y)
        lead = sizes(x)[: x.shape.rank - len(self.inputs)]
        return tf.reshape(y, [*lead, *self.outputs])


@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers share in one call.

    Attributes:
        bias: float32, [B, 1, 1, T] or [B, 1, L, T], added to scores; None: every key is seen.
        encoder_states, encoder_bias: [B, S, D] and [B, 1, 1 or L, S], for cross-attention.
        index: [] int32, the column of the cache where new keys go.
        drop: dropout(x, rate); the identity in inference.
    """

    bias: Tensor | None = None
    encoder_states: Tensor | None = None
    encoder_bias: Tensor | None = None
    index: Tensor | None = None
    drop: Dropout = lambda x, rate: x


class Encoded(NamedTuple):
    """What `encode` returns, as `prelnroberta.model.encoder.EncoderOutput`.

    Attributes:
        last_hidden_state: [B, L, D], after the final norm; [B, 1, D] where the first alone is read.
        residuals: N + 1 arrays [B, L, D]: the embeddings and the stream after each block.
        attentions: N arrays [B, H, L, T], the probabilities used: after dropout and head mask.
        cross_attentions: the same over the encoder's states, [B, H, L, S]; empty without any.
        cache: the given one with L more columns.
    """

    last_hidden_state: Tensor
    residuals: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]
    cross_attentions: tuple[Tensor, ...]
    cache: Cache | None


class Embeddings(Part):
    """Word + type + position, normed, dropped out."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("embeddings")
        self.config = config
        self.norm = Norm("norm", config)

    def build(self) -> None:
        c = self.config
        self.word = self.variable("word", (c.vocab_size, c.hidden_size))
        self.position = self.variable("position", (c.max_position_embeddings, c.hidden_size))
        self.token_type = self.variable("token_type", (c.type_vocab_size, c.hidden_size))
        self.norm.build()

    def call(
        self, words: Tensor, position_ids: Tensor, context: Context, token_type_ids: Any = None
    ) -> Tensor:
        first = self.token_type.value[0]
        x = words + (first if token_type_ids is None else rows(self.token_type, token_type_ids))
        x = self.norm(x + rows(self.position, position_ids))
        return context.drop(x, self.config.hidden_dropout_prob)


def rows(table: keras.Variable, ids: Tensor) -> Tensor:
    """Rows of a table [V, D] by ids [B, L] -> [B, L, D], with a dense gradient.

    Of TensorFlow's sparse one, with an entry for each time that a row is taken, Keras' Adam sums
    the squares where it should square the sum. A gradient through a reshape is dense.
    """
    return tf.gather(tf.reshape(table.value, table.shape), ids)


class Attention(Part):
    """Multi-head attention: queries and keys from normed vectors, softmax in float32."""

    def __init__(self, name: str, config: RobertaPreLayerNormConfig):
        super().__init__(name)
        self.config = config
        D, heads = (config.hidden_size,), (config.num_attention_heads, config.head_dim)
        self.query = Projection("query", D, heads)
        self.key = Projection("key", D, heads)
        self.value = Projection("value", D, heads)
        self.output_projection = Projection("output", heads, D)

    def build(self) -> None:
        for part in (self.query, self.key, self.value, self.output_projection):
            part.build()

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> two of [B, H, T, K]."""
        return by_head(self.key(x)), by_head(self.value(x))

    def call(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        context: Context,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns [B, M, D], and the probabilities used [B, H, M, T]."""
        queries = by_head(self.query(x) * self.config.head_dim**-0.5)
        scores = tf.cast(tf.matmul(queries, keys, transpose_b=True), tf.float32)
        scores = scores if bias is None else scores + bias
        probabilities = tf.cast(tf.nn.softmax(scores), x.dtype)
        probabilities = context.drop(probabilities, self.config.attention_probs_dropout_prob)
        if head_mask is not None:
            probabilities *= tf.cast(head_mask, x.dtype)[:, None, None]
        return self.output_projection(by_head(tf.matmul(probabilities, values))), probabilities


def by_head(x: Tensor) -> Tensor:
    """[B, L, H, K] <-> [B, H, L, K]."""
    return tf.transpose(x, [0, 2, 1, 3])


class Mlp(Part):
    """[B, L, D] -> [B, L, F] -> [B, L, D]; no dropout in between."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("mlp")
        D, F = (config.hidden_size,), (config.intermediate_size,)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.wi, self.wo = Projection("wi", D, F), Projection("wo", F, D)

    def build(self) -> None:
        self.wi.build()
        self.wo.build()

    def call(self, x: Tensor) -> Tensor:
        return self.wo(self.wi(x, activation=self.activation))


class Block(Part):
    """One layer, norm-and-add: [B, L, D] -> [B, L, D], or [B, 1, D] where the first is read."""

    def __init__(self, name: str, config: RobertaPreLayerNormConfig):
        super().__init__(name)
        self.rate = config.hidden_dropout_prob
        self.attention_norm = Norm("attention_norm", config)
        self.attention = Attention("attention", config)
        self.cross = config.add_cross_attention
        if self.cross:
            self.cross_attention_norm = Norm("cross_attention_norm", config)
            self.cross_attention = Attention("cross_attention", config)
        self.mlp_norm = Norm("mlp_norm", config)
        self.mlp = Mlp(config)

    def build(self) -> None:
        for part in (self.attention_norm, self.attention, self.mlp_norm, self.mlp):
            part.build()
        if self.cross:
            self.cross_attention_norm.build()
            self.cross_attention.build()

    def call(
        self,
        x: Tensor,
        context: Context,
        head_mask: Tensor | None = None,
        cache: Cache | None = None,
        read_first: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Cache | None]:
        """Returns the stream, both attentions' probabilities, and this layer's cache.

        Args:
            cache: `keys`, `values` [B, H, T, K], and the same of the encoder's states, `cross_*`.
            read_first: compute queries, output and MLP at position 0 alone: exact, because after
                its keys and values a block works on each position by itself.
        """
        normed, bias = self.attention_norm(x), context.bias
        keys, values = self.attention.keys_and_values(normed)
        if cache is not None:
            keys = caches.write_columns(cache["keys"], keys, context.index)
            values = caches.write_columns(cache["values"], values, context.index)
            cache = {**cache, "keys": keys, "values": values}
        if read_first:
            normed, x = normed[:, :1], x[:, :1]
            bias = None if bias is None else bias[:, :, :1]
        mixed, probabilities = self.attention(
            normed, keys, values, bias=bias, context=context, head_mask=head_mask
        )
        x = x + context.drop(mixed, self.rate)

        crossed = None
        if context.encoder_states is not None or (cache and "cross_keys" in cache):
            if cache and "cross_keys" in cache:
                keys, values = cache["cross_keys"], cache["cross_values"]
            else:
                states = tf.cast(context.encoder_states, x.dtype)
                keys, values = self.cross_attention.keys_and_values(states)
            normed, bias = self.cross_attention_norm(x), context.encoder_bias
            mixed, crossed = self.cross_attention(
                normed, keys, values, bias=bias, context=context, head_mask=head_mask
            )
            x = x + context.drop(mixed, self.rate)

        x = x + context.drop(self.mlp(self.mlp_norm(x)), self.rate)
        return x, probabilities, crossed, cache


class Layers(Part):
    """The N blocks."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("layers")
        self.blocks = [Block(str(n), config) for n in range(config.num_hidden_layers)]

    def build(self) -> None:
        for block in self.blocks:
            block.build()


class Encoder(Part):
    """The blocks and the final norm."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("encoder")
        self.config = config
        self.stack = Layers(config)
        self.final_norm = Norm("final_norm", config)

    def build(self) -> None:
        self.stack.build()
        self.final_norm.build()

    def call(
        self,
        x: Tensor,
        context: Context,
        head_mask: Tensor | None = None,
        cache: Cache | None = None,
        read_first: bool = False,
    ) -> Encoded:
        N, H = self.config.num_hidden_layers, self.config.num_attention_heads
        if head_mask is not None:
            head_mask = tf.broadcast_to(head_mask, [N, H])
        of_layers = [name for name in caches.OF_LAYERS if cache is not None and name in cache]
        residuals, attentions, crossed, layers = [x], [], [], []
        for n, block in enumerate(self.stack.blocks):
            x, probabilities, cross, layer = block(
                x,
                context=context,
                head_mask=None if head_mask is None else head_mask[n],
                cache=None if cache is None else {name: cache[name][n] for name in of_layers},
                read_first=read_first and n == N - 1,
            )
            residuals.append(x)
            attentions.append(probabilities)
            crossed += [] if cross is None else [cross]
            layers.append(layer)
        if cache is not None:
            stacked = {name: tuple(layer[name] for layer in layers) for name in of_layers}
            cache = {**cache, **stacked}
        last = self.final_norm(x)
        return Encoded(last, tuple(residuals), tuple(attentions), tuple(crossed), cache)


def default_position_ids(input_ids: Tensor, pad: int, before: Any = 0) -> Tensor:
    """Positions by counting real tokens: pad + 1, pad + 2, ...; pads get pad. [B, L] int32."""
    real = tf.cast(input_ids != pad, tf.int32)
    return (tf.cumsum(real, axis=-1) + before) * real + pad


def visibility(
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    causal_length: Any = None,
) -> Tensor | None:
    """Which keys each query may see: bool, [B, 1, L] or [B, L, L]; None means all."""
    visible = None
    if attention_mask is not None:
        mask = tf.cast(attention_mask, tf.bool)
        visible = tf.expand_dims(mask, 1) if mask.shape.rank == 2 else mask
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        visible = same if visible is None else visible & same
    if causal_length is not None:
        columns = tf.range(causal_length)
        causal = (columns[:, None] >= columns)[None]
        visible = causal if visible is None else visible & causal
    return visible


def score_bias(visible: Tensor | None) -> Tensor | None:
    """float32, over heads as well: 0 where a key is visible, else `INVISIBLE`."""
    return None if visible is None else tf.expand_dims(tf.where(visible, 0.0, INVISIBLE), 1)


def encode(
    embeddings: Embeddings,
    encoder: Encoder,
    config: RobertaPreLayerNormConfig,
    dtype: Any,
    drop: Dropout,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    head_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    read_first: bool = False,
) -> Encoded:
    """The encoder's output in `dtype`; arguments as `prelnroberta.model.encoder.Encoder`'s."""
    if input_ids is None:
        # Vectors tell no pads: every column counts.
        words = tf.cast(inputs_embeds, tf.float32)
        counted = tf.fill(sizes(words)[:2], config.pad_token_id + 1)
    else:
        words, counted = rows(embeddings.word, input_ids), input_ids
    cache, before = past_key_values, 0
    if cache is None:
        length = sizes(counted)[1] if config.is_decoder else None
        visible = visibility(attention_mask, segment_ids, length)
    else:
        before = cache["count"][:, None]
        cache, visible = caches.announce(cache, attention_mask, counted != config.pad_token_id)
        if encoder_hidden_states is not None and "cross_keys" not in cache:
            states = tf.cast(encoder_hidden_states, dtype)
            cache |= read_encoder(encoder, states, encoder_attention_mask)
        encoder_attention_mask = cache.get("cross_valid")
    if position_ids is None:
        position_ids = default_position_ids(counted, config.pad_token_id, before)
    context = Context(
        bias=score_bias(visible),
        encoder_states=encoder_hidden_states,
        encoder_bias=score_bias(visibility(encoder_attention_mask)),
        index=None if cache is None else past_key_values["index"],
        drop=drop,
    )
    x = embeddings(words, position_ids, context=context, token_type_ids=token_type_ids)
    x = tf.cast(x, dtype)
    return encoder(x, context=context, head_mask=head_mask, cache=cache, read_first=read_first)


def read_encoder(encoder: Encoder, states: Tensor, mask: Tensor | None = None) -> Cache:
    """What a cache holds of encoder states [B, S, D], by all layers, and of their mask [B, S]."""
    pairs = [block.cross_attention.keys_and_values(states) for block in encoder.stack.blocks]
    keys, values = zip(*pairs, strict=True)
    valid = tf.ones(sizes(states)[:2], tf.bool) if mask is None else tf.cast(mask, tf.bool)
    return {"cross_keys": keys, "cross_values": values, "cross_valid": valid}

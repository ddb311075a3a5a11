"""The encoder in Keras: Embeddings -> Attention -> Mlp -> Block -> Encoder.

Computes the same function as `prelnroberta/model/encoder.py`, with three differences that suit
TensorFlow: each layer has its own variables; matrix products have two axes, so that TensorFlow
fuses them with bias and activation; cached keys and values have their heads before positions.

Layers are saved in `.keras` and `.weights.h5` files under their attribute names, or in lists their
class name, and variables by order of creation: do not rename or reorder them. Layer names make up
the paths of `variable_mapping.py`.

Shape letters are those of `prelnroberta/params.py`. M is L, or 1 if one position is read; T is L,
or the columns of the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from bridges.tensorflow import kv_cache
from bridges.tensorflow.kv_cache import KVCache
from bridges.tensorflow.shapes import shape_list
from prelnroberta.config import MASKED_LOGIT, RobertaPreLayerNormConfig

Tensor = tf.Tensor
Dropout = Callable[[Tensor, float], Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": tf.nn.gelu,  # the exact erf form is TensorFlow's default, but not Keras'
    "gelu_new": lambda x: tf.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: tf.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * tf.sigmoid(1.702 * x),
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}


class Float32Layer(keras.layers.Layer):
    """A layer of float32 variables that computes in the dtype of its input.

    Keras' autocast is off: it would round float32 arguments of a layer. Variables start at zero,
    because a model is always filled from a parameter tree.
    """

    def __init__(self, name: str):
        super().__init__(name=name, dtype="float32", autocast=False)

    def make_variable(self, name: str, shape: tuple[int, ...]) -> keras.Variable:
        return self.add_weight(name=name, shape=shape, initializer="zeros", autocast=False)


class LayerNorm(Float32Layer):
    """LayerNorm over the last axis: two-pass statistics in float32, the result in x's dtype."""

    def __init__(self, name: str, config: RobertaPreLayerNormConfig):
        super().__init__(name)
        self.size, self.epsilon = config.hidden_size, config.layer_norm_eps

    def build(self) -> None:
        self.scale = self.make_variable("scale", (self.size,))
        self.bias = self.make_variable("bias", (self.size,))

    def call(self, x: Tensor) -> Tensor:
        x32 = tf.cast(x, tf.float32)
        centered = x32 - tf.reduce_mean(x32, axis=-1, keepdims=True)
        variance = tf.reduce_mean(tf.square(centered), axis=-1, keepdims=True)
        normed = centered * tf.math.rsqrt(variance + self.epsilon)
        return tf.cast(normed * self.scale.value + self.bias.value, x.dtype)


class Projection(Float32Layer):
    """x times a kernel, plus a bias: [..., *in_shape] -> [..., *out_shape], in x's dtype."""

    def __init__(self, name: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...]):
        super().__init__(name)
        self.in_shape, self.out_shape = in_shape, out_shape

    def build(self) -> None:
        self.kernel = self.make_variable("kernel", (*self.in_shape, *self.out_shape))
        self.bias = self.make_variable("bias", self.out_shape)

    def call(self, x: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        in_size, out_size = math.prod(self.in_shape), math.prod(self.out_shape)
        kernel = tf.cast(tf.reshape(self.kernel.value, [in_size, out_size]), x.dtype)
        bias = tf.cast(tf.reshape(self.bias.value, [out_size]), x.dtype)
        y = tf.nn.bias_add(tf.matmul(tf.reshape(x, [-1, in_size]), kernel), bias)
        y = y if activation is None else activation(y)
        leading = shape_list(x)[: x.shape.rank - len(self.in_shape)]
        return tf.reshape(y, [*leading, *self.out_shape])


def no_dropout(x: Tensor, rate: float) -> Tensor:
    return x


@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """Arguments that all layers share.

    Attributes:
        bias: float32, [B, 1, 1 or L, T], added to attention scores; None: every key is visible.
        encoder_hidden_states: [B, S, D], for cross-attention.
        encoder_bias: float32, [B, 1, 1 or L, S].
        cache_index: [] int32, the column of the cache at which new keys start.
        dropout: dropout(x, rate); the identity in inference.
    """

    bias: Tensor | None = None
    encoder_hidden_states: Tensor | None = None
    encoder_bias: Tensor | None = None
    cache_index: Tensor | None = None
    dropout: Dropout = no_dropout


class EncoderOutput(NamedTuple):
    """The encoder's output, as `prelnroberta.model.encoder.EncoderOutput`.

    Attributes:
        last_hidden_state: [B, L, D] after the final norm; [B, 1, D] if only the first is read.
        residuals: N + 1 tensors [B, L, D]: the embeddings and the stream after each block.
        attentions: N tensors [B, H, L, T], the probabilities after dropout and head mask.
        cross_attentions: the same over the encoder states, [B, H, L, S]; empty without any.
        cache: the given cache with L more columns.
    """

    last_hidden_state: Tensor
    residuals: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]
    cross_attentions: tuple[Tensor, ...]
    cache: KVCache | None


class Embeddings(Float32Layer):
    """Word + type + position, norm, dropout: words [B, L, D] -> [B, L, D]."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("embeddings")
        self.config = config
        self.norm = LayerNorm("norm", config)

    def build(self) -> None:
        c = self.config
        self.word = self.make_variable("word", (c.vocab_size, c.hidden_size))
        self.position = self.make_variable("position", (c.max_position_embeddings, c.hidden_size))
        self.token_type = self.make_variable("token_type", (c.type_vocab_size, c.hidden_size))
        self.norm.build()

    def call(
        self,
        words: Tensor,
        position_ids: Tensor,
        context: AttentionContext,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        if token_type_ids is None:
            types = self.token_type.value[0]
        else:
            types = take_rows(self.token_type, token_type_ids)
        x = self.norm(words + types + take_rows(self.position, position_ids))
        return context.dropout(x, self.config.hidden_dropout_prob)


def take_rows(table: keras.Variable, ids: Tensor) -> Tensor:
    """Rows of a table [V, D] by ids [B, L] -> [B, L, D], with a dense gradient.

    TensorFlow's sparse gradient has one entry for each time a row is taken, and Keras' Adam adds
    the squares of these entries instead of squaring their sum. A gradient through a reshape is
    dense.
    """
    return tf.gather(tf.reshape(table.value, table.shape), ids)


class Attention(Float32Layer):
    """Multi-head attention with softmax in float32."""

    def __init__(self, name: str, config: RobertaPreLayerNormConfig):
        super().__init__(name)
        self.config = config
        D, heads = (config.hidden_size,), (config.num_attention_heads, config.head_dim)
        self.query = Projection("query", D, heads)
        self.key = Projection("key", D, heads)
        self.value = Projection("value", D, heads)
        self.output_projection = Projection("output", heads, D)

    def build(self) -> None:
        for layer in (self.query, self.key, self.value, self.output_projection):
            layer.build()

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> two of [B, H, T, K]."""
        return swap_heads(self.key(x)), swap_heads(self.value(x))

    def call(
        self,
        hidden: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        context: AttentionContext,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of hidden states [B, M, D] over keys and values [B, H, T, K].

        Returns [B, M, D], and the probabilities [B, H, M, T].
        """
        queries = swap_heads(self.query(hidden) * self.config.head_dim**-0.5)
        scores = tf.cast(tf.matmul(queries, keys, transpose_b=True), tf.float32)
        scores = scores if bias is None else scores + bias
        probabilities = tf.cast(tf.nn.softmax(scores), hidden.dtype)
        probabilities = context.dropout(probabilities, self.config.attention_probs_dropout_prob)
        if head_mask is not None:
            probabilities *= tf.cast(head_mask, hidden.dtype)[:, None, None]
        attended = swap_heads(tf.matmul(probabilities, values))
        return self.output_projection(attended), probabilities


def swap_heads(x: Tensor) -> Tensor:
    """[B, L, H, K] <-> [B, H, L, K]."""
    return tf.transpose(x, [0, 2, 1, 3])


class Mlp(Float32Layer):
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


class Block(Float32Layer):
    """One pre-norm layer: [B, L, D] -> [B, L, D], or [B, 1, D] if only the first is read."""

    def __init__(self, name: str, config: RobertaPreLayerNormConfig):
        super().__init__(name)
        self.dropout_rate = config.hidden_dropout_prob
        self.attention_norm = LayerNorm("attention_norm", config)
        self.attention = Attention("attention", config)
        self.has_cross_attention = config.add_cross_attention
        if self.has_cross_attention:
            self.cross_attention_norm = LayerNorm("cross_attention_norm", config)
            self.cross_attention = Attention("cross_attention", config)
        self.mlp_norm = LayerNorm("mlp_norm", config)
        self.mlp = Mlp(config)

    def build(self) -> None:
        for layer in (self.attention_norm, self.attention, self.mlp_norm, self.mlp):
            layer.build()
        if self.has_cross_attention:
            self.cross_attention_norm.build()
            self.cross_attention.build()

    def call(
        self,
        x: Tensor,
        context: AttentionContext,
        head_mask: Tensor | None = None,
        cache: KVCache | None = None,
        read_first: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, KVCache | None]:
        """Returns the stream, the probabilities of both attentions, and this layer's cache.

        Args:
            cache: `keys`, `values` [B, H, T, K], and `cross_*` of the encoder states.
            read_first: compute queries, output and MLP at position 0 alone. This is exact, because
                after its keys and values a block treats each position independently.
        """
        normed, bias = self.attention_norm(x), context.bias
        keys, values = self.attention.keys_and_values(normed)
        if cache is not None:
            keys = kv_cache.write_columns(cache["keys"], keys, context.cache_index)
            values = kv_cache.write_columns(cache["values"], values, context.cache_index)
            cache = {**cache, "keys": keys, "values": values}
        if read_first:
            normed, x = normed[:, :1], x[:, :1]
            bias = None if bias is None else bias[:, :, :1]
        attended, probabilities = self.attention(
            normed, keys, values, bias=bias, context=context, head_mask=head_mask
        )
        x = x + context.dropout(attended, self.dropout_rate)

        cross_probabilities, cross_kv = None, self.cross_keys_and_values(x.dtype, context, cache)
        if cross_kv is not None:
            attended, cross_probabilities = self.cross_attention(
                self.cross_attention_norm(x),
                *cross_kv,
                bias=context.encoder_bias,
                context=context,
                head_mask=head_mask,
            )
            x = x + context.dropout(attended, self.dropout_rate)

        x = x + context.dropout(self.mlp(self.mlp_norm(x)), self.dropout_rate)
        return x, probabilities, cross_probabilities, cache

    def cross_keys_and_values(
        self, dtype: Any, context: AttentionContext, cache: KVCache | None
    ) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the encoder states, cached or projected; None without states."""
        if cache and "cross_keys" in cache:
            return cache["cross_keys"], cache["cross_values"]
        if context.encoder_hidden_states is None:
            return None
        states = tf.cast(context.encoder_hidden_states, dtype)
        return self.cross_attention.keys_and_values(states)


class BlockStack(Float32Layer):
    """The N blocks."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("layers")
        self.blocks = [Block(str(n), config) for n in range(config.num_hidden_layers)]

    def build(self) -> None:
        for block in self.blocks:
            block.build()


class Encoder(Float32Layer):
    """The blocks and the final norm."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__("encoder")
        self.config = config
        self.stack = BlockStack(config)
        self.final_norm = LayerNorm("final_norm", config)

    def build(self) -> None:
        self.stack.build()
        self.final_norm.build()

    def call(
        self,
        x: Tensor,
        context: AttentionContext,
        head_mask: Tensor | None = None,
        cache: KVCache | None = None,
        read_first: bool = False,
    ) -> EncoderOutput:
        N, H = self.config.num_hidden_layers, self.config.num_attention_heads
        if head_mask is not None:
            head_mask = tf.broadcast_to(head_mask, [N, H])
        cached = [n for n in kv_cache.PER_LAYER_KEYS if cache is not None and n in cache]
        residuals, attentions, cross_attentions, layer_caches = [x], [], [], []
        for n, block in enumerate(self.stack.blocks):
            x, probabilities, cross_probabilities, layer_cache = block(
                x,
                context=context,
                head_mask=None if head_mask is None else head_mask[n],
                cache=None if cache is None else {name: cache[name][n] for name in cached},
                read_first=read_first and n == N - 1,
            )
            residuals.append(x)
            attentions.append(probabilities)
            layer_caches.append(layer_cache)
            if cross_probabilities is not None:
                cross_attentions.append(cross_probabilities)
        if cache is not None:
            cache = {**cache, **{n: tuple(layer[n] for layer in layer_caches) for n in cached}}
        return EncoderOutput(
            last_hidden_state=self.final_norm(x),
            residuals=tuple(residuals),
            attentions=tuple(attentions),
            cross_attentions=tuple(cross_attentions),
            cache=cache,
        )


def default_position_ids(input_ids: Tensor, pad_token_id: int, past_count: Any = 0) -> Tensor:
    """Positions that count tokens: pad + 1, pad + 2, ...; pads get pad. [B, L] int32."""
    is_token = tf.cast(input_ids != pad_token_id, tf.int32)
    return (tf.cumsum(is_token, axis=-1) + past_count) * is_token + pad_token_id


def visibility_mask(
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    causal_length: Any = None,
) -> Tensor | None:
    """The keys that each query may attend to: bool, [B, 1, L] or [B, L, L]; None means all."""
    masks = []
    if attention_mask is not None:
        mask = tf.cast(attention_mask, tf.bool)
        masks.append(tf.expand_dims(mask, 1) if mask.shape.rank == 2 else mask)
    if segment_ids is not None:
        masks.append(segment_ids[:, :, None] == segment_ids[:, None, :])
    if causal_length is not None:
        position = tf.range(causal_length)
        masks.append((position[:, None] >= position)[None])
    return functools.reduce(tf.logical_and, masks) if masks else None


def attention_bias(visible: Tensor | None) -> Tensor | None:
    """float32 [B, 1, 1 or L, T]: 0 where a key is visible, otherwise `MASKED_LOGIT`.

    Next to it any score vanishes in float32, so a query without visible keys attends evenly to
    all, as in Flax. In TensorFlow this sum is faster than a choice between scores and a constant.
    """
    return None if visible is None else tf.expand_dims(tf.where(visible, 0.0, MASKED_LOGIT), 1)


def encode(
    embeddings: Embeddings,
    encoder: Encoder,
    config: RobertaPreLayerNormConfig,
    dtype: Any,
    dropout: Dropout,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    head_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: KVCache | None = None,
    read_first: bool = False,
) -> EncoderOutput:
    """The encoder's output in `dtype`; inputs as those of `prelnroberta.model.encoder.Encoder`."""
    words, ids = _word_embeddings(embeddings, config, input_ids, inputs_embeds)
    cache = past_key_values
    if position_ids is None:
        past_count = 0 if cache is None else cache["count"][:, None]
        position_ids = default_position_ids(ids, config.pad_token_id, past_count)
    if cache is None:
        causal_length = shape_list(ids)[1] if config.is_decoder else None
        visible = visibility_mask(attention_mask, segment_ids, causal_length)
    else:
        is_token = ids != config.pad_token_id
        cache, visible = kv_cache.append_mask(cache, attention_mask, is_token)
        if encoder_hidden_states is not None and "cross_keys" not in cache:
            states = tf.cast(encoder_hidden_states, dtype)
            cache |= project_encoder_states(encoder, states, encoder_attention_mask)
        encoder_attention_mask = cache.get("cross_valid")
    context = AttentionContext(
        bias=attention_bias(visible),
        encoder_hidden_states=encoder_hidden_states,
        encoder_bias=attention_bias(visibility_mask(encoder_attention_mask)),
        cache_index=None if past_key_values is None else past_key_values["index"],
        dropout=dropout,
    )
    x = embeddings(words, position_ids, context=context, token_type_ids=token_type_ids)
    x = tf.cast(x, dtype)
    return encoder(x, context=context, head_mask=head_mask, cache=cache, read_first=read_first)


def _word_embeddings(
    embeddings: Embeddings,
    config: RobertaPreLayerNormConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The words [B, L, D], and ids [B, L] by which positions are counted."""
    if input_ids is not None:
        return take_rows(embeddings.word, input_ids), input_ids
    # Pads cannot be recognised by their vectors: every column counts.
    words = tf.cast(inputs_embeds, tf.float32)
    return words, tf.fill(shape_list(words)[:2], config.pad_token_id + 1)


def project_encoder_states(encoder: Encoder, states: Tensor, mask: Tensor | None = None) -> KVCache:
    """The cache's entries for encoder states [B, S, D] and their mask [B, S], of all layers."""
    pairs = [block.cross_attention.keys_and_values(states) for block in encoder.stack.blocks]
    keys, values = zip(*pairs, strict=True)
    valid = tf.ones(shape_list(states)[:2], tf.bool) if mask is None else tf.cast(mask, tf.bool)
    return {"cross_keys": keys, "cross_values": values, "cross_valid": valid}

"""The decoder's key/value cache: an explicit argument and result, a dict of tensors.

    keys, values              N of [B, H, T, K]
    valid                     [B, T] bool, columns that hold a visible token
    count                     [B] int32, tokens so far, without pads; positions continue from it
    index                     [] int32, the next column
    cross_keys, cross_values  N of [B, H, S, K] of the encoder states, after they were given
    cross_valid               [B, S] bool

Columns, pads and rows are treated as in `prelnroberta/model/kv_cache.py`.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from bridges.tensorflow.shapes import shape_list
from prelnroberta.config import RobertaPreLayerNormConfig

Tensor = tf.Tensor
KVCache = dict[str, Any]

PER_LAYER_KEYS = ("keys", "values", "cross_keys", "cross_values")


def init_cache(
    config: RobertaPreLayerNormConfig, batch_size: Any, max_length: Any, dtype: Any = tf.float32
) -> KVCache:
    """An empty cache for B = `batch_size` rows of T = `max_length` columns.

    `dtype` is that of the computation.
    """
    shape = [batch_size, config.num_attention_heads, max_length, config.head_dim]
    zeros = tuple(tf.zeros(shape, dtype) for _ in range(config.num_hidden_layers))
    return {
        "keys": zeros,
        "values": zeros,
        "valid": tf.zeros([batch_size, max_length], tf.bool),
        "count": tf.zeros([batch_size], tf.int32),
        "index": tf.zeros([], tf.int32),
    }


def append_mask(
    cache: KVCache, attention_mask: Tensor | None, is_token: Tensor
) -> tuple[KVCache, Tensor]:
    """Appends the validity of L new columns, before the layers write their keys and values.

    Args:
        attention_mask: [B, L], nonzero for a column that may be attended to; None: all.
        is_token: [B, L] bool, False for pads, which take no position.

    Returns:
        The cache, and the columns that each new token sees: the valid ones up to its own,
        [B, L, T] bool.
    """
    B, L = shape_list(is_token)
    T, index = shape_list(cache["valid"])[1], cache["index"]
    new = tf.ones([B, L], tf.bool) if attention_mask is None else tf.cast(attention_mask, tf.bool)
    valid = write_columns(cache["valid"][:, None, :, None], new[:, None, :, None], index)
    valid = valid[:, 0, :, 0]
    causal = tf.range(T) <= (index + tf.range(L))[:, None]
    count = cache["count"] + tf.reduce_sum(tf.cast(is_token, tf.int32), axis=-1)
    cache = {**cache, "valid": valid, "count": count, "index": index + L}
    return cache, valid[:, None, :] & causal


def write_columns(columns: Tensor, new: Tensor, index: Tensor) -> Tensor:
    """Replaces the columns of [B, H, T, K] from `index` on by `new` [B, H, L, K].

    By gather and where: TensorFlow has no in-place update that XLA compiles as well.
    """
    T, L = shape_list(columns)[2], shape_list(new)[2]
    source = tf.range(T) - index
    shifted = tf.gather(new, tf.clip_by_value(source, 0, L - 1), axis=2)
    return tf.where(((source >= 0) & (source < L))[:, None], shifted, columns)

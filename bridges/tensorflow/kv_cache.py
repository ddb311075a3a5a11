"""The decoder's key/value cache: an explicit argument and result, a dict of tensors.

    keys, values              N of [B, H, T, K]
    valid                     [B, T] bool: which columns hold a token that may be seen
    count                     [B] int32: real tokens so far; positions go on from there
    index                     [] int32: the next column
    cross_keys, cross_values  N of [B, H, S, K] of the encoder states, once they were given
    cross_valid               [B, S] bool

What `prelnroberta/model/kv_cache.py` says of columns, pads and rows holds here, too.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from prelnroberta.config import RobertaPreLayerNormConfig

Tensor = tf.Tensor
Cache = dict[str, Any]

OF_LAYERS = ("keys", "values", "cross_keys", "cross_values")


def init_cache(
    config: RobertaPreLayerNormConfig, batch: Any, columns: int, dtype: Any = tf.float32
) -> Cache:
    """An empty cache for B = `batch` rows of T = `columns`, in the dtype of the computation."""
    shape = [batch, config.num_attention_heads, columns, config.head_dim]
    empty = tuple(tf.zeros(shape, dtype) for _ in range(config.num_hidden_layers))
    return {
        "keys": empty,
        "values": empty,
        "valid": tf.zeros([batch, columns], tf.bool),
        "count": tf.zeros([batch], tf.int32),
        "index": tf.zeros([], tf.int32),
    }


def announce(cache: Cache, attention_mask: Tensor | None, real: Tensor) -> tuple[Cache, Tensor]:
    """Makes L new columns known, [B, L]: their validity, and the tokens they count.

    Returns the cache and which columns each new token sees, [B, L, T]: valid ones up to its own.
    """
    B, L = sizes(real)
    T, index = sizes(cache["valid"])[1], cache["index"]
    new = tf.ones([B, L], tf.bool) if attention_mask is None else tf.cast(attention_mask, tf.bool)
    valid = write_columns(cache["valid"][:, None, :, None], new[:, None, :, None], index)[
        :, 0, :, 0
    ]
    causal = tf.range(T) <= (index + tf.range(L))[:, None]
    count = cache["count"] + tf.reduce_sum(tf.cast(real, tf.int32), axis=-1)
    cache = {**cache, "valid": valid, "count": count, "index": index + L}
    return cache, valid[:, None, :] & causal


def write_columns(columns: Tensor, new: Tensor, index: Tensor) -> Tensor:
    """[B, H, T, K] with the columns from `index` on replaced by `new` [B, H, L, K].

    By a gather and a choice: TensorFlow has no update in place that XLA compiles as well.
    """
    T, L = sizes(columns)[2], sizes(new)[2]
    place = tf.range(T) - index
    spread = tf.gather(new, tf.clip_by_value(place, 0, L - 1), axis=2)
    return tf.where(((place >= 0) & (place < L))[:, None], spread, columns)


def sizes(x: Tensor) -> list[Any]:
    """The shape of x: ints where it is known, else scalars."""
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]

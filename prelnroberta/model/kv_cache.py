"""The decoder's key/value cache: a dict of arrays, passed in and returned explicitly.

    keys, values              [N, B, T, H, K]
    valid                     [B, T] bool: which columns hold a token that may be attended to
    count                     [B] int32: real tokens so far; the next position follows from it
    index                     [] int32: the next column
    cross_keys, cross_values  [N, B, S, H, K] of the encoder states, once given
    cross_valid               [B, S] bool

Columns are shared by all rows and may hold pads. Rows padded on either side are exact because
validity and positions are counted per row. transformers counts columns instead, which shifts the
positions of padded rows, and starts from 0 in `generate`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from prelnroberta.config import RobertaPreLayerNormConfig

Array = jax.Array
KVCache = dict[str, Array]

PER_LAYER_KEYS = ("keys", "values", "cross_keys", "cross_values")


def init_cache(
    config: RobertaPreLayerNormConfig, batch: int, max_length: int, dtype: Any = jnp.float32
) -> KVCache:
    """An empty cache for B = `batch` rows of T = `max_length` columns.

    `dtype` is that of the computation. T may exceed the model's number of positions, since pads
    take columns, too. Under jit, writing beyond T is not detected.
    """
    N, H, K = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    shape = N, batch, max_length, H, K
    return {
        "keys": jnp.zeros(shape, dtype),
        "values": jnp.zeros(shape, dtype),
        "valid": jnp.zeros((batch, max_length), bool),
        "count": jnp.zeros((batch,), jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def append_mask(
    cache: KVCache, attention_mask: Array | None, is_token: Array
) -> tuple[KVCache, Array]:
    """Appends the validity of L new columns, before `write_kv` writes their keys and values.

    Args:
        attention_mask: [B, L], nonzero for a column that may be attended to; None: all.
        is_token: [B, L] bool, False for pads, which take no position.

    Returns:
        The cache, and the columns that each new token sees: the valid ones up to its own,
        [B, L, T] bool.
    """
    B, L = is_token.shape
    new = jnp.ones((B, L), bool) if attention_mask is None else attention_mask != 0
    valid = jax.lax.dynamic_update_slice_in_dim(cache["valid"], new, cache["index"], 1)
    own_column = cache["index"] + jnp.arange(L)
    causal = jnp.arange(valid.shape[1]) <= own_column[:, None]
    cache = {**cache, "valid": valid, "count": cache["count"] + is_token.sum(-1, dtype=jnp.int32)}
    return cache, valid[:, None, :] & causal


def write_kv(cache: KVCache, layers: list[KVCache], length: int) -> KVCache:
    """Writes the keys and values of `length` new columns, given those of each layer."""
    new = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    for name in ("keys", "values"):
        start = (0, 0, cache["index"], 0, 0)
        new[name] = jax.lax.dynamic_update_slice(cache[name], new[name], start)
    return {**cache, **new, "index": cache["index"] + length}

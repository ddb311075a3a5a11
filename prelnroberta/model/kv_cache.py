"""The decoder's key/value cache: an explicit argument and result, a dict of arrays.

    keys, values              [N, B, T, H, K]
    valid                     [B, T] bool: which columns hold a token that may be seen
    count                     [B] int32: real tokens so far; positions go on from there
    index                     [] int32: the next column
    cross_keys, cross_values  [N, B, S, H, K] of the encoder states, once they were given
    cross_valid               [B, S] bool

Columns are shared by all rows and hold pads as well; rows padded on either side are exact because
validity and positions are counted by row. transformers counts columns there, which shifts the
positions of padded rows, and numbers from 0 in `generate`.
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

    `dtype` is that of the computation. There may be more columns than the model has positions:
    pads take a column, too. Writing beyond T is not noticed under jit.
    """
    shape = (config.num_hidden_layers, batch, max_length)
    shape += (config.num_attention_heads, config.head_dim)
    return {
        "keys": jnp.zeros(shape, dtype),
        "values": jnp.zeros(shape, dtype),
        "valid": jnp.zeros((batch, max_length), bool),
        "count": jnp.zeros((batch,), jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def announce(cache: KVCache, attention_mask: Array | None, real: Array) -> tuple[KVCache, Array]:
    """Makes L new columns known, [B, L]: their validity, and the tokens they count.

    Returns the cache and which columns each new token sees, [B, L, T]: valid ones up to its own.
    """
    B, L = real.shape
    new = jnp.ones((B, L), bool) if attention_mask is None else attention_mask != 0
    valid = jax.lax.dynamic_update_slice_in_dim(cache["valid"], new, cache["index"], 1)
    own = cache["index"] + jnp.arange(L)
    causal = jnp.arange(valid.shape[1]) <= own[:, None]
    cache = {**cache, "valid": valid, "count": cache["count"] + real.sum(-1, dtype=jnp.int32)}
    return cache, valid[:, None, :] & causal


def fill(cache: KVCache, layers: list[KVCache], length: int) -> KVCache:
    """Writes what each layer computed for `length` new columns, all layers at once."""
    new = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    for name in ("keys", "values"):
        place = (0, 0, cache["index"], 0, 0)
        new[name] = jax.lax.dynamic_update_slice(cache[name], new[name], place)
    return {**cache, **new, "index": cache["index"] + length}

"""Fused attention kernels, and where they cannot serve: cuDNN on GPUs, Pallas splash on TPUs.

They never see a matrix of probabilities, so they cannot drop any, return any or weigh heads.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError

Array = jax.Array
Implementation = Literal["xla", "cudnn", "splash"]

_BACKENDS = {"cudnn": "gpu", "splash": "tpu"}
# Splash works on tiles of this many positions and head dimensions.
_TILE = 128


def check(
    implementation: Implementation,
    config: RobertaPreLayerNormConfig,
    dtype: Any,
    attention_mask: Array | None,
    training: bool,
    asked: dict[str, bool],
) -> None:
    """Raises InputError, in one line, where a fused kernel cannot do what is asked.

    Args:
        training: whether dropout is on.
        asked: what else no fused kernel does -> whether it is asked for.
    """
    if implementation == "xla":
        return
    backend = jax.default_backend()
    asked = {
        f"the {backend} backend": backend != _BACKENDS[implementation],
        "float32 (choose bfloat16)": implementation == "cudnn" and dtype == jnp.float32,
        f"attention_probs_dropout_prob={config.attention_probs_dropout_prob} in training": training
        and config.attention_probs_dropout_prob > 0,
        "a mask [B, L, L]": implementation == "splash"
        and attention_mask is not None
        and attention_mask.ndim == 3,
        **asked,
    }
    reasons = [name for name, is_asked in asked.items() if is_asked]
    if reasons:
        raise InputError(
            f"attention={implementation!r} does not serve {', '.join(reasons)}: use attention='xla'"
        )


def segments_of(
    attention_mask: Array | None, segment_ids: Array | None, shape: tuple[int, int]
) -> Array:
    """Masks as segments, [B, L] int32: tokens see their own; padding is segment 0.

    Real tokens see what the masks say. Pads see pads, where an attention mask alone would let
    them see real tokens: their outputs mean nothing in either case.
    """
    segments = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    return segments if attention_mask is None else jnp.where(attention_mask != 0, segments, 0)


def cudnn(q: Array, keys: Array, values: Array, visible: Array | None) -> Array:
    """q [B, M, H, K], scaled, over keys, values [B, T, H, K] -> [B, M, H, K]."""
    mask = None if visible is None else visible[:, None]
    return jax.nn.dot_product_attention(
        q, keys, values, mask=mask, scale=1.0, implementation="cudnn"
    )


def splash(
    q: Array, keys: Array, values: Array, segments: Array, causal: bool, interpret: bool = False
) -> Array:
    """q [B, L, H, K], scaled, over keys, values [B, L, H, K] -> [B, L, H, K].

    Lengths and head dimensions are padded to whole tiles: pads in a segment of their own.

    Args:
        segments: [B, L], from `segments_of`.
        interpret: run the kernel as plain jax, on any backend: slow, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    _, L, H, K = q.shape

    def tiled(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -L % _TILE), (0, 0), (0, -K % _TILE)))
        return x.transpose(0, 2, 1, 3)

    segments = jnp.pad(segments, ((0, 0), (0, -L % _TILE)))
    length = segments.shape[1]
    mask_type = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
    mask = splash_attention_mask.MultiHeadMask([mask_type((length, length))] * H)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask, interpret=interpret)

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return kernel(q, k, v, splash_attention_kernel.SegmentIds(segments, segments))

    mixed = jax.vmap(row)(tiled(q), tiled(keys), tiled(values), segments)
    return mixed.transpose(0, 2, 1, 3)[:, :L, :, :K]

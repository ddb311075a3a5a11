"""Fused attention kernels, and where they cannot serve: cuDNN on GPUs, Pallas splash on TPUs.

They never see a matrix of probabilities, so they cannot drop any, return any or weigh heads. No
partitioner can cut them: over a mesh, each device runs its own on its rows and heads.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.distributed.sharding import apply_per_shard, target_platform
from prelnroberta.errors import InputError

Array = jax.Array
Kernel = Literal["cudnn", "splash"]
Choice = Literal["xla", "cudnn", "splash", "auto"]
CHOICES = get_args(Choice)

_PLATFORMS: dict[Kernel, str] = {"cudnn": "gpu", "splash": "tpu"}
# Splash works on tiles of this many positions; so many, if they divide the row, at once.
_TILE = 128
_BLOCKS = (512, 384, 256, 128)


def unsupported_reasons(
    kernel: Kernel,
    config: RobertaPreLayerNormConfig,
    dtype: Any,
    length: int,
    training: bool,
    platform: str,
) -> list[str]:
    """Why settings rule a kernel out, for rows of this length; empty where nothing does."""
    K, rate = config.head_dim, config.attention_probs_dropout_prob
    found = {
        f"the {platform} backend": platform != _PLATFORMS[kernel],
        f"attention_probs_dropout_prob={rate} in training, expected 0": training and rate > 0,
    }
    if kernel == "cudnn":
        found |= {
            "dtype=float32, expected bfloat16": dtype == jnp.float32,
            f"heads of {K} dimensions, expected a multiple of 8, 128 at most": K % 8 or K > 128,
            f"rows of {length} positions in training, expected an even number": training
            and length % 2,
        }
    return [reason for reason, holds in found.items() if holds]


def choose_kernel(
    choice: Choice,
    config: RobertaPreLayerNormConfig,
    dtype: Any,
    length: int,
    attention_mask: Array | None,
    training: bool,
    asked: dict[str, bool],
) -> Kernel | None:
    """The kernel to compute attention by; None: XLA's einsum and softmax.

    Args:
        training: whether dropout is on.
        asked: what else no fused kernel does -> whether it is asked for.

    Raises:
        InputError: in one line, where the kernel of choice cannot do what is asked. `auto` then
            takes none.
    """
    here = target_platform()
    kernels = [k for k in _PLATFORMS if k == choice or (choice == "auto" and _PLATFORMS[k] == here)]
    for kernel in kernels:
        reasons = unsupported_reasons(kernel, config, dtype, length, training, here)
        if kernel == "splash" and attention_mask is not None and attention_mask.ndim == 3:
            reasons.append("a mask [B, L, L]")
        reasons += [name for name, is_asked in asked.items() if is_asked]
        if not reasons:
            return kernel
        if choice != "auto":
            raise InputError(
                f"attention={choice!r} does not serve {', '.join(reasons)}: use attention='xla'"
            )
    return None


def to_segment_ids(
    attention_mask: Array | None, segment_ids: Array | None, shape: tuple[int, int]
) -> Array:
    """Masks as segments, [B, L] int32: tokens see their own; padding is segment 0.

    Real tokens see what the masks say. Pads see pads, where an attention mask alone would let
    them see real tokens: their outputs mean nothing in either case. Nobody sees nothing, where
    splash would be wrong.
    """
    segments = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    return segments if attention_mask is None else jnp.where(attention_mask != 0, segments, 0)


def cudnn(q: Array, keys: Array, values: Array, visible: Array | None) -> Array:
    """q [B, L, H, K], scaled, over keys, values [B, L, H, K] -> [B, L, H, K].

    Args:
        visible: [B, 1, L] or [B, L, L], which the kernel reads as a bias, once for all heads.
    """
    B, L = q.shape[:2]
    arrays, letters = [q, keys, values], ["BLHK"] * 3
    if visible is not None:
        # It takes no mask that is the same for all queries.
        arrays.append(jnp.broadcast_to(visible, (B, L, L)))
        letters.append("BLL")

    def kernel(q: Array, keys: Array, values: Array, visible: Array | None = None) -> Array:
        mask = None if visible is None else visible[:, None]
        return jax.nn.dot_product_attention(
            q, keys, values, mask=mask, scale=1.0, implementation="cudnn"
        )

    return apply_per_shard(kernel, arrays, letters)


def splash(
    q: Array, keys: Array, values: Array, segments: Array, causal: bool, interpret: bool = False
) -> Array:
    """q [B, L, H, K], scaled, over keys, values [B, L, H, K] -> [B, L, H, K].

    Lengths are filled up to whole tiles: the filling is a segment of its own, -1.

    Args:
        segments: [B, L], from `to_segment_ids`.
        interpret: run the kernel as plain jax, on any backend: slow, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    def kernel(q: Array, keys: Array, values: Array, segments: Array) -> Array:
        L, H = q.shape[1:3]

        def tiled(x: Array) -> Array:
            return jnp.pad(x, ((0, 0), (0, -L % _TILE), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

        segments = jnp.pad(segments, ((0, 0), (0, -L % _TILE)), constant_values=-1)
        length = segments.shape[1]
        block = next(size for size in _BLOCKS if length % size == 0)
        mask_type = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
        attend = splash_attention_kernel.make_splash_mha_single_device(
            splash_attention_mask.MultiHeadMask([mask_type((length, length))] * H),
            # One kernel makes all three gradients: the probabilities are computed again once.
            block_sizes=splash_attention_kernel.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                use_fused_bwd_kernel=True,
            ),
            interpret=interpret,
        )

        def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
            return attend(q, k, v, splash_attention_kernel.SegmentIds(segments, segments))

        mixed = jax.vmap(row)(tiled(q), tiled(keys), tiled(values), segments)
        return mixed.transpose(0, 2, 1, 3)[:, :L]

    return apply_per_shard(kernel, [q, keys, values, segments], ["BLHK"] * 3 + ["BL"])

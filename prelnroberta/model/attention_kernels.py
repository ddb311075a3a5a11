"""Fused attention kernels and what they support: cuDNN on GPUs, Pallas splash on TPUs.

They never hold a matrix of probabilities, so they have no attention dropout, no head mask and no
probabilities to return. No partitioner can shard them: on a mesh, each device runs the kernel on
its own rows and heads.
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
Attention = Literal["xla", "cudnn", "splash", "auto"]
ATTENTIONS = get_args(Attention)

_PLATFORMS: dict[Kernel, str] = {"cudnn": "gpu", "splash": "tpu"}
# Splash pads rows to a multiple of the tile size, and takes the largest block that divides them.
_TILE_SIZE = 128
_BLOCK_SIZES = (512, 384, 256, 128)


def unsupported_reasons(
    kernel: Kernel,
    config: RobertaPreLayerNormConfig,
    dtype: Any,
    length: int,
    training: bool,
    platform: str,
) -> list[str]:
    """Why a kernel does not support these settings and rows of `length`; empty if it does."""
    K, rate = config.head_dim, config.attention_probs_dropout_prob
    reasons = {
        f"the {platform} backend": platform != _PLATFORMS[kernel],
        f"attention_probs_dropout_prob={rate} in training, expected 0": training and rate > 0,
    }
    if kernel == "cudnn":
        reasons |= {
            "dtype=float32, expected bfloat16": dtype == jnp.float32,
            f"heads of {K} dimensions, expected a multiple of 8, 128 at most": K % 8 > 0 or K > 128,
            f"rows of {length} positions in training, expected an even number": training
            and length % 2 > 0,
        }
    return [reason for reason, applies in reasons.items() if applies]


def choose_kernel(
    attention: Attention,
    config: RobertaPreLayerNormConfig,
    dtype: Any,
    length: int,
    attention_mask: Array | None,
    training: bool,
    unsupported: dict[str, bool],
) -> Kernel | None:
    """The kernel that computes attention; None: XLA's einsum and softmax.

    Args:
        training: whether dropout is on.
        unsupported: feature that no fused kernel has -> whether it is requested.

    Raises:
        InputError: `attention` names a kernel that does not support the inputs. `auto` takes none
            in that case.
    """
    platform = target_platform()
    for kernel, kernel_platform in _PLATFORMS.items():
        if attention != kernel and (attention != "auto" or platform != kernel_platform):
            continue
        reasons = unsupported_reasons(kernel, config, dtype, length, training, platform)
        if kernel == "splash" and attention_mask is not None and attention_mask.ndim == 3:
            reasons.append("a mask [B, L, L]")
        reasons += [feature for feature, requested in unsupported.items() if requested]
        if not reasons:
            return kernel
        if attention != "auto":
            raise InputError(
                f"attention={attention!r} does not support {', '.join(reasons)}: use "
                "attention='xla'"
            )
    return None


def to_segment_ids(
    attention_mask: Array | None, segment_ids: Array | None, shape: tuple[int, int]
) -> Array:
    """Masks as segment ids, [B, L] int32: tokens see their own segment; padding is segment 0.

    Real tokens see the same as with the masks. Pads see pads, where an attention mask alone would
    let them see real tokens; their outputs are meaningless either way. Every query sees a key:
    splash is wrong for one that does not.
    """
    segments = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    return segments if attention_mask is None else jnp.where(attention_mask != 0, segments, 0)


def cudnn_attention(queries: Array, keys: Array, values: Array, visible: Array | None) -> Array:
    """queries [B, L, H, K], scaled, over keys, values [B, L, H, K] -> [B, L, H, K].

    Args:
        visible: [B, 1, L] or [B, L, L], which the kernel reads as a bias shared by all heads.
    """
    B, L = queries.shape[:2]
    arrays, letters = [queries, keys, values], ["BLHK"] * 3
    if visible is not None:
        # The kernel does not broadcast a mask over queries.
        arrays.append(jnp.broadcast_to(visible, (B, L, L)))
        letters.append("BLL")

    def kernel(queries: Array, keys: Array, values: Array, visible: Array | None = None) -> Array:
        mask = None if visible is None else visible[:, None]
        return jax.nn.dot_product_attention(
            queries, keys, values, mask=mask, scale=1.0, implementation="cudnn"
        )

    return apply_per_shard(kernel, arrays, letters)


def splash_attention(
    queries: Array,
    keys: Array,
    values: Array,
    segments: Array,
    causal: bool,
    interpret: bool = False,
) -> Array:
    """queries [B, L, H, K], scaled, over keys, values [B, L, H, K] -> [B, L, H, K].

    Rows are padded to whole tiles; the padding is a segment of its own, -1.

    Args:
        segments: [B, L], from `to_segment_ids`.
        interpret: run the kernel as plain JAX, on any backend: slow, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    def kernel(queries: Array, keys: Array, values: Array, segments: Array) -> Array:
        L, H = queries.shape[1:3]

        def pad_to_tiles(x: Array) -> Array:
            padding = ((0, 0), (0, -L % _TILE_SIZE), (0, 0), (0, 0))
            return jnp.pad(x, padding).transpose(0, 2, 1, 3)

        segments = jnp.pad(segments, ((0, 0), (0, -L % _TILE_SIZE)), constant_values=-1)
        length = segments.shape[1]
        block = next(size for size in _BLOCK_SIZES if length % size == 0)
        mask_type = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
        attend = splash_attention_kernel.make_splash_mha_single_device(
            splash_attention_mask.MultiHeadMask([mask_type((length, length))] * H),
            # One kernel computes all three gradients, so probabilities are recomputed once.
            block_sizes=splash_attention_kernel.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                use_fused_bwd_kernel=True,
            ),
            interpret=interpret,
        )

        def attend_row(q: Array, k: Array, v: Array, segments: Array) -> Array:
            return attend(q, k, v, splash_attention_kernel.SegmentIds(segments, segments))

        rows = *(pad_to_tiles(x) for x in (queries, keys, values)), segments
        mixed = jax.vmap(attend_row)(*rows)
        return mixed.transpose(0, 2, 1, 3)[:, :L]

    return apply_per_shard(kernel, [queries, keys, values, segments], ["BLHK"] * 3 + ["BL"])

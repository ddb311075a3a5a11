"""Building blocks of the model: norm, projection, dropout, activations, positions and masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from prelnroberta.distributed.sharding import is_single_cpu

Array = jax.Array


def gelu(x: Array) -> Array:
    """The exact erf form, as in every reference; jax's default is the tanh approximation.

    In float32 computed by erf, as in torch: half the time of jax's erfc on a CPU, and as close to
    float64 as torch is. In bfloat16, 1 + erf would cancel.
    """
    if x.dtype != jnp.float32:
        return jax.nn.gelu(x, approximate=False)
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def layer_norm(params: dict, x: Array, epsilon: float) -> Array:
    """Normalises the last axis. Statistics are float32, in two passes; the result has x's dtype.

    E[x^2] - E[x]^2 in one pass, Flax's default, is off by 1.7e-3 for rows of mean 100, std 1.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon)
    return (normed * params["scale"] + params["bias"]).astype(x.dtype)


def project(params: dict, equation: str, x: Array) -> Array:
    """einsum of x with the kernel, plus the bias, in x's dtype."""
    kernel, bias = params["kernel"].astype(x.dtype), params["bias"].astype(x.dtype)
    if not is_single_cpu():
        return jnp.einsum(equation, x, kernel) + bias
    # As a product of two matrices: of an einsum over B and L, XLA:CPU transposes both factors of
    # the gradient element by element, and multiplies the transposed ones at half the speed.
    leading = x.shape[: x.ndim + bias.ndim - kernel.ndim]
    matrix = kernel.reshape(-1, bias.size)
    rows = x.reshape(math.prod(leading), len(matrix))
    widens = bias.size > len(matrix) and bias.size % 2 == 0
    y = _widening_matmul(rows, matrix) if widens else rows @ matrix
    return y.reshape(*leading, *bias.shape) + bias


@jax.custom_jvp
def _widening_matmul(x: Array, matrix: Array) -> Array:
    """x @ matrix for a matrix that is wider than high, with a gradient that is fast on XLA:CPU.

    That gradient reads wide rows, for which XLA:CPU takes twice as long as for any other product
    of that size. Given the matrix as two halves, it makes a transposed copy first, which costs
    little, and computes an ordinary product.
    """
    return x @ matrix


@_widening_matmul.defjvp
def _widening_matmul_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, matrix), (dx, d_matrix) = primals, tangents
    halves = jnp.einsum("rd,dif->rif", x, d_matrix.reshape(len(d_matrix), 2, -1))
    y = _widening_matmul(x, matrix)
    return y, _widening_matmul(dx, matrix) + halves.reshape(len(x), -1)


def dropout(x: Array, rate: float, rngs: Array | None) -> Array:
    """Inverted dropout of x [B, ...], element by element; the identity without rngs.

    Args:
        rate: rounded to a multiple of 2^-16. Kept elements are scaled by the rounded rate, so the
            expectation is exact.
        rngs: [B], one key per row, so that a row's bits do not depend on the device or the part of
            the batch in which it is computed. Or [], a single key, which is split.
    """
    threshold = round(rate * 2**16)
    if rngs is None or threshold == 0:
        return x
    bits = jax.vmap(partial(_random_uint16, shape=x.shape[1:]))(per_row_rngs(rngs, len(x)))
    scaled = x * jnp.asarray(1.0 / (1.0 - threshold / 2**16), x.dtype)
    return jnp.where(bits >= threshold, scaled, jnp.zeros_like(x))


def _random_uint16(rng: Array, shape: tuple[int, ...]) -> Array:
    """Uniform uint16 [*shape], four per block of threefry, where jax.random takes one.

    A block covers four elements of the last axis. Blocks are numbered over all axes, so a device
    that holds some of the heads draws for those alone.
    """
    blocks = (*shape[:-1], -(-shape[-1] // 4))
    strides = [math.prod(blocks[axis + 1 :]) for axis in range(len(blocks))]
    counts = sum(
        jax.lax.broadcasted_iota(jnp.uint32, blocks, axis) * jnp.uint32(stride)
        for axis, stride in enumerate(strides)
    )
    # For another key type (rbg), the first half, by which it is split and folded.
    first, second = jax.random.key_data(rng)[:2]
    words = threefry2x32_p.bind(first, second, counts, jnp.zeros_like(counts))
    halves = jax.lax.bitcast_convert_type(jnp.stack(words, axis=-1), jnp.uint16)
    return halves.reshape(*blocks[:-1], -1)[..., : shape[-1]]


def as_typed_rngs(rngs: Array) -> Array:
    """Typed keys (`jax.random.key`), from typed or raw ones (`jax.random.PRNGKey`, [..., 2])."""
    if jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key):
        return rngs
    return jax.random.wrap_key_data(rngs)


def per_row_rngs(rngs: Array, rows: int) -> Array:
    """[rows] keys: the given ones, or a single one split."""
    return rngs if rngs.ndim else jax.random.split(rngs, rows)


def split_rngs(rngs: Array | None, count: int) -> Any:
    """[B] keys -> [count, B], each row's key split by itself; a single key -> [count].

    None, which turns dropout off, gives Nones.
    """
    if rngs is None:
        return (None,) * count
    if rngs.ndim:
        return jax.vmap(partial(jax.random.split, num=count), out_axes=1)(rngs)
    return jax.random.split(rngs, count)


def gather_positions(x: Array, positions: Array) -> Array:
    """Gathers [B, L, ...] at [B, M] -> [B, M, ...], row by row; at [1, M], the same in all rows.

    A gather over the flattened batch would make sharded programs collect the whole batch.
    """
    index = positions.reshape(positions.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def default_position_ids(input_ids: Array, pad_token_id: int, past_count: Array | int = 0) -> Array:
    """Positions that count real tokens: pad + 1, pad + 2, ...; pads get pad. [B, L] int32.

    The rule reads ids, not the attention mask, and holds wherever the pads are (fairseq/utils.py
    make_positions; transformers create_position_ids_from_input_ids).

    Args:
        past_count: [B, 1], the number of real tokens in the cache.
    """
    is_token = (input_ids != pad_token_id).astype(jnp.int32)
    return (jnp.cumsum(is_token, axis=-1) + past_count) * is_token + pad_token_id


def visibility_mask(
    attention_mask: Array | None = None,
    segment_ids: Array | None = None,
    causal_length: int | None = None,
) -> Array | None:
    """The keys that each query may attend to: bool, [B, 1, L] or [B, L, L]; None means all.

    Args:
        attention_mask: [B, L] over keys or [B, L, L] over queries and keys; nonzero is visible.
        segment_ids: [B, L] int. Tokens see their own segment only. 0 is padding, a segment of
            its own, so that every query sees at least one key.
        causal_length: L, if no token may see a later one.
    """
    masks = []
    if attention_mask is not None:
        mask = attention_mask != 0
        masks.append(mask[:, None, :] if mask.ndim == 2 else mask)
    if segment_ids is not None:
        masks.append(segment_ids[:, :, None] == segment_ids[:, None, :])
    if causal_length is not None:
        masks.append(jnp.tri(causal_length, dtype=bool)[None])
    return reduce(jnp.logical_and, masks) if masks else None

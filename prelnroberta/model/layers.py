"""What every part of the model is made of: norm, projection, dropout, activations, a gather; and
where tokens stand and which others they see.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from prelnroberta.distributed.sharding import is_single_cpu

Array = jax.Array


def gelu(x: Array) -> Array:
    """The exact erf form, as in every reference; jax's default is the tanh approximation.

    In float32 by erf, as torch: half the time of jax's erfc on a CPU, and as close to float64 as
    torch is. In bfloat16 1 + erf would cancel.
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


def layer_norm(p: dict, x: Array, epsilon: float) -> Array:
    """Normalises the last axis; statistics in float32 by two passes, result in x's dtype.

    E[x^2] - E[x]^2 in one pass, Flax's default, is off by 1.7e-3 for rows of mean 100, std 1.
    """
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon)
    return (normed * p["scale"] + p["bias"]).astype(x.dtype)


def project(p: dict, equation: str, x: Array) -> Array:
    """einsum with the kernel, in x's dtype, and the bias."""
    kernel, bias = p["kernel"].astype(x.dtype), p["bias"].astype(x.dtype)
    if not is_single_cpu():
        return jnp.einsum(equation, x, kernel) + bias
    # As a product of two matrices: XLA:CPU transposes both factors of an einsum's gradient over B
    # and L, element by element, and multiplies what is transposed at half the speed.
    leading = x.shape[: x.ndim + bias.ndim - kernel.ndim]
    matrix = kernel.reshape(-1, bias.size)
    rows = x.reshape(math.prod(leading), len(matrix))
    wider = bias.size > len(matrix) and bias.size % 2 == 0
    y = _widen(rows, matrix) if wider else rows @ matrix
    return y.reshape(*leading, *bias.shape) + bias


@jax.custom_jvp
def _widen(x: Array, matrix: Array) -> Array:
    """x @ matrix, whose gradient reads wide rows: XLA:CPU takes twice as long for it as for any
    other product of that size. Of a matrix in two halves it makes a transposed copy first, which
    costs little, and an ordinary product."""
    return x @ matrix


@_widen.defjvp
def _widen_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, matrix), (dx, d_matrix) = primals, tangents
    halves = jnp.einsum("nd,dhf->nhf", x, d_matrix.reshape(len(d_matrix), 2, -1))
    return _widen(x, matrix), _widen(dx, matrix) + halves.reshape(len(x), -1)


def dropout(x: Array, rate: float, keys: Array | None) -> Array:
    """Inverted dropout of x [B, ...]; the identity without keys. Every element draws for itself.

    Args:
        rate: rounded to a multiple of 2^-16, and what is kept is scaled by the rounded rate: the
            expectation is exact.
        keys: [B], a row's own, so that its bits are the same on whatever device, in whatever part
            of the batch it is computed. Or one for all rows.
    """
    dropped = round(rate * 2**16)
    if keys is None or dropped == 0:
        return x
    drawn = jax.vmap(partial(_uniform16, shape=x.shape[1:]))(per_row_rngs(keys, len(x)))
    kept = x * jnp.asarray(1.0 / (1.0 - dropped / 2**16), x.dtype)
    return jnp.where(drawn >= dropped, kept, jnp.zeros_like(x))


def _uniform16(key: Array, shape: tuple[int, ...]) -> Array:
    """uint16 [*shape], four from each block of threefry, where jax.random makes one of it.

    Blocks are counted over the last axis in fours and over all others one by one, so that a device
    that holds some heads draws for those alone.
    """
    blocks = (*shape[:-1], -(-shape[-1] // 4))
    strides = [math.prod(blocks[axis + 1 :]) for axis in range(len(blocks))]
    counts = sum(
        jax.lax.broadcasted_iota(jnp.uint32, blocks, axis) * jnp.uint32(stride)
        for axis, stride in enumerate(strides)
    )
    # Of a key of another kind (rbg) the first half, by which it is split and folded.
    first, second = jax.random.key_data(key)[:2]
    words = threefry2x32_p.bind(first, second, counts, jnp.zeros_like(counts))
    halves = jax.lax.bitcast_convert_type(jnp.stack(words, axis=-1), jnp.uint16)
    return halves.reshape(*blocks[:-1], -1)[..., : shape[-1]]


def as_typed_rngs(keys: Array) -> Array:
    """Keys as `jax.random.key` makes them, of those or of `jax.random.PRNGKey`'s [..., 2]."""
    if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        return keys
    return jax.random.wrap_key_data(keys)


def per_row_rngs(keys: Array, rows: int) -> Array:
    """[B] keys: the given ones, or as many from a single one."""
    return keys if keys.ndim else jax.random.split(keys, rows)


def split_rngs(keys: Array, count: int) -> Array:
    """[B] keys -> [count, B], of each row by itself; one key -> [count]."""
    if keys.ndim:
        return jax.vmap(partial(jax.random.split, num=count), out_axes=1)(keys)
    return jax.random.split(keys, count)


def gather_positions(x: Array, positions: Array) -> Array:
    """Gathers [B, L, ...] at [B, M] -> [B, M, ...], row by row; at [1, M], the same in all rows.

    A gather over the flattened batch would make sharded programs collect the whole batch.
    """
    index = positions.reshape(positions.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def default_position_ids(input_ids: Array, pad_token_id: int, before: Array | int = 0) -> Array:
    """Positions by counting real tokens: pad + 1, pad + 2, ...; pads get pad. [B, L] int32.

    The rule reads ids, not the attention mask, and works for padding on either side or amid
    (fairseq/utils.py make_positions; transformers create_position_ids_from_input_ids).

    Args:
        before: [B, 1], how many real tokens came before, in a cache.
    """
    real = (input_ids != pad_token_id).astype(jnp.int32)
    return (jnp.cumsum(real, axis=-1) + before) * real + pad_token_id


def visibility_mask(
    attention_mask: Array | None = None,
    segment_ids: Array | None = None,
    causal_length: int | None = None,
) -> Array | None:
    """Which keys each query may see: bool, [B, 1, L] or [B, L, L]; None means all.

    Args:
        attention_mask: [B, L] over keys or [B, L, L] over queries and keys; nonzero is visible.
        segment_ids: [B, L] int. Tokens see their own segment only. 0 is padding, a segment of
            its own, so that no row of attention is ever empty.
        causal_length: L, where no token may see a later one.
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

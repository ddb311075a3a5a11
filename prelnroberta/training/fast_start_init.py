"""Initial values with which a masked LM leaves the unigram plateau within dozens of steps.

Trained from scratch, a masked LM first learns word frequencies and then stays on this plateau, on
small budgets for millions of tokens. A masked position has no content of its own, so only positions
can tell it which neighbour to attend to, and random position vectors do not. Without attention to
neighbours, no gradient says which neighbour is useful. Fast start initializes exactly this skill.
Training can change all of it:

- Positions are sinusoids in the first K of the D dimensions only, where they do not disturb the
  words: K / 2 frequencies, evenly spaced up to half a turn per token.
- Each head of the first layer attends to one neighbour: -1, +1, -2, +2, ... Its query reads the
  sinusoids unchanged, its key rotates them by the offset, so that they match at that distance. Its
  value ignores the sinusoids.
- Kernels have variance 1 / fan-in. The embedding norm gives the residual stream unit scale, to
  which the usual 0.02 would add almost nothing. The output of the first attention is four times as
  large, that of all other sublayers half as large, so that the neighbours remain visible.
- The output bias is the log frequency of each token, which is what the plateau teaches.

The architecture and all later steps are unchanged. It is not a plain initialization, so do not use
it to study how word order is learned. WORKSPACE.md, "How a masked LM leaves the plateau", has
measurements of each part. The rotation is that of RoFormer (Su et al., 2021), as an initial value
only.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError

# Standard deviation of the K dimensions of positions, relative to that of words.
_POSITION_GAIN = 2.0
# Scale of what sublayers add to the residual stream, relative to 1 / sqrt(fan-in).
_FIRST_ATTENTION_GAIN = 4.0
_RESIDUAL_GAIN = 0.5
# Product of query and key scales, times sqrt(K). It is large enough for a head to put all of its
# attention on its neighbour.
_SHARPNESS = 20.0


def check_length(config: RobertaPreLayerNormConfig, length: int) -> None:
    """Raises InputError if rows of `length` tokens have more positions than the sinusoids separate.

    K / 2 evenly spaced frequencies repeat after 2 * K positions. K must be even, for pairs of sine
    and cosine.
    """
    K = config.head_dim
    if K % 2 or length > 2 * K:
        raise InputError(
            f"fast start: heads of dimension {K} distinguish {2 * K} positions, but rows have "
            f"{length}; use shorter rows, wider heads (of an even dimension) or no fast start"
        )


def fast_start(
    params: parameters.Tree,
    config: RobertaPreLayerNormConfig,
    log_frequencies: np.ndarray,
) -> parameters.Tree:
    """Returns a freshly initialized masked-LM tree with the values above; float32, same shapes.

    Args:
        params: from `params.init`.
        log_frequencies: [V], log of each token's share of the training text; -inf if it is absent.
    """
    flat = parameters.flatten(params)
    _scale_kernels(flat, config)
    _set_positions(flat, config)
    _set_first_attention(flat, config)
    present = np.isfinite(log_frequencies)
    bias = np.where(present, log_frequencies, log_frequencies[present].min())
    flat["lm_head/bias"] = jnp.asarray(bias, jnp.float32)
    return parameters.unflatten(flat)


def _scale_kernels(flat: dict[str, Any], config: RobertaPreLayerNormConfig) -> None:
    for path, row in parameters.table(config).items():
        if row.kind == "kernel":
            shape = flat[path].shape[1:] if row.is_stacked else flat[path].shape
            fan_in, _ = row.matrix_shape(shape)
            gain = _RESIDUAL_GAIN if path.endswith(("/output/kernel", "/wo/kernel")) else 1.0
            flat[path] = flat[path] * (gain / (config.initializer_range * fan_in**0.5))


def _set_positions(flat: dict[str, Any], config: RobertaPreLayerNormConfig) -> None:
    K = config.head_dim
    positions = np.zeros((config.max_position_embeddings, config.hidden_size))
    positions[:, :K] = _sinusoids(np.arange(len(positions))[:, None] * _frequencies(K))
    positions *= _POSITION_GAIN * config.initializer_range * 2**0.5
    positions[config.pad_token_id] = 0.0
    flat["embeddings/position"] = jnp.asarray(positions, jnp.float32)


def _set_first_attention(flat: dict[str, Any], config: RobertaPreLayerNormConfig) -> None:
    K = config.head_dim
    query, key = (np.zeros((config.hidden_size, config.num_attention_heads, K)) for _ in "qk")
    for head in range(config.num_attention_heads):
        distance = head // 2 + 1
        offset = distance if head % 2 else -distance
        query[:K, head] = np.eye(K)
        key[:K, head] = _rotation(-offset * _frequencies(K))
    scale = (_SHARPNESS / K**0.5) ** 0.5
    attention = "encoder/layers/attention"
    for name, kernel in (("query", query), ("key", key)):
        path = f"{attention}/{name}/kernel"
        flat[path] = flat[path].at[0].set(scale * kernel)
    output, value = f"{attention}/output/kernel", f"{attention}/value/kernel"
    flat[output] = flat[output].at[0].multiply(_FIRST_ATTENTION_GAIN / _RESIDUAL_GAIN)
    flat[value] = flat[value].at[0, :K].set(0.0)


def _frequencies(K: int) -> np.ndarray:
    """[K / 2], radians per token."""
    return np.pi * (np.arange(K // 2) + 0.5) / (K // 2)


def _sinusoids(angles: np.ndarray) -> np.ndarray:
    """[..., K / 2] angles -> [..., K]: sine and cosine, interleaved."""
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(*angles.shape[:-1], -1)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """[K, K]: maps the row vector `_sinusoids(x)` to `_sinusoids(x + angles)`."""
    matrix = np.zeros((2 * len(angles),) * 2)
    for i, angle in enumerate(angles):
        sine, cosine = np.sin(angle), np.cos(angle)
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[cosine, -sine], [sine, cosine]]
    return matrix

"""Initial values with which a masked LM leaves the unigram plateau in dozens of steps.

Trained from scratch, a masked LM first learns word frequencies and then stays there, for millions
of tokens on small budgets. It knows nothing of order yet: a masked position has no content of its
own, so all that could tell it where to look are the positions, and attention by random position
vectors is a needle in a haystack; without it no gradient says which neighbour to look at. What
follows gives it that one skill, and nothing that training cannot change:

- Positions are sinusoids, in the first K of the D dimensions alone, where they do not disturb the
  words: K / 2 frequencies, evenly spaced up to half a turn a token.
- Each head of the first layer looks at one neighbour: -1, +1, -2, +2, ... Its query reads the
  sinusoids as they are, its key turned by the offset, so that they match at that distance. Its
  value leaves the sinusoids out.
- Kernels have variance 1 / fan-in: the embedding norm gives the residual stream unit size, beside
  which 0.02 is silence. What the first layer's attention writes to the stream is four times as
  large, all else half: the neighbours come through clean.
- The output bias is the log frequency of each token: what the plateau teaches is known at once.

The architecture is untouched, and so is every later step; but it is no plain start, and whoever
studies how order is learned should not use it. What each part is worth was measured (WORKSPACE.md,
"How a masked LM leaves the plateau"). The rotation is RoFormer's (Su et al., 2021), as an initial
value only.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError

# Deviation of the positions' K dimensions against that of words.
_POSITION_GAIN = 2.0
# What sublayers write to the stream, against 1 / sqrt(fan-in).
_FIRST_ATTENTION_GAIN = 4.0
_RESIDUAL_GAIN = 0.5
# Squared length of the product of query and key scales, times sqrt(K): with it a head puts all its
# weight on its neighbour.
_SHARPNESS = 20.0


def check_length(config: RobertaPreLayerNormConfig, length: int) -> None:
    """Raises InputError where rows of `length` tokens are longer than the sinusoids tell apart.

    K / 2 evenly spaced frequencies repeat after 2 * K positions, and K must be even for pairs of
    sine and cosine.
    """
    K = config.head_dim
    if K % 2 or length > 2 * K:
        raise InputError(
            f"fast start: heads of dimension {K} tell {2 * K} positions apart, rows have {length}: "
            "take shorter rows or wider heads (of an even dimension), or leave fast start out"
        )


def fast_start(
    params: parameters.Tree,
    config: RobertaPreLayerNormConfig,
    log_frequencies: np.ndarray,
) -> parameters.Tree:
    """A freshly initialized masked-LM tree with the values above; float32, same shapes.

    Args:
        params: from `params.init`.
        log_frequencies: [V], log of each token's share of the training text, -inf for none.
    """
    K = config.head_dim
    flat, table = parameters.flatten(params), parameters.table(config)
    for path, row in table.items():
        if row.kind == "kernel":
            shape = flat[path].shape[1:] if row.stacked else flat[path].shape
            fan_in, _ = row.matrix(shape)
            gain = _RESIDUAL_GAIN if path.endswith(("/output/kernel", "/wo/kernel")) else 1.0
            flat[path] = flat[path] * (gain / (config.initializer_range * fan_in**0.5))

    turns = np.pi * (np.arange(K // 2) + 0.5) / (K // 2)  # radians a token
    positions = np.zeros((config.max_position_embeddings, config.hidden_size))
    positions[:, :K] = _pairs(np.arange(len(positions))[:, None] * turns)
    positions *= _POSITION_GAIN * config.initializer_range * 2**0.5
    positions[config.pad_token_id] = 0.0
    flat["embeddings/position"] = jnp.asarray(positions, jnp.float32)

    layer = "encoder/layers/attention"
    query, key = (np.zeros((config.hidden_size, config.num_attention_heads, K)) for _ in "qk")
    for head in range(config.num_attention_heads):
        distance = head // 2 + 1
        offset = distance if head % 2 else -distance
        query[:K, head] = np.eye(K)
        key[:K, head] = _rotation(-offset * turns)
    scale = (_SHARPNESS / K**0.5) ** 0.5
    for name, first in (("query", query), ("key", key)):
        path = f"{layer}/{name}/kernel"
        flat[path] = flat[path].at[0].set(scale * first)
    output = f"{layer}/output/kernel"
    flat[output] = flat[output].at[0].multiply(_FIRST_ATTENTION_GAIN / _RESIDUAL_GAIN)
    flat[f"{layer}/value/kernel"] = flat[f"{layer}/value/kernel"].at[0, :K].set(0.0)

    known = np.isfinite(log_frequencies)
    bias = np.where(known, log_frequencies, log_frequencies[known].min())
    flat["lm_head/bias"] = jnp.asarray(bias, jnp.float32)
    return parameters.unflatten(flat)


def _pairs(angles: np.ndarray) -> np.ndarray:
    """[..., K / 2] angles -> [..., K]: sine and cosine side by side."""
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(*angles.shape[:-1], -1)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """[K, K]: takes `_pairs(x)`, as a row, to `_pairs(x + angles)`."""
    matrix = np.zeros((2 * len(angles),) * 2)
    for i, angle in enumerate(angles):
        sine, cosine = np.sin(angle), np.cos(angle)
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[cosine, -sine], [sine, cosine]]
    return matrix

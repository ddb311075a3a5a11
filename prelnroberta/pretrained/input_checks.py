"""Checks of a model's arguments on the host, before anything is computed.

Under jit an id out of range silently becomes NaN or the nearest row of a table; here it is an error
in one line. Of traced values only shapes and dtypes are checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prelnroberta.config import (
    IGNORE_INDEX,
    MULTI_LABEL,
    SINGLE_LABEL,
    RobertaPreLayerNormConfig,
)
from prelnroberta.errors import InputError
from prelnroberta.model.kv_cache import init_cache
from prelnroberta.model.losses import infer_problem_type

# Argument -> the config field that bounds its ids; None: any id from 0 on.
_ID_LIMITS = {
    "input_ids": "vocab_size",
    "token_type_ids": "type_vocab_size",
    "position_ids": "max_position_embeddings",
    "segment_ids": None,
}


def as_array(name: str, value: Any) -> Any:
    """Converts lists to arrays; raises InputError if they are ragged or not numbers."""
    if value is None or isinstance(value, (np.ndarray, jax.Array)):
        return value
    try:
        value = np.asarray(value)
    except ValueError as error:
        raise InputError(
            f"{name}: rows of different lengths, expected an array ({error})"
        ) from None
    if not (np.issubdtype(value.dtype, np.number) or value.dtype == bool):
        raise InputError(f"{name} is {value.dtype}, expected numbers")
    return value


def check_inputs(
    config: RobertaPreLayerNormConfig, inputs: Mapping[str, Any], batch_axes: int = 1
) -> None:
    """Checks the arguments of a model against its config and each other.

    Args:
        inputs: name -> array or None; names as in `Encoder.__call__`.
        batch_axes: the number of axes before L: 1 for [B, L], 2 for [B, A, L] (multiple choice).

    Raises:
        InputError: naming the argument, what it is and what was expected.
    """
    shape = _check_input_shape(config, inputs, batch_axes)
    if inputs.get("position_ids") is None:
        config.check_length(shape[-1])
    for name, limit in _ID_LIMITS.items():
        if inputs.get(name) is not None:
            _require_shape(name, inputs[name], [shape])
            size = None if limit is None else getattr(config, limit)
            check_integers(name, inputs[name], size, limit)
    *batch, L = shape
    H, N = config.num_attention_heads, config.num_hidden_layers
    _check_optional_shape(inputs, "attention_mask", shape, (*batch, L, L))
    _check_optional_shape(inputs, "head_mask", (H,), (N, H))
    _check_encoder_states(config, inputs, batch[0], L)


def _check_input_shape(
    config: RobertaPreLayerNormConfig, inputs: Mapping[str, Any], batch_axes: int
) -> tuple[int, ...]:
    """Checks input_ids or inputs_embeds; returns [B, L], or [B, A, L] with two batch axes."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise InputError("give input_ids or inputs_embeds: one of the two, and not both")
    letters, D = "[B, A, L]" if batch_axes == 2 else "[B, L]", config.hidden_size
    if ids is None:
        _require_rank("inputs_embeds", embeds, batch_axes + 2, letters[:-1] + f", {D}]")
        _require_shape("inputs_embeds", embeds, [(*embeds.shape[:-1], D)])
        if not jnp.issubdtype(embeds.dtype, jnp.floating):
            raise InputError(f"inputs_embeds is {embeds.dtype}, expected floats")
        shape = tuple(embeds.shape[:-1])
    else:
        _require_rank("input_ids", ids, batch_axes + 1, letters)
        shape = tuple(ids.shape)
    if 0 in shape:
        name = "inputs_embeds" if ids is None else "input_ids"
        raise InputError(f"{name} has shape {list(shape)}, expected no empty axis")
    return shape


def _check_encoder_states(
    config: RobertaPreLayerNormConfig, inputs: Mapping[str, Any], B: int, L: int
) -> None:
    states = inputs.get("encoder_hidden_states")
    if states is None:
        if inputs.get("encoder_attention_mask") is not None:
            raise InputError("encoder_attention_mask: also give its encoder_hidden_states")
        return
    if not config.add_cross_attention:
        raise InputError(
            "encoder_hidden_states: config has add_cross_attention=False, nothing reads them"
        )
    D = config.hidden_size
    _require_rank("encoder_hidden_states", states, 3, f"[B, S, {D}]")
    S = states.shape[1]
    _require_shape("encoder_hidden_states", states, [(B, S, D)])
    _check_optional_shape(inputs, "encoder_attention_mask", (B, S), (B, L, S))


def check_cache(config: RobertaPreLayerNormConfig, cache: Any, inputs: Mapping[str, Any]) -> None:
    """Checks a cache against the model and the new columns; `inputs` as in `check_inputs`.

    Raises:
        InputError: if it is not a cache, is one of another model or batch, or is full.
    """
    new = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
    B, L = new.shape[:2]
    if not isinstance(cache, Mapping) or "valid" not in cache:
        raise InputError("past_key_values is not a cache of this package; make one by init_cache")
    columns = cache["valid"].shape[1]
    expected = jax.eval_shape(lambda: init_cache(config, B, columns))
    found = {name: cache.get(name) for name in expected}
    if jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, expected):
        keys_shape = list(jnp.shape(cache.get("keys")))
        raise InputError(
            "past_key_values was made for another model or batch: its keys have shape "
            f"{keys_shape}, expected {list(expected['keys'].shape)}"
        )
    if _is_traced(cache["index"]):
        return
    used = int(cache["index"])
    if used + L > columns:
        raise InputError(
            f"past_key_values has {columns} columns, {used} used: no room for {L} more; call "
            "init_cache with a larger max_length"
        )
    if inputs.get("position_ids") is None and not _is_traced(new):
        is_token = np.ones((B, L), int)
        if inputs.get("input_ids") is not None:
            is_token = np.asarray(new) != config.pad_token_id
        config.check_length(int((np.asarray(cache["count"]) + is_token.sum(-1)).max()))


def check_prng_key(name: str, key: Any) -> None:
    """Raises InputError unless `key` is a jax PRNG key, typed or of two uint32."""
    is_array = isinstance(key, (jax.Array, np.ndarray))
    if not (is_array and (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == "uint32")):
        raise InputError(f"{name} is {key!r}, expected a jax PRNG key such as jax.random.key(0)")


def logits_shape(
    config: RobertaPreLayerNormConfig, model: str, input_shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of the logits of a model that takes labels.

    Args:
        input_shape: [B, L] or [B, L, D]; [B, A, L] or [B, A, L, D] for multiple choice.
    """
    B, L = input_shape[:2]  # L is A for multiple choice
    V, C = config.vocab_size, config.num_labels
    return {
        "sequence_classification": (B, C),
        "multiple_choice": (B, L),
        "token_classification": (B, L, C),
    }.get(model, (B, L, V))


def check_labels(
    config: RobertaPreLayerNormConfig, model: str, labels: Any, input_shape: tuple[int, ...]
) -> None:
    """Checks labels against the logits of inputs of this shape; see `logits_shape`.

    Raises:
        InputError: naming the labels' shape, dtype or value and what was expected.
    """
    shape = logits_shape(config, model, input_shape)
    if model == "multiple_choice":
        _require_shape("labels", labels, [shape[:1]])
        check_integers("labels", labels, shape[-1], "choices", allow_ignored=True)
    elif model != "sequence_classification":
        _require_shape("labels", labels, [shape[:-1]])
        limit = "vocab_size" if model in ("masked_lm", "causal_lm") else "num_labels"
        check_integers("labels", labels, shape[-1], limit, allow_ignored=True)
    else:
        _check_sequence_labels(config, labels, shape)


def _check_sequence_labels(
    config: RobertaPreLayerNormConfig, labels: Any, shape: tuple[int, ...]
) -> None:
    B, C = shape
    problem_type = infer_problem_type(config, labels)
    if problem_type == SINGLE_LABEL:
        _require_shape("labels", labels, [(B,)])
        check_integers("labels", labels, C, "num_labels", allow_ignored=True)
        return
    _require_shape("labels", labels, [shape, *([(B,)] if C == 1 else [])])
    if _is_traced(labels):
        return
    values = np.asarray(labels, np.float32)
    if not np.isfinite(values).all():
        raise InputError("labels: NaN or infinity, expected finite numbers")
    if problem_type == MULTI_LABEL and ((values < 0) | (values > 1)).any():
        raise InputError("labels: expected numbers in [0, 1], one per label")


def check_span_positions(name: str, positions: Any, batch_size: int) -> None:
    """Raises InputError unless positions are integers [B]; those out of the row are ignored."""
    _require_shape(name, positions, [(batch_size,)])
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise InputError(f"{name} is {positions.dtype}, expected integers")


def check_integers(
    name: str, value: Any, size: int | None, limit: str | None, allow_ignored: bool = False
) -> None:
    """Raises InputError unless `value` is integers in [0, size), or -100 if `allow_ignored`.

    Args:
        size: None: no upper limit.
        limit: what `size` is, for the message.
    """
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise InputError(f"{name} is {value.dtype}, expected integers")
    if _is_traced(value):
        return
    host = np.asarray(value)
    invalid = host < 0
    if size is not None:
        invalid |= host >= size
    if allow_ignored:
        invalid &= host != IGNORE_INDEX
    if invalid.any():
        index = np.argwhere(invalid)[0].tolist()
        expected = "0 or more" if size is None else f"0 to {limit} - 1 = {size - 1}"
        raise InputError(
            f"{name}{index} is {host[tuple(index)]}, expected {expected}"
            + (f", or {IGNORE_INDEX} for an ignored target" if allow_ignored else "")
        )


def _require_rank(name: str, value: Any, rank: int, letters: str) -> None:
    if value.ndim != rank:
        raise InputError(f"{name} has shape {list(value.shape)}, expected {letters}")


def _require_shape(name: str, value: Any, shapes: Any) -> None:
    if tuple(value.shape) not in [tuple(shape) for shape in shapes]:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise InputError(f"{name} has shape {list(value.shape)}, expected {expected}")


def _check_optional_shape(inputs: Mapping[str, Any], name: str, *shapes: tuple[int, ...]) -> None:
    if inputs.get(name) is not None:
        _require_shape(name, inputs[name], shapes)


def _is_traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)

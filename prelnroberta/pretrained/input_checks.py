"""Checks of what a user gives a model, on the host and before compute.

Inside jit an id out of range is NaN or a clamped row without a word; here it is one clear line.
Values that are being traced are checked by shape and dtype alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prelnroberta.config import IGNORE_INDEX, RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.model.kv_cache import init_cache
from prelnroberta.model.losses import infer_problem_type

_SIZES = {"input_ids": "vocab_size", "token_type_ids": "type_vocab_size"}
_SIZES |= {"position_ids": "max_position_embeddings"}


def as_array(name: str, value: Any) -> Any:
    """Lists become arrays; raises InputError where they are ragged or no numbers."""
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
    config: RobertaPreLayerNormConfig, inputs: Mapping[str, Any], rows: int = 1
) -> None:
    """Holds the arguments of a model to its config and to each other.

    Args:
        inputs: name -> array or None, as `Encoder` calls them.
        rows: how many axes come before L: 1 is [B, L], 2 is [B, C, L] (multiple choice).

    Raises:
        InputError: naming the argument, what it is and what was expected.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise InputError("give input_ids or inputs_embeds: one of the two, and not both")
    D, H, N = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    letters = "[B, C, L]" if rows == 2 else "[B, L]"
    if ids is None:
        _require_rank("inputs_embeds", embeds, rows + 2, letters[:-1] + f", {D}]")
        _require_shape("inputs_embeds", embeds, [(*embeds.shape[:-1], D)])
        if not jnp.issubdtype(embeds.dtype, jnp.floating):
            raise InputError(f"inputs_embeds is {embeds.dtype}, expected floats")
        shape = embeds.shape[:-1]
    else:
        _require_rank("input_ids", ids, rows + 1, letters)
        shape = ids.shape
    if 0 in shape:
        name = "inputs_embeds" if ids is None else "input_ids"
        raise InputError(f"{name} has shape {list(shape)}, expected no empty axis")
    *lead, L = shape
    B = lead[0]
    if inputs.get("position_ids") is None:
        config.check_length(L)
    for name in ("input_ids", "token_type_ids", "position_ids", "segment_ids"):
        value = inputs.get(name)
        if value is None:
            continue
        _require_shape(name, value, [shape])
        size = _SIZES.get(name)
        check_integers(name, value, getattr(config, size) if size else None, size)

    def optional(name: str, *shapes: tuple[int, ...]) -> None:
        if inputs.get(name) is not None:
            _require_shape(name, inputs[name], shapes)

    optional("attention_mask", tuple(shape), (*lead, L, L))
    optional("head_mask", (H,), (N, H))
    states = inputs.get("encoder_hidden_states")
    if states is not None:
        if not config.add_cross_attention:
            raise InputError(
                "encoder_hidden_states: config has add_cross_attention=False, nothing reads them"
            )
        _require_rank("encoder_hidden_states", states, 3, f"[B, S, {D}]")
        S = states.shape[1]
        _require_shape("encoder_hidden_states", states, [(B, S, D)])
        optional("encoder_attention_mask", (B, S), (B, L, S))
    elif inputs.get("encoder_attention_mask") is not None:
        raise InputError("encoder_attention_mask: give the encoder_hidden_states it is of, too")


def check_cache(config: RobertaPreLayerNormConfig, cache: Any, inputs: Mapping[str, Any]) -> None:
    """Holds a cache to the model and to the new columns, `inputs` as of `check_inputs`.

    Raises:
        InputError: for what is no cache of such a model and batch, or one without room.
    """
    new = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
    B, L = new.shape[:2]
    if not isinstance(cache, Mapping) or "valid" not in cache:
        raise InputError("past_key_values is no cache of this package: init_cache makes one")
    columns = cache["valid"].shape[1]
    expected = jax.eval_shape(lambda: init_cache(config, B, columns))
    found = {name: cache.get(name) for name in expected}
    if jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, expected):
        made = list(jnp.shape(cache.get("keys")))
        raise InputError(
            f"past_key_values was made for another model or batch: its keys have shape {made}, "
            f"expected {list(expected['keys'].shape)}"
        )
    if _traced(cache["index"]):
        return
    used = int(cache["index"])
    if used + L > columns:
        raise InputError(
            f"past_key_values has {columns} columns, {used} used: no room for {L} more; call "
            "init_cache with a larger max_length"
        )
    if inputs.get("position_ids") is None and not _traced(new):
        real = np.ones((B, L), int)
        if inputs.get("input_ids") is not None:
            real = np.asarray(new) != config.pad_token_id
        config.check_length(int((np.asarray(cache["count"]) + real.sum(-1)).max()))


def check_key(name: str, key: Any) -> None:
    """Raises InputError unless `key` is a jax PRNG key, typed or of two uint32."""
    is_array = isinstance(key, (jax.Array, np.ndarray))
    if not (is_array and (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == "uint32")):
        raise InputError(f"{name} is {key!r}, expected a jax PRNG key such as jax.random.key(0)")


def check_labels(
    config: RobertaPreLayerNormConfig, model: str, labels: Any, logits_shape: tuple[int, ...]
) -> None:
    """Holds labels to the logits they are compared with. Raises InputError, naming both."""
    *lead, C = logits_shape
    if model != "sequence_classification":
        if model == "multiple_choice":
            lead, what = logits_shape[:1], "choices"
        else:
            what = "vocab_size" if model in ("masked_lm", "causal_lm") else "num_labels"
        _require_shape("labels", labels, [tuple(lead)])
        check_integers("labels", labels, C, what, ignore=True)
        return
    kind = infer_problem_type(config, labels)
    if kind == "single_label_classification":
        _require_shape("labels", labels, [tuple(lead)])
        check_integers("labels", labels, C, "num_labels", ignore=True)
        return
    _require_shape("labels", labels, [tuple(logits_shape), *([tuple(lead)] if C == 1 else [])])
    if _traced(labels):
        return
    values = np.asarray(labels, np.float32)
    if not np.isfinite(values).all():
        raise InputError("labels: NaN or infinity, expected finite numbers")
    if kind == "multi_label_classification" and ((values < 0) | (values > 1)).any():
        raise InputError("labels: expected numbers in [0, 1], one for each of several labels")


def check_span(name: str, positions: Any, rows: int) -> None:
    """Raises InputError unless positions are whole numbers [B]; any, since outside is ignored."""
    _require_shape(name, positions, [(rows,)])
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise InputError(f"{name} is {positions.dtype}, expected integers")


def check_integers(
    name: str, value: Any, size: int | None, what: str | None, ignore: bool = False
) -> None:
    """Raises InputError unless `value` is whole numbers in [0, size), or -100 under `ignore`."""
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise InputError(f"{name} is {value.dtype}, expected integers")
    if _traced(value):
        return
    host = np.asarray(value)
    bad = host < 0
    if size is not None:
        bad |= host >= size
    if ignore:
        bad &= host != IGNORE_INDEX
    if bad.any():
        where = np.argwhere(bad)[0].tolist()
        limit = "0 or more" if size is None else f"0 to {what} - 1 = {size - 1}"
        raise InputError(
            f"{name}{where} is {host[tuple(where)]}, expected {limit}"
            + (f", or {IGNORE_INDEX} for what does not count" if ignore else "")
        )


def _require_rank(name: str, value: Any, rank: int, letters: str) -> None:
    if value.ndim != rank:
        raise InputError(f"{name} has shape {list(value.shape)}, expected {letters}")


def _require_shape(name: str, value: Any, shapes: Any) -> None:
    if tuple(value.shape) not in [tuple(shape) for shape in shapes]:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise InputError(f"{name} has shape {list(value.shape)}, expected {expected}")


def _traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)

"""Checks of a model's inputs on the host, before anything is computed.

Shapes are always checked, values of CPU tensors too; both only outside of torch.compile and
torch.export. The rules are those of `prelnroberta/pretrained/input_checks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridges.pytorch.kv_cache import KVCache
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.pretrained import input_checks


def is_tracing() -> bool:
    """Whether a program is being traced; a check of values would become part of it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def to_host_array(name: str, value: Any) -> np.ndarray:
    """A tensor as numpy; zeros of its shape where its values cannot be read or should not be.

    A check does not wait for another device, and functorch hides the values of its tensors.

    Raises:
        InputError: `value` is not a tensor.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
    try:
        return value.detach().numpy()
    except (RuntimeError, TypeError):
        dtype = np.float32 if value.is_floating_point() else np.int64
        return np.broadcast_to(np.zeros((), dtype), tuple(value.shape))


def check_inputs(
    config: RobertaPreLayerNormConfig,
    inputs: Mapping[str, Tensor | None],
    cache: KVCache | None = None,
    with_cache: bool = False,
    batch_axes: int = 1,
) -> None:
    """Checks inputs against the config, the cache and each other.

    Args:
        with_cache: whether a cache is given or made.
        batch_axes: number of axes before L: 1 for [B, L], 2 for [B, A, L].

    Raises:
        InputError: naming the argument, its value and what was expected.
    """
    if is_tracing():
        return
    host = {name: to_host_array(name, value) for name, value in inputs.items() if value is not None}
    masks = [value for name, value in host.items() if name.endswith("attention_mask")]
    if with_cache and any(mask.ndim != 2 for mask in masks):
        raise InputError("a cache takes masks of two axes, [B, L] and [B, S]")
    if cache is None:
        input_checks.check_inputs(config, host, batch_axes)
        return
    if not config.is_decoder:
        raise InputError("past_key_values: config has is_decoder=False, nothing is cached")
    new_inputs = host.get("input_ids", host.get("inputs_embeds"))
    mask = host.get("attention_mask")
    if (
        mask is not None
        and new_inputs is not None
        and mask.shape[1] == cache.num_columns + new_inputs.shape[1]
    ):
        host["attention_mask"] = mask[:, cache.num_columns :]
    input_checks.check_inputs(config, host, batch_axes)
    if "position_ids" not in host:
        _check_cached_length(config, host, cache)


def _check_cached_length(
    config: RobertaPreLayerNormConfig, host: Mapping[str, np.ndarray], cache: KVCache
) -> None:
    """Checks that cached and new tokens of each row fit the position table."""
    if "input_ids" in host:
        is_token = host["input_ids"] != config.pad_token_id
    else:
        is_token = np.ones(host["inputs_embeds"].shape[:2], bool)
    counts = to_host_array("past_key_values", cache.count) + is_token.sum(-1)
    config.check_length(int(counts.max()), "a row including its cached tokens")


def check_labels(
    config: RobertaPreLayerNormConfig, model: str, labels: Tensor | None, inputs: Tensor | None
) -> None:
    """Checks labels against the logits that a model computes of `inputs` [B, L, ...].

    Args:
        model: the model's name in the parameter table.
        inputs: input_ids or inputs_embeds, [B, A, L, ...] for multiple choice.

    Raises:
        InputError: naming the labels' shape or value and what was expected.
    """
    if labels is None or inputs is None or is_tracing():
        return
    input_checks.check_labels(config, model, to_host_array("labels", labels), tuple(inputs.shape))


def check_span(positions: Mapping[str, Tensor], inputs: Tensor | None, skip_padding: bool) -> None:
    """Checks start_positions and end_positions [B] against inputs [B, L, ...].

    Raises:
        InputError: one without the other, together with `skip_padding`, of another shape, or not
            integers.
    """
    if len(positions) == 1:
        raise InputError("give both of start_positions, end_positions, or none")
    if positions and skip_padding:
        raise InputError("skip_padding: the loss of a span runs over padded positions, too")
    for name, value in positions.items():
        if inputs is not None and value.shape != inputs.shape[:1]:
            raise InputError(
                f"{name} has shape {list(value.shape)}, expected {list(inputs.shape[:1])}"
            )
        if value.is_floating_point():
            raise InputError(f"{name} is {value.dtype}, expected integers")

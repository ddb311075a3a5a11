"""Conversion of a model's inputs to tensors, and checks that need their values.

Values can be read in eager calls only; while a graph is traced there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bridges.tensorflow.kv_cache import KVCache
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.pretrained.input_checks import as_array

Tensor = tf.Tensor


def as_tensor_input(name: str, value: Any) -> Any:
    """Lists as arrays; tensors, a functional model's inputs and caches as they are."""
    if isinstance(value, (Mapping, keras.KerasTensor)) or tf.is_tensor(value):
        return value
    return as_array(name, value)


def to_tensor(value: Any) -> Tensor:
    """A tensor, integers and booleans as int32: -100 must fit, and comparisons need one dtype."""
    value = tf.convert_to_tensor(value)
    return value if value.dtype.is_floating else tf.cast(value, tf.int32)


def to_host_array(value: Any) -> np.ndarray | None:
    """The value as numpy; None while it is traced."""
    if isinstance(value, keras.KerasTensor) or tf.is_symbolic_tensor(value):
        return None
    return value.numpy() if tf.is_tensor(value) else np.asarray(value)


def check_cache_room(
    config: RobertaPreLayerNormConfig, cache: KVCache, inputs: Mapping[str, np.ndarray]
) -> None:
    """Checks that new inputs fit the cache's columns and the position table.

    Raises:
        InputError: too few columns or positions.
    """
    index, count = to_host_array(cache["index"]), to_host_array(cache["count"])
    if index is None:
        return
    new = inputs.get("input_ids", inputs.get("inputs_embeds"))
    num_columns = cache["valid"].shape[1]
    if index + new.shape[1] > num_columns:
        raise InputError(
            f"past_key_values has {num_columns} columns, {index} used: no room for {new.shape[1]} "
            "more; call init_cache with a larger max_length"
        )
    if "position_ids" not in inputs:
        is_token = np.ones(new.shape[:2], bool)
        if "input_ids" in inputs:
            is_token = new != config.pad_token_id
        config.check_length(int((count + is_token.sum(-1)).max()))

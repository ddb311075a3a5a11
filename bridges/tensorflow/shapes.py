"""Shapes of tensors whose sizes may be known only when a graph runs."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def shape_list(x: tf.Tensor) -> list[Any]:
    """The shape of `x`: ints where the size is static, otherwise scalar tensors."""
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]

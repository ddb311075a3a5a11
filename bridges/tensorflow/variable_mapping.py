"""Conversion between the parameter tree and the variables of a Keras model.

A variable has the path and the shape of its leaf in the parameter table. Only the layers, which the
tree stacks on a leading N axis, are separate variables, with the layer's number in the path:

    encoder/layers/mlp/wi/kernel [N, D, F]  <->  encoder/layers/{n}/mlp/wi/kernel [D, F]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig

_LAYERS = "encoder/layers/"


def variable_paths(
    config: RobertaPreLayerNormConfig, model: str
) -> dict[str, tuple[str, int | None]]:
    """Path of each variable -> (path of its leaf, number of its layer or None)."""
    paths = {}
    for leaf, row in parameters.table(config, model).items():
        if row.is_stacked:
            suffix = leaf.removeprefix(_LAYERS)
            paths |= {f"{_LAYERS}{n}/{suffix}": (leaf, n) for n in range(config.num_hidden_layers)}
        else:
            paths[leaf] = (leaf, None)
    return paths


def variable_shapes(config: RobertaPreLayerNormConfig, model: str) -> dict[str, tuple[int, ...]]:
    """Path -> shape of each variable; all are float32."""
    shapes = parameters.shapes(config, model)
    return {
        path: shapes[leaf] if n is None else shapes[leaf][1:]
        for path, (leaf, n) in variable_paths(config, model).items()
    }


def to_variables(
    params: parameters.Tree,
    config: RobertaPreLayerNormConfig,
    model: str,
    source: str = "params",
) -> dict[str, np.ndarray]:
    """Path of each variable -> its value in a tree of float32 arrays.

    Raises:
        InputError: one message listing every leaf that is missing, unexpected (with the nearest
            name) or of another shape or dtype.
    """
    parameters.check(params, config, model, source)
    flat = {path: np.asarray(leaf) for path, leaf in parameters.flatten(params).items()}
    return {
        path: flat[leaf] if n is None else flat[leaf][n]
        for path, (leaf, n) in variable_paths(config, model).items()
    }


def from_variables(
    values: Mapping[str, Any],
    config: RobertaPreLayerNormConfig,
    model: str,
    source: str = "variables",
) -> parameters.Tree:
    """The inverse of `to_variables`: path -> array to a tree of float32 numpy arrays.

    Raises:
        InputError: as in `to_variables`.
    """
    expected = parameters.float32_leaves(variable_shapes(config, model))
    parameters.check_leaves(expected, values, source)
    leaves = {
        path: np.empty(shape, np.float32)
        for path, shape in parameters.shapes(config, model).items()
    }
    for path, (leaf, n) in variable_paths(config, model).items():
        leaves[leaf][... if n is None else n] = values[path]
    return parameters.unflatten(leaves)

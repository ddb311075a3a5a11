"""Export to StableHLO, which jax, IREE and PJRT plugins run without this package.

    <directory>/model.stablehlo       from `jax.export`; cpu, cuda and tpu, any batch and length
    <directory>/params.safetensors    the parameter tree, float32, one tensor per path

The program takes the parameters as an argument: it stays small, and its caller can place, shard or
replace the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write
from prelnroberta.model import heads
from prelnroberta.params import Tree

PROGRAM_NAME = "model.stablehlo"
PARAMS_NAME = "params.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")

Outputs = dict[str, jax.Array]


def forward(
    config: RobertaPreLayerNormConfig,
    model: str,
    params: Tree,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    token_type_ids: jax.Array,
) -> Outputs:
    """The exported function: int32 inputs [B, L], or [B, A, L] for multiple choice, to the float32
    outputs of the Flax class, by name."""
    output: Any = heads.MODULES[model](config).apply(
        {"params": params}, input_ids, attention_mask, token_type_ids
    )
    if model == "encoder":
        return {"last_hidden_state": output.last_hidden_state}
    head, encoded = output
    if model == "base":
        return {"last_hidden_state": encoded.last_hidden_state, "pooler_output": head}
    if model == "question_answering":
        return {"start_logits": head[..., 0], "end_logits": head[..., 1]}
    return {"logits": head}


def save_stablehlo(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, directory: str | Path
) -> None:
    """Writes both files into a new directory, atomically.

    Raises:
        InputError: if the directory exists, or the tree does not match the model.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    if directory.exists():
        raise InputError(f"{directory}: exists already, expected a new directory for StableHLO")
    parameters.check(params, config, model)
    input_shape = export.symbolic_shape(
        "B, A, L" if model == "multiple_choice" else "B, L",
        constraints=[f"L <= {config.max_length}"],
    )
    inputs = (jax.ShapeDtypeStruct(input_shape, jnp.int32),) * 3
    param_specs = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in parameters.shapes(config, model).items()
    }
    function = jax.jit(partial(forward, config, model))
    exporter = export.export(function, platforms=PLATFORMS)
    program = exporter(parameters.unflatten(param_specs), *inputs)
    tensors = {path: np.ascontiguousarray(x) for path, x in parameters.flatten(params).items()}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(directory) as partial_directory:
        partial_directory.mkdir()
        (partial_directory / PROGRAM_NAME).write_bytes(program.serialize())
        save_file(tensors, partial_directory / PARAMS_NAME)


def load_stablehlo(directory: str | Path) -> Callable[..., Outputs]:
    """The saved function of int32 input_ids, attention_mask and token_type_ids; see `forward`."""
    from safetensors.numpy import load_file

    directory = Path(directory)
    program = export.deserialize(bytearray((directory / PROGRAM_NAME).read_bytes()))
    params = parameters.unflatten(load_file(directory / PARAMS_NAME))
    return partial(program.call, params)

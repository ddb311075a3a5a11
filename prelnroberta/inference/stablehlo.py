"""The function as StableHLO: a file that jax, IREE or a PJRT plugin runs without our code.

    <directory>/model.stablehlo       `jax.export`, for cpu, cuda and tpu, any batch and length
    <directory>/params.safetensors    the parameter tree, float32, under its paths

The parameters are arguments, so that the program stays small and weights can be placed, sharded or
exchanged by whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

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
    """What is exported: int32 inputs [B, L], or [B, C, L] of choices, to the outputs of the
    Flax class by name, float32."""
    found = heads.MODULES[model](config).apply(
        {"params": params}, input_ids, attention_mask, token_type_ids
    )
    if model == "encoder":
        return {"last_hidden_state": found.last_hidden_state}
    head, encoded = found
    if model == "base":
        return {"last_hidden_state": encoded.last_hidden_state, "pooler_output": head}
    if model == "question_answering":
        return {"start_logits": head[..., 0], "end_logits": head[..., 1]}
    return {"logits": head}


def save_stablehlo(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, directory: str | Path
) -> None:
    """Writes both files into a new directory, which appears when it is whole.

    Raises:
        InputError: where something stands already, or a tree that is not this model's.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    if directory.exists():
        raise InputError(f"{directory}: exists already, expected a new place for StableHLO")
    parameters.check(params, config, model)
    B, *C, L = export.symbolic_shape(
        "B, C, L" if model == "multiple_choice" else "B, L",
        constraints=[f"L <= {config.max_length}"],
    )
    rows = jax.ShapeDtypeStruct((B, *C, L), jnp.int32)
    shapes = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in parameters.shapes(config, model).items()
    }
    run = jax.jit(partial(forward, config, model))
    program = export.export(run, platforms=PLATFORMS)(parameters.unflatten(shapes), *(rows,) * 3)
    flat = {path: np.ascontiguousarray(x) for path, x in parameters.flatten(params).items()}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(directory) as partial_directory:
        partial_directory.mkdir()
        (partial_directory / PROGRAM_NAME).write_bytes(program.serialize())
        save_file(flat, partial_directory / PARAMS_NAME)


def load_stablehlo(directory: str | Path) -> Callable[..., Outputs]:
    """A function of int32 input_ids, attention_mask and token_type_ids, as `forward` has them."""
    from safetensors.numpy import load_file

    directory = Path(directory)
    program = export.deserialize(bytearray((directory / PROGRAM_NAME).read_bytes()))
    params = parameters.unflatten(load_file(directory / PARAMS_NAME))
    return partial(program.call, params)

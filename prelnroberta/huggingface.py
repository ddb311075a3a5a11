"""Hugging Face directories <-> the parameter tree: `config.json` and `model.safetensors`.

One name table pairs each module of ours with the module of transformers'
`modeling_roberta_prelayernorm.py`; leaves follow by kind: a kernel is a transposed `weight`, a
norm's scale a `weight`. Layers are unstacked to one tensor each. numpy only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.files import written_whole

BASE_PREFIX = "roberta_prelayernorm."
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
ARCHITECTURES = {
    "encoder": "RobertaPreLayerNormModel",
    "masked_lm": "RobertaPreLayerNormForMaskedLM",
}

# Our module (or leaf) -> theirs. {n} is the layer.
NAMES = {
    "embeddings/word": "embeddings.word_embeddings.weight",
    "embeddings/position": "embeddings.position_embeddings.weight",
    "embeddings/token_type": "embeddings.token_type_embeddings.weight",
    "embeddings/norm": "embeddings.LayerNorm",
    "encoder/layers/attention_norm": "encoder.layer.{n}.attention.LayerNorm",
    "encoder/layers/attention/query": "encoder.layer.{n}.attention.self.query",
    "encoder/layers/attention/key": "encoder.layer.{n}.attention.self.key",
    "encoder/layers/attention/value": "encoder.layer.{n}.attention.self.value",
    "encoder/layers/attention/output": "encoder.layer.{n}.attention.output.dense",
    "encoder/layers/mlp_norm": "encoder.layer.{n}.intermediate.LayerNorm",
    "encoder/layers/mlp/wi": "encoder.layer.{n}.intermediate.dense",
    "encoder/layers/mlp/wo": "encoder.layer.{n}.output.dense",
    "encoder/final_norm": "LayerNorm",
    "lm_head/dense": "lm_head.dense",
    "lm_head/norm": "lm_head.layer_norm",
    "lm_head/bias": "lm_head.bias",
    "lm_head/decoder": "lm_head.decoder.weight",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_UNTIED_BIAS = "lm_head.decoder.bias"

# What files hold beside the parameters, by the age of their writer: buffers, tied copies, and
# the pooler, which headed models do not have.
_IGNORED = re.compile(r"embeddings\.(position_ids|token_type_ids)$|pooler\.")
_TIED = re.compile(r"lm_head\.decoder\.(weight|bias)$")


def theirs(path: str) -> str:
    """The Hugging Face name of a path of the table, with {n} for the layer."""
    if path in NAMES:
        name = NAMES[path]
    else:
        module, _, leaf = path.rpartition("/")
        name = f"{NAMES[module]}.{_LEAVES[leaf]}"
    return name if path.startswith("lm_head/") else BASE_PREFIX + name


def _expand(
    config: RobertaPreLayerNormConfig, model: str
) -> list[tuple[str, int | None, str, tuple[int, ...]]]:
    """Every tensor of a file: (our path, layer or None, their name, their shape)."""
    rows = []
    table, shapes = parameters.table(config, model), parameters.shapes(config, model)
    for path, row in table.items():
        shape = shapes[path][1:] if row.stacked else shapes[path]
        their_shape = _to_torch(row, np.empty(shape, np.bool_)).shape
        for n in range(config.num_hidden_layers) if row.stacked else (None,):
            rows.append((path, n, theirs(path).format(n=n), their_shape))
    return rows


def _to_torch(row: parameters.Parameter, value: np.ndarray) -> np.ndarray:
    """One layer's leaf as torch keeps it: kernels [out, in], the rest flat but for embeddings."""
    if row.kind == "kernel":
        return value.reshape(row.matrix(value.shape)).T
    return value.reshape(-1) if row.kind == "bias" else value


def _from_torch(row: parameters.Parameter, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if row.kind == "kernel":
        value = value.T
    return value.reshape(shape)


def to_tensors(
    params: parameters.Tree, config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> dict[str, np.ndarray]:
    """The tree as transformers' state dict: float32, contiguous, layers one by one."""
    flat, table = parameters.flatten(params), parameters.table(config, model)
    host = {path: np.asarray(flat[path]) for path in table}
    tensors = {}
    for path, n, name, _ in _expand(config, model):
        value = host[path] if n is None else host[path][n]
        tensors[name] = np.ascontiguousarray(_to_torch(table[path], value))
    if model == "masked_lm" and not config.tie_word_embeddings:
        # transformers 5 reads this one and transformers 4 the other.
        tensors[_UNTIED_BIAS] = tensors["lm_head.bias"]
    return tensors


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    config: RobertaPreLayerNormConfig,
    model: str = "masked_lm",
    source: str = "tensors",
) -> parameters.Tree:
    """The parameter tree, float32 numpy, of a transformers state dict.

    Raises:
        InputError: one message listing every missing, unexpected, mis-shaped or non-finite
            tensor.
    """
    ignored = [_IGNORED]
    if config.tie_word_embeddings or model != "masked_lm":
        ignored.append(_TIED)
    if model == "encoder":
        ignored.append(re.compile(r"lm_head\."))
    found = {
        name: np.asarray(value, np.float32)
        for name, value in tensors.items()
        if not any(pattern.search(name) for pattern in ignored)
    }
    bias = found.pop(_UNTIED_BIAS, None)
    if bias is not None:
        found["lm_head.bias"] = bias
    rows = _expand(config, model)
    expected = parameters.float32_leaves({name: shape for _, _, name, shape in rows})
    parameters.check_leaves(expected, found, source)
    broken = [name for name, value in found.items() if not np.isfinite(value).all()]
    if broken:
        raise InputError(f"{source}: NaN or infinity in {', '.join(broken)}")

    table, shapes = parameters.table(config, model), parameters.shapes(config, model)
    leaves = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    for path, n, name, _ in rows:
        target = leaves[path] if n is None else leaves[path][n]
        target[...] = _from_torch(table[path], found[name], target.shape)
    return parameters.unflatten(leaves)


def save_pretrained(
    directory: str | Path,
    params: parameters.Tree,
    config: RobertaPreLayerNormConfig,
    model: str = "masked_lm",
) -> None:
    """Writes `config.json` and `model.safetensors` so that transformers 4.57 and 5 load them.

    Each file appears whole or not at all; other files of the directory stay as they are.

    Raises:
        InputError: where the tree is not the model's.
    """
    from safetensors.numpy import save

    parameters.check(params, config, model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    values = {**config.to_dict(), "architectures": [ARCHITECTURES[model]], "dtype": "float32"}
    tensors = to_tensors(params, config, model)
    with written_whole(directory / WEIGHTS_NAME) as partial:
        partial.write_bytes(save(tensors, metadata={"format": "pt"}))
    with written_whole(directory / CONFIG_NAME) as partial:
        partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_pretrained(
    directory: str | Path, model: str = "masked_lm"
) -> tuple[parameters.Tree, RobertaPreLayerNormConfig]:
    """Reads a Hugging Face directory: the parameter tree (float32 numpy) and the config.

    Raises:
        InputError: naming the file that is missing, unreadable or does not fit its config.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    directory = Path(directory)
    config = RobertaPreLayerNormConfig.from_json(directory / CONFIG_NAME)
    path = directory / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected the weights beside config.json") from None
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from None
    return from_tensors(tensors, config, model, str(path)), config

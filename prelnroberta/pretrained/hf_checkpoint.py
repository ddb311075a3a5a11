"""Hugging Face directories <-> the parameter tree: `config.json` and the weights next to it.

`MODULE_NAMES` pairs each module of the tree with the module of transformers'
`modeling_roberta_prelayernorm.py`. Leaf names follow from the kind: a kernel is a transposed
`weight`, a norm's scale is a `weight`. Stacked layers become one tensor per layer. Uses numpy only.

Weights are written as safetensors. They are read from safetensors, whole or sharded, or from the
`flax_model.msgpack` of transformers 4, which transformers 5 no longer reads.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import ARCHITECTURES, RobertaPreLayerNormConfig, require_config
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

_log = logging.getLogger(__name__)

StateDict = Mapping[str, np.ndarray]

BASE_PREFIX = "roberta_prelayernorm."
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FLAX_NAME = "flax_model.msgpack"
CONFIG_NAME = "config.json"
# Pickles, which can run code when they are read, and TensorFlow's format.
_UNSUPPORTED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5")

# Module (or leaf) of the parameter tree -> module of transformers. {n} is the layer index.
MODULE_NAMES = {
    "embeddings/word": "embeddings.word_embeddings.weight",
    "embeddings/position": "embeddings.position_embeddings.weight",
    "embeddings/token_type": "embeddings.token_type_embeddings.weight",
    "embeddings/norm": "embeddings.LayerNorm",
    "encoder/layers/attention_norm": "encoder.layer.{n}.attention.LayerNorm",
    "encoder/layers/attention/query": "encoder.layer.{n}.attention.self.query",
    "encoder/layers/attention/key": "encoder.layer.{n}.attention.self.key",
    "encoder/layers/attention/value": "encoder.layer.{n}.attention.self.value",
    "encoder/layers/attention/output": "encoder.layer.{n}.attention.output.dense",
    "encoder/layers/cross_attention_norm": "encoder.layer.{n}.crossattention.LayerNorm",
    "encoder/layers/cross_attention/query": "encoder.layer.{n}.crossattention.self.query",
    "encoder/layers/cross_attention/key": "encoder.layer.{n}.crossattention.self.key",
    "encoder/layers/cross_attention/value": "encoder.layer.{n}.crossattention.self.value",
    "encoder/layers/cross_attention/output": "encoder.layer.{n}.crossattention.output.dense",
    "encoder/layers/mlp_norm": "encoder.layer.{n}.intermediate.LayerNorm",
    "encoder/layers/mlp/wi": "encoder.layer.{n}.intermediate.dense",
    "encoder/layers/mlp/wo": "encoder.layer.{n}.output.dense",
    "encoder/final_norm": "LayerNorm",
    "pooler": "pooler.dense",
    "lm_head/dense": "lm_head.dense",
    "lm_head/norm": "lm_head.layer_norm",
    "lm_head/bias": "lm_head.bias",
    "lm_head/decoder": "lm_head.decoder.weight",
    "classifier/dense": "classifier.dense",
    "classifier/output": "classifier.out_proj",
    "classifier": "classifier",
    "span": "qa_outputs",
}
_MODELS_WITHOUT_HEAD = ("encoder", "base")
_HEAD_MODULES = ("lm_head/", "classifier/", "span/")
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
WORD_EMBEDDINGS = BASE_PREFIX + "embeddings.word_embeddings.weight"
LM_BIAS = "lm_head.bias"
DECODER_BIAS = "lm_head.decoder.bias"
DECODER_WEIGHT = "lm_head.decoder.weight"

# Buffers that older versions of transformers saved.
BUFFER_PATTERN = re.compile(r"embeddings\.(position_ids|token_type_ids)$")
# Modules that a model has completely or not at all. They may be missing from a file, or unexpected
# in it, when a checkpoint is loaded into a class with another head.
_OPTIONAL_MODULE = re.compile(
    r"(?:^|\.)(pooler|lm_head|qa_outputs|crossattention|classifier\.(?:dense|out_proj)|classifier)\."
)
BASE_MODULE_PATTERN = re.compile(r"(embeddings|encoder|LayerNorm|pooler)\.")


@dataclasses.dataclass(frozen=True)
class LoadingInfo:
    """How the tensors of a checkpoint differ from those of the model that loaded it.

    Attributes:
        missing_keys: tensors of modules the checkpoint lacks, newly initialized.
        unexpected_keys: tensors of modules the model lacks, ignored.
        mismatched_keys: tensors of another shape, newly initialized because
            `ignore_mismatched_sizes` was set.
    """

    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    mismatched_keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = {
            "newly initialized": self.missing_keys,
            "not used": self.unexpected_keys,
            "newly initialized because the shapes differ": self.mismatched_keys,
        }
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


class _TensorSpec(NamedTuple):
    """One tensor of a state dict.

    Attributes:
        path: the leaf of the parameter tree that holds it.
        layer: its index in a stacked leaf; None: the leaf is not stacked.
        name: its name in transformers.
        shape: its shape in transformers.
    """

    path: str
    layer: int | None
    name: str
    shape: tuple[int, ...]

    def read(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """This tensor's values in the tree's layout: a view of the leaf, or of one layer of it."""
        leaf = leaves[self.path]
        return leaf[...] if self.layer is None else leaf[self.layer]


def hf_name(path: str) -> str:
    """The Hugging Face name of a path of the parameter table, with {n} for the layer."""
    if path in MODULE_NAMES:
        name = MODULE_NAMES[path]
    else:
        module, _, leaf = path.rpartition("/")
        name = f"{MODULE_NAMES[module]}.{_LEAF_NAMES[leaf]}"
    return name if path.startswith(_HEAD_MODULES) else BASE_PREFIX + name


def _tensor_specs(config: RobertaPreLayerNormConfig, model: str) -> list[_TensorSpec]:
    """Every tensor of the model's state dict."""
    specs = []
    table, shapes = parameters.table(config, model), parameters.shapes(config, model)
    for path, row in table.items():
        shape = shapes[path][1:] if row.is_stacked else shapes[path]
        torch_shape = _to_torch(row, np.empty(shape, np.bool_)).shape
        for n in range(config.num_hidden_layers) if row.is_stacked else (None,):
            specs.append(_TensorSpec(path, n, hf_name(path).format(n=n), torch_shape))
    return specs


def _to_torch(row: parameters.Parameter, value: np.ndarray) -> np.ndarray:
    """One layer's leaf in torch's layout: kernels [out, in], biases flat."""
    if row.kind == "kernel":
        return value.reshape(row.matrix_shape(value.shape)).T
    return value.reshape(-1) if row.kind == "bias" else value


def _from_torch(row: parameters.Parameter, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if row.kind == "kernel":
        value = value.T
    return value.reshape(shape)


def _optional_module(name: str) -> str | None:
    match = _OPTIONAL_MODULE.search(name)
    # The two matrices of the classification head count as one module.
    return match[1].replace("out_proj", "dense") if match else None


def to_state_dict(
    params: parameters.Tree, config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> dict[str, np.ndarray]:
    """The tree as the state dict of transformers' class: contiguous, one tensor per layer."""
    flat, table = parameters.flatten(params), parameters.table(config, model)
    leaves = {path: np.asarray(flat[path]) for path in table}
    state_dict = {}
    for spec in _tensor_specs(config, model):
        headless = model in _MODELS_WITHOUT_HEAD
        name = spec.name.removeprefix(BASE_PREFIX) if headless else spec.name
        state_dict[name] = np.ascontiguousarray(_to_torch(table[spec.path], spec.read(leaves)))
    if DECODER_WEIGHT in state_dict:
        # transformers 5 reads lm_head.decoder.bias, transformers 4 reads lm_head.bias.
        state_dict[DECODER_BIAS] = state_dict[LM_BIAS]
    return state_dict


def from_state_dict(
    state_dict: StateDict,
    config: RobertaPreLayerNormConfig,
    model: str = "masked_lm",
    source: str = "tensors",
) -> parameters.Tree:
    """The parameter tree, float32 numpy, of a complete state dict; see `load_state_dict`.

    Raises:
        InputError: one message listing every missing, unexpected, mis-shaped or non-finite
            tensor.
    """
    return load_state_dict(state_dict, config, model, source)[0]


def load_state_dict(
    state_dict: StateDict,
    config: RobertaPreLayerNormConfig,
    model: str = "masked_lm",
    source: str = "tensors",
    init_params: Callable[[], parameters.Tree] | None = None,
    ignore_mismatched_sizes: bool = False,
) -> tuple[parameters.Tree, LoadingInfo]:
    """The parameter tree, float32 numpy, of a transformers state dict, and how the two differ.

    Modules that this model does not have (a head, the pooler) are ignored.

    Args:
        state_dict: with or without the base model's prefix; any floating dtype.
        source: the name to use in errors.
        init_params: makes initial values for modules that are missing completely, and is called
            only if there are any. None: a missing module is an error.
        ignore_mismatched_sizes: use initial values for tensors of another shape as well.

    Raises:
        InputError: one message listing every missing, unexpected, mis-shaped or non-finite
            tensor, and an output matrix that differs from the word table it should be tied to.
    """
    found = _normalized(state_dict)
    specs = _tensor_specs(config, model)
    expected = {spec.name: spec.shape for spec in specs}
    problems = _resolve_decoder(found, expected)
    info = _compare(found, expected, init_params is not None, ignore_mismatched_sizes)
    initialized = {*info.missing_keys, *info.mismatched_keys}
    used = sorted(found.keys() - initialized - {*info.unexpected_keys})
    loaded = {name: found[name] for name in used}
    required = {name: shape for name, shape in expected.items() if name not in initialized}
    problems += parameters.describe_differences(parameters.float32_leaves(required), loaded)
    problems += [
        f"NaN or infinity in {name}"
        for name, value in loaded.items()
        if not np.isfinite(value).all()
    ]
    if problems:
        raise InputError(f"{source}: " + "; ".join(problems))

    if initialized:
        initial = {p: np.asarray(leaf) for p, leaf in parameters.flatten(init_params()).items()}
    table = parameters.table(config, model)
    leaves = {p: np.empty(s, np.float32) for p, s in parameters.shapes(config, model).items()}
    for spec in specs:
        target = spec.read(leaves)
        if spec.name in initialized:
            target[...] = spec.read(initial)
        else:
            target[...] = _from_torch(table[spec.path], loaded[spec.name], target.shape)
    return parameters.unflatten(leaves), info


def _normalized(state_dict: StateDict) -> dict[str, np.ndarray]:
    """The tensors in float32, without buffers and with the base model's prefix."""
    tensors = {}
    for name, value in state_dict.items():
        if not BUFFER_PATTERN.search(name):
            name = BASE_PREFIX + name if BASE_MODULE_PATTERN.match(name) else name
            tensors[name] = np.asarray(value, np.float32)
    return tensors


def _resolve_decoder(found: dict[str, np.ndarray], expected: Mapping[str, Any]) -> list[str]:
    """Reduces the output layer in `found` to the tensors of the table; returns contradictions.

    Where the output is untied, transformers 5 computes with `lm_head.decoder.bias` and
    transformers 4 ties it to `lm_head.bias`. Files of tied models may hold copies.
    """
    if LM_BIAS not in expected:
        return []
    bias = found.pop(DECODER_BIAS, None)
    if DECODER_WEIGHT in expected:
        if bias is not None:
            found[LM_BIAS] = bias
        return []
    copies = {WORD_EMBEDDINGS: found.pop(DECODER_WEIGHT, None), LM_BIAS: bias}
    problems = []
    for name, copy in copies.items():
        if copy is not None and not np.array_equal(copy, found.setdefault(name, copy)):
            problems.append(
                f"the output is not tied to {name}, but config.json has tie_word_embeddings=true"
            )
    return problems


def _compare(
    found: StateDict,
    expected: Mapping[str, tuple[int, ...]],
    can_initialize: bool,
    ignore_mismatched_sizes: bool,
) -> LoadingInfo:
    """The differences that loading tolerates; all others are errors."""
    expected_modules = {*map(_optional_module, expected)}
    found_modules = {*map(_optional_module, found)} - {None}
    ignorable = found_modules - expected_modules
    if not can_initialize:
        # Ignoring a head leaves the hidden states as they are, ignoring cross-attention does not.
        ignorable -= {"crossattention"}
    missing, mismatched = [], []
    if can_initialize:
        absent = expected_modules - found_modules - {None}
        missing = [name for name in expected if _optional_module(name) in absent]
    if can_initialize and ignore_mismatched_sizes:
        mismatched = [n for n, shape in expected.items() if n in found and found[n].shape != shape]
    unexpected = [name for name in found if _optional_module(name) in ignorable]
    return LoadingInfo(tuple(missing), tuple(unexpected), tuple(mismatched))


def save_pretrained(
    directory: str | Path,
    params: parameters.Tree,
    config: RobertaPreLayerNormConfig,
    model: str = "masked_lm",
    max_shard_bytes: int = 5 * 10**9,
    dtype: str = "float32",
) -> None:
    """Writes `config.json` and safetensors that transformers 4.57 and 5 load without warnings.

    Each file is written atomically. Other files in the directory are kept, except safetensors
    weights, which would contradict the new ones.

    Args:
        max_shard_bytes: larger models are written as shards and an index.
        dtype: float32, float16 or bfloat16.

    Raises:
        InputError: if the tree does not match the model, a value overflows the dtype, or
            `directory` is a file.
    """
    parameters.check(params, config, model)
    directory = Path(directory)
    if directory.is_file():
        raise InputError(f"{directory}: a file, expected a directory to write to")
    directory.mkdir(parents=True, exist_ok=True)
    values = {**config.to_dict(), "architectures": [ARCHITECTURES[model]], "dtype": dtype}
    state_dict = to_state_dict(params, config, model)
    tensors = {name: as_dtype(name, value, dtype) for name, value in state_dict.items()}
    names = _write_safetensors(directory, tensors, max_shard_bytes)
    _write_json(directory / CONFIG_NAME, values)
    for path in (*directory.glob("model*.safetensors"), directory / INDEX_NAME):
        if path.name not in names and re.fullmatch(
            r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name
        ):
            path.unlink(missing_ok=True)


def _write_safetensors(directory: Path, tensors: StateDict, max_shard_bytes: int) -> list[str]:
    """Writes one file, or shards and their index; returns the names of the files."""
    from safetensors.numpy import save

    shards = _split_into_shards(tensors, max_shard_bytes)
    names = [WEIGHTS_NAME]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with atomic_write(directory / name) as partial:
            partial.write_bytes(save(shard, metadata={"format": "pt"}))
    if len(shards) == 1:
        return names
    index = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())},
        "weight_map": {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        },
    }
    _write_json(directory / INDEX_NAME, index)
    return [*names, INDEX_NAME]


def as_dtype(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """Casts a finite float32 array; raises InputError if a value overflows `dtype`."""
    with np.errstate(over="ignore"):
        cast = value.astype(np.dtype(dtype), copy=False)
    if cast.dtype != value.dtype and not np.isfinite(cast).all():
        raise InputError(f"{name} has numbers too large for {dtype}: write float32 or bfloat16")
    return cast


def _split_into_shards(tensors: StateDict, max_bytes: int) -> list[dict[str, np.ndarray]]:
    """Splits a state dict, in order. Only a single larger tensor makes a shard exceed the limit."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    return shards


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_pretrained(
    directory: str | Path, model: str = "masked_lm"
) -> tuple[parameters.Tree, RobertaPreLayerNormConfig]:
    """Reads a Hugging Face directory: the parameter tree (float32 numpy) and the config.

    Raises:
        InputError: naming the file that is missing, unreadable or does not match its config.
    """
    config = RobertaPreLayerNormConfig.from_json(Path(directory) / CONFIG_NAME)
    state_dict, source = read_weights(directory)
    return from_state_dict(state_dict, config, model, source), config


def resolve_config(
    cls: type,
    directory: str | Path,
    config: RobertaPreLayerNormConfig | None,
    options: Collection[str],
    kwargs: Mapping[str, Any],
) -> tuple[RobertaPreLayerNormConfig, dict[str, Any]]:
    """The config and the constructor arguments for a `from_pretrained`.

    Args:
        cls: the class whose `from_pretrained` was called, for messages.
        config: overrides the directory's config.json.
        options: names of the constructor arguments that may be in `kwargs`.
        kwargs: constructor arguments, and fields of the config to replace.

    Raises:
        InputError: if the directory does not exist, the config is of another class or an argument
            is unknown.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(
            f"{directory}: no such directory, expected one with config.json and the weights "
            "(hub names are not downloaded)"
        )
    config = RobertaPreLayerNormConfig.from_json(directory) if config is None else config
    require_config(config)
    fields = {field.name for field in dataclasses.fields(config)} - {"extra"}
    if unknown := kwargs.keys() - fields - set(options):
        raise InputError(
            f"{cls.__name__}.from_pretrained: unknown argument {', '.join(sorted(unknown))}"
        )
    replaced = {name: value for name, value in kwargs.items() if name in fields}
    model_kwargs = {name: value for name, value in kwargs.items() if name not in fields}
    return config.replace(**replaced), model_kwargs


def log_loading_info(info: LoadingInfo, source: str, cls: type) -> None:
    """Warns about missing, unexpected and mismatched tensors, if there are any."""
    if str(info):
        _log.warning("%s into %s: %s", source, cls.__name__, info)


def read_weights(path: str | Path) -> tuple[dict[str, np.ndarray], str]:
    """A state dict with transformers' torch names, and the file it was read from.

    Args:
        path: a directory, or one of its files: safetensors, their index, or Flax msgpack.

    Raises:
        InputError: naming the file that is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        candidates = [path / name for name in (WEIGHTS_NAME, INDEX_NAME, FLAX_NAME)]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        unsupported = [name for name in _UNSUPPORTED_FILES if (path / name).is_file()]
        if found is None and unsupported:
            raise InputError(
                f"{path / unsupported[0]}: not read here, expected {WEIGHTS_NAME} or {FLAX_NAME}: "
                f"python -m experiments.convert --input={path} --output=NEW writes them"
            )
        path = found or candidates[0]
    readers = {".json": _read_shards, ".msgpack": _read_flax}
    return readers.get(path.suffix, _read_safetensors)(path), str(path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected weights next to config.json") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from None


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index}: damaged or not an index of shards ({error!r})") from None
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(weight_map.values())):
        shard = _read_safetensors(index.parent / Path(name).name)
        misplaced = [tensor for tensor in shard if weight_map.get(tensor) != name]
        if misplaced:
            raise InputError(f"{index}: does not list {', '.join(misplaced)}, found in {name}")
        tensors |= shard
    return tensors


def _read_flax(path: Path) -> dict[str, np.ndarray]:
    """transformers 4's Flax tree under torch names, with kernels transposed."""
    from flax.serialization import msgpack_restore

    try:
        flat = parameters.flatten(msgpack_restore(path.read_bytes()))
        if others := [name for name, v in flat.items() if not isinstance(v, np.ndarray)]:
            raise ValueError(f"{others[0]} is not an array")
    except Exception as error:  # msgpack raises a dozen unrelated types for damaged bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path}: damaged or not a Flax msgpack file ({reason})") from None
    tensors = {}
    for name, value in flat.items():
        module, _, leaf = name.replace("/", ".").rpartition(".")
        if leaf == "kernel":
            value = np.asarray(value).T
        leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
        tensors[f"{module}.{leaf}"] = value
    return tensors

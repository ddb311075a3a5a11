"""Hugging Face directories <-> the parameter tree: `config.json` and the weights beside it.

One name table pairs each module of ours with the module of transformers'
`modeling_roberta_prelayernorm.py`; leaves follow by kind: a kernel is a transposed `weight`, a
norm's scale a `weight`. Layers are unstacked to one tensor each. numpy only.

Weights are written as safetensors and read as such, whole or in shards, or from the
`flax_model.msgpack` of transformers 4, which transformers 5 can no longer read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import ARCHITECTURES, RobertaPreLayerNormConfig, require_config
from prelnroberta.errors import InputError
from prelnroberta.files import written_whole

_log = logging.getLogger(__name__)

BASE_PREFIX = "roberta_prelayernorm."
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FLAX_NAME = "flax_model.msgpack"
CONFIG_NAME = "config.json"
# Pickles, which run what they hold, and TensorFlow's.
_UNREAD = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5")

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
_HEADLESS = ("encoder", "base")
_HEAD_MODULES = ("lm_head/", "classifier/", "span/")
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_UNTIED_BIAS = "lm_head.decoder.bias"

_UNTIED_WEIGHT = "lm_head.decoder.weight"
_WORD = BASE_PREFIX + "embeddings.word_embeddings.weight"

# Buffers that older writers stored.
_BUFFER = re.compile(r"embeddings\.(position_ids|token_type_ids)$")
# Parts that a model has whole or not at all: they come and go when a head is swapped.
_PART = re.compile(
    r"(?:^|\.)(pooler|lm_head|qa_outputs|crossattention|classifier\.(?:dense|out_proj)|classifier)\."
)
_UNPREFIXED = re.compile(r"(embeddings|encoder|LayerNorm|pooler)\.")


@dataclasses.dataclass(frozen=True)
class Swapped:
    """Where a file and the model it was read into have different heads.

    Attributes:
        new: tensors that the file lacks, whole parts of it, with new values.
        dropped: tensors of the file for which the model has no place.
        mismatched: tensors of another shape, with new values because that was asked for.
    """

    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = {
            "new, to be trained": self.new,
            "dropped": self.dropped,
            "of another shape, new": self.mismatched,
        }
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def theirs(path: str) -> str:
    """The Hugging Face name of a path of the table, with {n} for the layer."""
    if path in NAMES:
        name = NAMES[path]
    else:
        module, _, leaf = path.rpartition("/")
        name = f"{NAMES[module]}.{_LEAVES[leaf]}"
    return name if path.startswith(_HEAD_MODULES) else BASE_PREFIX + name


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


def _part(name: str) -> str | None:
    match = _PART.search(name)
    # The two matrices of the classification head are one part.
    return match[1].replace("out_proj", "dense") if match else None


def to_tensors(
    params: parameters.Tree, config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> dict[str, np.ndarray]:
    """The tree as the state dict of transformers' class: contiguous, layers one by one."""
    flat, table = parameters.flatten(params), parameters.table(config, model)
    host = {path: np.asarray(flat[path]) for path in table}
    tensors = {}
    for path, n, name, _ in _expand(config, model):
        value = host[path] if n is None else host[path][n]
        name = name.removeprefix(BASE_PREFIX) if model in _HEADLESS else name
        tensors[name] = np.ascontiguousarray(_to_torch(table[path], value))
    if _UNTIED_WEIGHT in tensors:
        # transformers 5 reads this one and transformers 4 the other.
        tensors[_UNTIED_BIAS] = tensors["lm_head.bias"]
    return tensors


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    config: RobertaPreLayerNormConfig,
    model: str = "masked_lm",
    source: str = "tensors",
) -> parameters.Tree:
    """The parameter tree, float32 numpy, of a state dict that holds all of it; see `read_tensors`.

    Raises:
        InputError: one message listing every missing, unexpected, mis-shaped or non-finite
            tensor.
    """
    return read_tensors(tensors, config, model, source)[0]


def read_tensors(
    tensors: Mapping[str, np.ndarray],
    config: RobertaPreLayerNormConfig,
    model: str = "masked_lm",
    source: str = "tensors",
    initial: Callable[[], parameters.Tree] | None = None,
    ignore_mismatched_sizes: bool = False,
) -> tuple[parameters.Tree, Swapped]:
    """The parameter tree, float32 numpy, of a transformers state dict, and what was swapped.

    Parts that this model does not have (a head, the pooler) are dropped.

    Args:
        tensors: with or without the base model's prefix; any floating dtype.
        source: what to call them in errors.
        initial: gives new values, for a part that is absent as a whole; not called if nothing is.
            None: absent is an error.
        ignore_mismatched_sizes: take new values for tensors of another shape, too.

    Raises:
        InputError: one message listing every missing, unexpected, mis-shaped or non-finite
            tensor, and an output matrix that is not the tied word table.
    """
    found = {}
    for name, value in tensors.items():
        if not _BUFFER.search(name):
            name = BASE_PREFIX + name if _UNPREFIXED.match(name) else name
            found[name] = np.asarray(value, np.float32)
    rows = _expand(config, model)
    shapes = {name: shape for _, _, name, shape in rows}
    problems = _settle_output(found, shapes)

    wanted_parts, found_parts = {*map(_part, shapes)}, {*map(_part, found)} - {None}
    # Without a head a model is the same function lower down; without cross-attention it is not.
    droppable = found_parts - wanted_parts - ({"crossattention"} if initial is None else set())
    dropped = [name for name in found if _part(name) in droppable]
    found = {name: found[name] for name in found.keys() - set(dropped)}
    new, mismatched = [], []
    if initial is not None:
        new = [name for name in shapes if _part(name) and _part(name) not in found_parts]
    if initial is not None and ignore_mismatched_sizes:
        mismatched = [n for n in shapes if n in found and found[n].shape != shapes[n]]
    fresh = {*new, *mismatched}
    expected = {name: shape for name, shape in shapes.items() if name not in fresh}
    given = {name: found[name] for name in sorted(found.keys() - fresh)}
    problems += parameters.differences(parameters.float32_leaves(expected), given)
    problems += [
        f"NaN or infinity in {name}"
        for name, value in given.items()
        if not np.isfinite(value).all()
    ]
    if problems:
        raise InputError(f"{source}: " + "; ".join(problems))

    if fresh:
        start = {path: np.asarray(leaf) for path, leaf in parameters.flatten(initial()).items()}
    table = parameters.table(config, model)
    leaves = {p: np.empty(s, np.float32) for p, s in parameters.shapes(config, model).items()}
    for path, n, name, _ in rows:
        target = leaves[path] if n is None else leaves[path][n]
        if name in fresh:
            target[...] = start[path] if n is None else start[path][n]
        else:
            target[...] = _from_torch(table[path], given[name], target.shape)
    return parameters.unflatten(leaves), Swapped(*map(tuple, (new, dropped, mismatched)))


def _settle_output(found: dict[str, np.ndarray], shapes: Mapping[str, Any]) -> list[str]:
    """Leaves one output bias in `found`, and no copy of a tied matrix; returns contradictions.

    transformers 5 computes with `lm_head.decoder.bias` where the output is untied, transformers 4
    ties it to `lm_head.bias`; tied files may hold copies.
    """
    if "lm_head.bias" not in shapes:
        return []
    bias = found.pop(_UNTIED_BIAS, None)
    if _UNTIED_WEIGHT in shapes:
        if bias is not None:
            found["lm_head.bias"] = bias
        return []
    copies = {_WORD: found.pop(_UNTIED_WEIGHT, None), "lm_head.bias": bias}
    problems = []
    for name, copy in copies.items():
        if copy is not None and not np.array_equal(copy, found.setdefault(name, copy)):
            problems.append(
                f"the output is not tied to {name}, but config.json has tie_word_embeddings=true"
            )
    return problems


def save_pretrained(
    directory: str | Path,
    params: parameters.Tree,
    config: RobertaPreLayerNormConfig,
    model: str = "masked_lm",
    max_shard_bytes: int = 5 * 10**9,
    dtype: str = "float32",
) -> None:
    """Writes `config.json` and safetensors so that transformers 4.57 and 5 load them silently.

    Each file appears whole or not at all; other files of the directory stay as they are, except
    weights of the same kind, which would contradict the new ones.

    Args:
        max_shard_bytes: larger models are written as shards and their index.
        dtype: of the file: float32, float16 or bfloat16.

    Raises:
        InputError: where the tree is not the model's, a number is too large for the dtype, or
            `directory` is a file.
    """
    from safetensors.numpy import save

    parameters.check(params, config, model)
    directory = Path(directory)
    if directory.is_file():
        raise InputError(f"{directory}: a file, expected a directory to write to")
    directory.mkdir(parents=True, exist_ok=True)
    values = {**config.to_dict(), "architectures": [ARCHITECTURES[model]], "dtype": dtype}
    tensors = {n: as_dtype(n, t, dtype) for n, t in to_tensors(params, config, model).items()}
    shards = _shards(tensors, max_shard_bytes)
    names = [WEIGHTS_NAME]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with written_whole(directory / name) as partial:
            partial.write_bytes(save(shard, metadata={"format": "pt"}))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())},
            "weight_map": {
                tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
            },
        }
        _write_json(directory / INDEX_NAME, index)
        names.append(INDEX_NAME)
    _write_json(directory / CONFIG_NAME, values)
    for path in (*directory.glob("model*.safetensors"), directory / INDEX_NAME):
        if path.name not in names and re.fullmatch(
            r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name
        ):
            path.unlink(missing_ok=True)


def as_dtype(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """A finite float32 array in another precision. Raises InputError where that has no room."""
    with np.errstate(over="ignore"):
        cast = value.astype(np.dtype(dtype), copy=False)
    if cast.dtype != value.dtype and not np.isfinite(cast).all():
        raise InputError(f"{name} has numbers too large for {dtype}: write float32 or bfloat16")
    return cast


def _shards(tensors: Mapping[str, np.ndarray], most: int) -> list[dict[str, np.ndarray]]:
    """Cuts a state dict, in order, into pieces of at most `most` bytes where one tensor fits."""
    shards, size = [{}], 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    return shards


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_pretrained(
    directory: str | Path, model: str = "masked_lm"
) -> tuple[parameters.Tree, RobertaPreLayerNormConfig]:
    """Reads a Hugging Face directory: the parameter tree (float32 numpy) and the config.

    Raises:
        InputError: naming the file that is missing, unreadable or does not fit its config.
    """
    config = RobertaPreLayerNormConfig.from_json(Path(directory) / CONFIG_NAME)
    tensors, source = read_weights(directory)
    return from_tensors(tensors, config, model, source), config


def open_directory(
    cls: type,
    directory: str | Path,
    config: RobertaPreLayerNormConfig | None,
    options: Collection[str],
    arguments: Mapping[str, Any],
) -> tuple[RobertaPreLayerNormConfig, dict[str, Any]]:
    """What every `from_pretrained` begins with: the config, and the class' own arguments.

    Args:
        cls: the class that is asked, for messages.
        config: in place of the directory's.
        options: names of the class' own arguments; all others replace fields of the config.

    Raises:
        InputError: no such directory, a config of another class, an unknown argument.
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
    if unknown := arguments.keys() - fields - set(options):
        raise InputError(
            f"{cls.__name__}.from_pretrained: unknown argument {', '.join(sorted(unknown))}"
        )
    replaced = {name: value for name, value in arguments.items() if name in fields}
    own = {name: value for name, value in arguments.items() if name not in fields}
    return config.replace(**replaced), own


def report_swapped(swapped: Swapped, source: str, cls: type) -> None:
    """Warns of parts that are new or dropped; says nothing where the file fits."""
    if str(swapped):
        _log.warning("%s into %s: %s", source, cls.__name__, swapped)


def read_weights(path: str | Path) -> tuple[dict[str, np.ndarray], str]:
    """A state dict by transformers' torch names, and the file it came from.

    Args:
        path: a directory; or one of its files, safetensors, their index, or Flax msgpack.

    Raises:
        InputError: naming the file that is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        places = [path / name for name in (WEIGHTS_NAME, INDEX_NAME, FLAX_NAME)]
        found = next((place for place in places if place.is_file()), None)
        others = [name for name in _UNREAD if (path / name).is_file()]
        if found is None and others:
            raise InputError(
                f"{path / others[0]}: not read here, expected {WEIGHTS_NAME} or {FLAX_NAME}: "
                f"python -m experiments.convert --input={path} --output=NEW writes them"
            )
        path = found or places[0]
    readers = {".json": _read_shards, ".msgpack": _read_flax}
    return readers.get(path.suffix, _read_safetensors)(path), str(path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected the weights beside config.json") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from None


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index}: damaged or not an index of shards ({error!r})") from None
    tensors = {}
    for name in sorted(set(places.values())):
        shard = _read_safetensors(index.parent / Path(name).name)
        astray = [tensor for tensor in shard if places.get(tensor) != name]
        if astray:
            raise InputError(f"{index}: does not place {', '.join(astray)} of {name}")
        tensors |= shard
    return tensors


def _read_flax(path: Path) -> dict[str, np.ndarray]:
    """transformers 4's Flax tree by torch names: `kernel` transposed, `scale` and `embedding`."""
    from flax.serialization import msgpack_restore

    try:
        flat = parameters.flatten(msgpack_restore(path.read_bytes()))
        if strange := [name for name, v in flat.items() if not isinstance(v, np.ndarray)]:
            raise ValueError(f"{strange[0]} is no array")
    except Exception as error:  # msgpack raises a dozen unrelated types on damaged bytes
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

"""Reads transformers' checkpoints of any age: torch, safetensors, Flax and TensorFlow weights.

`prelnroberta.pretrained.hf_checkpoint` reads the package's own format, current safetensors and
msgpack, and holds the table of names. This module adds the older formats: torch's pickles,
TensorFlow's h5, and the files of princeton-nlp, which call the model `roberta` and carry an unused
LayerNorm (princeton-nlp/DinkyTrain, huggingface/modeling_roberta_prelayernorm.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridges.formats import torch_pickle
from bridges.formats.foreign_checkpoint import Checkpoint, OriginalModel, count_layers, shorten_list
from bridges.formats.keras_h5 import H5_NAME, read_h5
from prelnroberta.config import MODEL_TYPE, RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.pretrained import hf_checkpoint

BIN_NAME = "pytorch_model.bin"
BIN_INDEX_NAME = "pytorch_model.bin.index.json"
# File name -> description, in order of preference.
FORMATS = {
    hf_checkpoint.WEIGHTS_NAME: "transformers safetensors",
    hf_checkpoint.INDEX_NAME: "transformers safetensors, in shards",
    BIN_NAME: "transformers PyTorch file",
    BIN_INDEX_NAME: "transformers PyTorch files, in shards",
    hf_checkpoint.FLAX_NAME: "transformers Flax msgpack",
    H5_NAME: "transformers TensorFlow h5",
}
# princeton-nlp's config.json says roberta; the weights show whether the model is pre-LN.
_MODEL_TYPES = (MODEL_TYPE, "roberta")
_BASE_PREFIX = hf_checkpoint.BASE_PREFIX
_OLD_BASE_PREFIX = "roberta."
_LAYER_PREFIX = _BASE_PREFIX + "encoder.layer."
_UNUSED = re.compile(r"\.attention\.self\.LayerNorm\.(weight|bias)$")
_POST_LN = re.compile(r"\.layer\.\d+\.(attention\.)?output\.LayerNorm\.")
# Fields of a config that describe the file, not the architecture.
_IGNORED_FIELDS = ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path")
_MAX_LABELS = 1 << 20
# The modules that each model of `params.MODELS` has in addition to the encoder.
_HEAD_MODULES = {
    "encoder": set(),
    "base": {"pooler"},
    "masked_lm": {"lm_head"},
    "causal_lm": {"lm_head"},
    "multiple_choice": {"pooler", "classifier"},
    "sequence_classification": {"classifier"},
    "token_classification": {"classifier"},
    "question_answering": {"qa_outputs"},
}


def find_weights_file(path: Path) -> Path | None:
    """Returns `path` if it is a file, or the first of `FORMATS` in a folder."""
    if path.is_file():
        return path
    return next((path / name for name in FORMATS if (path / name).is_file()), None)


def read_checkpoint(path: Path, head: str | None) -> Checkpoint:
    """Reads a weights file of transformers and the config.json next to it.

    Args:
        head: "none" for the bare encoder, or the name of the head in the file.

    Raises:
        InputError: a file is missing, damaged or unsafe.
    """
    tensors, format_name = _read_tensors(path)
    return describe_checkpoint(path, tensors, format_name, head)


def describe_checkpoint(
    path: Path, file_tensors: Mapping[str, Any], format_name: str, head: str | None
) -> Checkpoint:
    """As `read_checkpoint`, for tensors that have been read, by the names of their file."""
    fields = _read_config_fields(path.with_name(hf_checkpoint.CONFIG_NAME))
    tensors = {
        _current_name(n): value
        for n, value in file_tensors.items()
        if not hf_checkpoint.BUFFER_PATTERN.search(n)
    }
    unused = {name for name in tensors if _UNUSED.search(name)}
    tensors = {name: value for name, value in tensors.items() if name not in unused}
    problems = _architecture_problems(tensors) or _config_mismatches(fields, tensors)
    if fields.get("model_type", MODEL_TYPE) not in _MODEL_TYPES:
        problems.insert(0, f"config.json: model_type={fields['model_type']!r}, another model")
    config = None
    if not problems:
        config, problems = _make_config(fields)
    found = _infer_model(tensors, bool(fields.get("is_decoder")))
    heads = () if found in ("encoder", "base") else (found,)
    if head not in (None, "none", found):
        raise InputError(
            f"{path}: --head={head}, expected one of those it has: {', '.join((*heads, 'none'))}"
        )
    model = "encoder" if head == "none" else found
    return Checkpoint(
        format=format_name,
        path=path,
        tensors=tensors,
        config=config,
        model=model,
        heads=heads,
        norms=_describe_norms(tensors),
        dropped=_describe_dropped(unused, tensors, model),
        problems=tuple(problems),
        original=config
        and OriginalModel(
            file_tensors,
            "transformers",
            num_heads=config.num_attention_heads,
            layer_norm_eps=config.layer_norm_eps,
            hidden_act=config.hidden_act,
            pad_token_id=config.pad_token_id,
            is_causal=config.is_decoder,
        ),
    )


def _read_tensors(path: Path) -> tuple[dict[str, Any], str]:
    """Returns the tensors of a file and the description of its format."""
    format_name = FORMATS.get(path.name, "transformers file")
    if path.name == BIN_INDEX_NAME:
        return _read_bin_shards(path), format_name
    if path.suffix == ".h5":
        return read_h5(path), format_name
    if path.suffix in (".bin", ".pt"):
        return require_state_dict(path, torch_pickle.load(path)), format_name
    return hf_checkpoint.read_weights(path)[0], format_name


def require_state_dict(path: Path, saved: Any) -> dict[str, Any]:
    """Returns the content of a torch file if it consists of names and tensors only.

    Raises:
        InputError: it does not.
    """
    if not isinstance(saved, dict) or not all(
        isinstance(name, str) and isinstance(value, torch_pickle.StoredTensor)
        for name, value in saved.items()
    ):
        raise InputError(
            f"{path}: neither a fairseq checkpoint (model, and args or cfg) nor transformers' "
            "names and tensors"
        )
    return saved


def _read_bin_shards(index: Path) -> dict[str, Any]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: not an index of shards, expected a weight_map")
    tensors = {}
    for name in sorted({Path(file).name for file in weight_map.values()}):
        shard = index.with_name(name)
        if not shard.is_file():
            raise InputError(f"{shard}: no such file, {index.name} names it")
        tensors |= require_state_dict(shard, torch_pickle.load(shard))
    if missing := weight_map.keys() - tensors.keys():
        raise InputError(f"{index}: {shorten_list(missing)} in none of its shards")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected it next to the weights") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid json ({error!s:.200})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a json object, found {type(values).__name__}")
    return values


def _read_config_fields(path: Path) -> dict[str, Any]:
    fields = _read_json(path)
    labels = fields.get("num_labels", fields.get("_num_labels"))
    if isinstance(labels, int) and labels > _MAX_LABELS:
        raise InputError(f"{path}: num_labels={labels}, expected at most {_MAX_LABELS}")
    return fields


def _make_config(
    fields: Mapping[str, Any],
) -> tuple[RobertaPreLayerNormConfig | None, list[str]]:
    """Returns the config, or None and the problems."""
    fields = {k: v for k, v in fields.items() if k not in (*_IGNORED_FIELDS, "model_type")}
    try:
        return RobertaPreLayerNormConfig.from_dict(fields), []
    except InputError as error:
        return None, [str(error)]


def _current_name(name: str) -> str:
    """The name that current transformers gives to a tensor of a model with a head."""
    if name.startswith(_OLD_BASE_PREFIX):
        return _BASE_PREFIX + name.removeprefix(_OLD_BASE_PREFIX)
    return _BASE_PREFIX + name if hf_checkpoint.BASE_MODULE_PATTERN.match(name) else name


def _architecture_problems(tensors: Mapping[str, Any]) -> list[str]:
    """Why the names of the weights belong to another architecture."""
    if post := [name for name in tensors if _POST_LN.search(name)]:
        return [
            f"post-LN: {shorten_list(post, 2)} normalise after each sublayer, as plain RoBERTa and "
            "BERT do; another function, not another name"
        ]
    problems = []
    if _BASE_PREFIX + "embeddings.LayerNorm.weight" not in tensors:
        problems.append(
            "no embedding LayerNorm (fairseq's roberta_prenorm has none): this model always has "
            "one, and no LayerNorm is the identity"
        )
    if _BASE_PREFIX + "LayerNorm.weight" not in tensors:
        problems.append("no final LayerNorm, which is the mark of a pre-LN model")
    return problems


def _config_mismatches(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[str]:
    """Where config.json and the shapes differ, checked before anything of that size is made."""
    axes = {
        "vocab_size": ("embeddings.word_embeddings.weight", 0),
        "hidden_size": ("embeddings.word_embeddings.weight", 1),
        "max_position_embeddings": ("embeddings.position_embeddings.weight", 0),
        "type_vocab_size": ("embeddings.token_type_embeddings.weight", 0),
        "intermediate_size": ("encoder.layer.0.intermediate.dense.weight", 0),
    }
    problems = []
    defaults = RobertaPreLayerNormConfig()
    for field, (name, axis) in axes.items():
        tensor = tensors.get(_BASE_PREFIX + name)
        size = fields.get(field, getattr(defaults, field))
        if tensor is None or len(tensor.shape) != 2:
            problems.append(f"no matrix {name}")
        elif size != tensor.shape[axis]:
            problems.append(
                f"config.json: {field}={size!r:.60}, but {name} is {list(tensor.shape)}"
            )
    layers = fields.get("num_hidden_layers", defaults.num_hidden_layers)
    if layers != (found := count_layers(tensors, _LAYER_PREFIX)):
        problems.append(
            f"config.json: num_hidden_layers={layers!r:.60}, but the weights have {found}"
        )
    return problems


def _infer_model(tensors: Mapping[str, Any], is_decoder: bool) -> str:
    """The model of `params.MODELS` that has these tensors."""
    modules = _head_modules(tensors)
    if "lm_head" in modules:
        return "causal_lm" if is_decoder else "masked_lm"
    if "classifier" in modules:
        if "classifier.weight" not in tensors:
            return "sequence_classification"
        one_score = tensors["classifier.weight"].shape[:1] == (1,)
        return "multiple_choice" if one_score and "pooler" in modules else "token_classification"
    if "qa_outputs" in modules:
        return "question_answering"
    return "base" if "pooler" in modules else "encoder"


def _head_modules(tensors: Mapping[str, Any]) -> set[str]:
    known = set().union(*_HEAD_MODULES.values())
    return {name.removeprefix(_BASE_PREFIX).partition(".")[0] for name in tensors} & known


def _describe_dropped(unused: set[str], tensors: Mapping[str, Any], model: str) -> tuple[str, ...]:
    dropped = []
    if unused:
        dropped.append(f"{len(unused)} tensors of attention.self.LayerNorm, which nothing uses")
    if modules := _head_modules(tensors) - _HEAD_MODULES[model]:
        dropped.append(f"parts that {model} does not have: {shorten_list(modules)}")
    return tuple(dropped)


def _describe_norms(tensors: Mapping[str, Any]) -> str:
    def has(name: str) -> str:
        return "yes" if _BASE_PREFIX + name in tensors else "no"

    N = count_layers(tensors, _LAYER_PREFIX)
    before = sum(
        f"{_LAYER_PREFIX}{n}.{module}.LayerNorm.weight" in tensors
        for n in range(N)
        for module in ("attention", "intermediate")
    )
    after = sum(bool(_POST_LN.search(name)) for name in tensors if name.endswith("weight"))
    return (
        f"embedding {has('embeddings.LayerNorm.weight')}, {before} before and {after} after the "
        f"sublayers of {N} layers, final {has('LayerNorm.weight')}"
    )

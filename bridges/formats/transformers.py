"""transformers' folders of any age -> what they are: torch, safetensors, Flax and TF weights.

The tree's own format, current safetensors and msgpack, is read by `prelnroberta.pretrained.hf_checkpoint`, and
so are all names. Here are the older forms around it: torch's pickles, TF's h5, and the files of
princeton-nlp, which call the model `roberta` and carry a LayerNorm that nothing uses
(princeton-nlp/DinkyTrain, huggingface/modeling_roberta_prelayernorm.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridges.formats import torch_pickle
from bridges.formats.checkpoint import Checkpoint, count_layers, some
from bridges.formats.keras_h5 import H5_NAME, read_h5
from bridges.verify import float64_reference as float64
from prelnroberta.config import MODEL_TYPE, RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.pretrained import hf_checkpoint

BIN_NAME = "pytorch_model.bin"
BIN_INDEX_NAME = "pytorch_model.bin.index.json"
FORMS = {
    hf_checkpoint.WEIGHTS_NAME: "transformers safetensors",
    hf_checkpoint.INDEX_NAME: "transformers safetensors, in shards",
    BIN_NAME: "transformers PyTorch file",
    BIN_INDEX_NAME: "transformers PyTorch files, in shards",
    hf_checkpoint.FLAX_NAME: "transformers Flax msgpack",
    H5_NAME: "transformers TensorFlow h5",
}
# The files of princeton-nlp say roberta; whether the weights are pre-LN, the weights say.
_MODEL_TYPES = (MODEL_TYPE, "roberta")
_BASE = hf_checkpoint.BASE_PREFIX
_OLD_BASE = "roberta."
_LAYERS = _BASE + "encoder.layer."
_UNUSED = re.compile(r"\.attention\.self\.LayerNorm\.(weight|bias)$")
_POST_LN = re.compile(r"\.layer\.\d+\.(attention\.)?output\.LayerNorm\.")
_BUFFER = re.compile(r"embeddings\.(position_ids|token_type_ids)$")
_BASE_PART = re.compile(r"(embeddings|encoder|LayerNorm|pooler)\.")
# What of a config is somebody else's bookkeeping.
_FOREIGN = ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path")
_MOST_LABELS = 1 << 20


def weights_in(path: Path) -> Path | None:
    """The weights file that a path means: itself, or the first of `FORMS` in a folder."""
    if path.is_file():
        return path
    return next((path / name for name in FORMS if (path / name).is_file()), None)


def read(path: Path, head: str | None) -> Checkpoint:
    """A folder of transformers, or one of its weights files with config.json beside it.

    Args:
        head: none for the bare encoder, or the name of the head that it has.

    Raises:
        InputError: a file that is missing, damaged or unsafe.
    """
    own, form = _tensors(path)
    return describe(path, own, form, head)


def describe(path: Path, own: Mapping[str, Any], form: str, head: str | None) -> Checkpoint:
    """As `read`, of tensors by their own names."""
    values = _config_values(path.with_name(hf_checkpoint.CONFIG_NAME))
    tensors = {_renamed(name): value for name, value in own.items() if not _BUFFER.search(name)}
    unused = [name for name in tensors if _UNUSED.search(name)]
    state = {name: value for name, value in tensors.items() if name not in set(unused)}
    problems = _weight_problems(state)
    if not problems:
        problems = _disagreements(values, state)
    if values.get("model_type", MODEL_TYPE) not in _MODEL_TYPES:
        problems.insert(0, f"config.json: model_type={values['model_type']!r}, another model")
    config = None
    if not problems:
        config, problems = _config(values, path)
    model = _model(state, bool(values.get("is_decoder")))
    found = () if model in ("encoder", "base") else (model,)
    if head not in (None, "none", model):
        raise InputError(
            f"{path}: --head={head}, expected one of those it has: {', '.join((*found, 'none'))}"
        )
    model = "encoder" if head == "none" else model
    dropped = []
    if unused:
        dropped.append(f"{len(unused)} tensors of attention.self.LayerNorm, which nothing uses")
    if parts := _parts(state) - _parts_of(model):
        dropped.append(f"parts that {model} does not have: {some(parts)}")
    return Checkpoint(
        form=form,
        source=path,
        state=state,
        config=config,
        model=model,
        heads=found,
        norms=_norms(state),
        dropped=tuple(dropped),
        problems=tuple(problems),
        original=config
        and float64.Original(
            own,
            float64.TRANSFORMERS,
            H=config.num_attention_heads,
            eps=config.layer_norm_eps,
            activation=config.hidden_act,
            pad=config.pad_token_id,
            causal=config.is_decoder,
        ),
    )


def _tensors(path: Path) -> tuple[dict[str, Any], str]:
    form = FORMS.get(path.name, "transformers file")
    if path.name == BIN_INDEX_NAME:
        return _shards(path), form
    if path.suffix == ".h5":
        return read_h5(path), form
    if path.suffix in (".bin", ".pt"):
        return state_dict(path, torch_pickle.load(path)), form
    return hf_checkpoint.read_weights(path)[0], form


def state_dict(path: Path, found: Any) -> dict[str, Any]:
    """What a torch file held, if that was names and tensors alone."""
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, torch_pickle.StoredTensor)
        for name, value in found.items()
    ):
        raise InputError(
            f"{path}: neither a fairseq checkpoint (model, and args or cfg) nor transformers' "
            "names and tensors"
        )
    return found


def _shards(index: Path) -> dict[str, Any]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise InputError(f"{index}: not an index of shards, expected a weight_map")
    tensors = {}
    for name in sorted({Path(place).name for place in places.values()}):
        shard = index.with_name(name)
        if not shard.is_file():
            raise InputError(f"{shard}: no such file, {index.name} names it")
        tensors |= state_dict(shard, torch_pickle.load(shard))
    if missing := places.keys() - tensors.keys():
        raise InputError(f"{index}: {some(missing)} in none of its shards")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected it beside the weights") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid json ({error!s:.200})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a json object, found {type(values).__name__}")
    return values


def _config_values(path: Path) -> dict[str, Any]:
    values = _read_json(path)
    labels = values.get("num_labels", values.get("_num_labels"))
    if isinstance(labels, int) and labels > _MOST_LABELS:
        raise InputError(f"{path}: num_labels={labels}, expected at most {_MOST_LABELS}")
    return values


def _config(
    values: Mapping[str, Any], path: Path
) -> tuple[RobertaPreLayerNormConfig | None, list[str]]:
    own = {name: v for name, v in values.items() if name not in (*_FOREIGN, "model_type")}
    try:
        return RobertaPreLayerNormConfig.from_dict(own), []
    except InputError as error:
        return None, [str(error)]


def _renamed(name: str) -> str:
    name = _BASE + name.removeprefix(_OLD_BASE) if name.startswith(_OLD_BASE) else name
    return _BASE + name if _BASE_PART.match(name) else name


def _weight_problems(state: Mapping[str, Any]) -> list[str]:
    """What the weights themselves say against this model."""
    if post := [name for name in state if _POST_LN.search(name)]:
        return [
            f"post-LN: {some(post, 2)} normalise after each sublayer, as plain RoBERTa and BERT "
            "do; another function, not another name"
        ]
    problems = []
    if _BASE + "embeddings.LayerNorm.weight" not in state:
        problems.append("no embedding LayerNorm (fairseq's roberta_prenorm has none): this model "
                        "always has one, and no LayerNorm is the identity")  # fmt: skip
    if _BASE + "LayerNorm.weight" not in state:
        problems.append("no final LayerNorm, which is the mark of a pre-LN model")
    return problems


def _disagreements(values: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Where config.json and shapes differ: found before anything of that size is made."""
    places = {
        "vocab_size": ("embeddings.word_embeddings.weight", 0),
        "hidden_size": ("embeddings.word_embeddings.weight", 1),
        "max_position_embeddings": ("embeddings.position_embeddings.weight", 0),
        "type_vocab_size": ("embeddings.token_type_embeddings.weight", 0),
        "intermediate_size": ("encoder.layer.0.intermediate.dense.weight", 0),
    }
    problems = []
    defaults = RobertaPreLayerNormConfig()
    for field, (name, axis) in places.items():
        value = state.get(_BASE + name)
        if value is None or len(value.shape) != 2:
            problems.append(f"no matrix {name}")
        elif values.get(field, getattr(defaults, field)) != value.shape[axis]:
            problems.append(
                f"config.json: {field}={values.get(field, getattr(defaults, field))!r:.60}, but "
                f"{name} is {list(value.shape)}"
            )
    layers = values.get("num_hidden_layers", defaults.num_hidden_layers)
    if layers != count_layers(state, _LAYERS):
        problems.append(
            f"config.json: num_hidden_layers={layers!r:.60}, but the weights have "
            f"{count_layers(state, _LAYERS)}"
        )
    return problems


def _model(state: Mapping[str, Any], is_decoder: bool) -> str:
    """The model of `params.MODELS` that has these tensors."""
    parts = _parts(state)
    if "lm_head" in parts:
        return "causal_lm" if is_decoder else "masked_lm"
    if "classifier" in parts:
        if "classifier.weight" not in state:
            return "sequence_classification"
        one = state["classifier.weight"].shape[:1] == (1,)
        return "multiple_choice" if one and "pooler" in parts else "token_classification"
    if "qa_outputs" in parts:
        return "question_answering"
    return "base" if "pooler" in parts else "encoder"


def _parts(state: Mapping[str, Any]) -> set[str]:
    known = {"lm_head", "classifier", "qa_outputs", "pooler"}
    return {name.removeprefix(_BASE).partition(".")[0] for name in state} & known


def _parts_of(model: str) -> set[str]:
    return {
        "masked_lm": {"lm_head"},
        "causal_lm": {"lm_head"},
        "base": {"pooler"},
        "multiple_choice": {"pooler", "classifier"},
        "sequence_classification": {"classifier"},
        "token_classification": {"classifier"},
        "question_answering": {"qa_outputs"},
    }.get(model, set())


def _norms(state: Mapping[str, Any]) -> str:
    def has(name: str) -> str:
        return "yes" if _BASE + name in state else "no"

    N = count_layers(state, _LAYERS)
    before = sum(
        f"{_LAYERS}{n}.{where}.LayerNorm.weight" in state
        for n in range(N)
        for where in ("attention", "intermediate")
    )
    after = sum(bool(_POST_LN.search(name)) for name in state if name.endswith("weight"))
    return (
        f"embedding {has('embeddings.LayerNorm.weight')}, {before} before and {after} after the "
        f"sublayers of {N} layers, final {has('LayerNorm.weight')}"
    )

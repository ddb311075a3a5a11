"""Reads the checkpoints of fairseq and DinkyTrain and decides whether they are this model.

fairseq's RoBERTa with `--encoder-normalize-before` is RoBERTa-PreLayerNorm, exactly, on real
tokens, under conditions that depend on the checkpoint. Each of them is checked here; README.md has
the list.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridges.formats import torch_pickle
from bridges.formats.fairseq import tensor_names
from bridges.formats.foreign_checkpoint import Checkpoint, OriginalModel, count_layers, shorten_list
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.pretrained import hf_checkpoint

# torch's default, which fairseq never changes.
LAYER_NORM_EPS = 1e-5
# fairseq's activation functions -> transformers' names (fairseq/utils.py get_activation_fn).
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "relu": "relu",
    "tanh": "tanh",
    "swish": "silu",
}
# Values of absent settings (base_architecture and its variants in roberta/model.py).
_DEFAULTS = {
    "encoder_attention_heads": 12,
    "encoder_normalize_before": False,
    "layernorm_embedding": True,
    "activation_fn": "gelu",
    "pooler_activation_fn": "tanh",
    "untie_weights_roberta": False,
    "spectral_norm_classification_head": False,
    "encoder_learned_pos": True,
    "no_scale_embedding": True,
    "no_token_positional_embeddings": False,
    "encoder_layers_to_keep": None,
    "quant_noise_pq": 0,
    "model_parallel_size": 1,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "pooler_dropout": 0.0,
}
_ARCH_DEFAULTS = {
    "roberta": {},
    "roberta_base": {},
    "roberta_large": {"encoder_attention_heads": 16},
    "roberta_prenorm": {"layernorm_embedding": False, "encoder_normalize_before": True},
    "xlm": {"encoder_attention_heads": 16},
}
# With any other value, the encoder computes another function: setting -> (value, what others mean).
_REQUIRED_SETTINGS = {
    "encoder_learned_pos": (True, "sinusoidal positions; they are learned here"),
    "no_scale_embedding": (True, "embeddings times the root of the hidden size"),
    "no_token_positional_embeddings": (False, "no positions"),
    "encoder_layers_to_keep": (None, "layers that are pruned while loading"),
    "quant_noise_pq": (0, "quantization noise, which adds a projection of the embeddings"),
    "model_parallel_size": (1, "one part of a model-parallel checkpoint; join the parts first"),
}
_FINAL_NORM = tensor_names.ENCODER + "layer_norm.weight"


def is_fairseq(saved: Any) -> bool:
    """Whether the content of a torch file is a checkpoint of fairseq."""
    return isinstance(saved, dict) and isinstance(saved.get("model"), dict)


@dataclasses.dataclass(frozen=True)
class FairseqModel:
    """The settings of a checkpoint, and its tensors by current names.

    `model[name]` is a setting or its default; `name in model` says whether a tensor is present.
    """

    path: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def arch(self) -> str:
        arch = self.settings.get("arch") or self.settings.get("_name") or ""
        if not isinstance(arch, str):
            raise InputError(f"{self.path}: setting arch is a {type(arch).__name__}")
        return arch.removeprefix("deepspeed_")

    def __getitem__(self, name: str) -> Any:
        defaults = _DEFAULTS | _ARCH_DEFAULTS.get(self.arch, {})
        value = self.settings.get(name, defaults[name])
        if not isinstance(value, bool | int | float | str | None):
            raise InputError(f"{self.path}: setting {name} is a {type(value).__name__}")
        return value

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def heads(self) -> list[str]:
        """masked_lm if there is an LM head, and the names of the classification heads."""
        matches = (
            re.fullmatch(r"classification_heads\.(.+)\.dense\.weight", n) for n in self.tensors
        )
        lm_head = ["masked_lm"] if tensor_names.LM_HEAD + "dense.weight" in self else []
        return lm_head + sorted(match[1] for match in matches if match)


def read_checkpoint(path: Path, saved: Mapping[str, Any], head: str | None) -> Checkpoint:
    """Interprets the content of a fairseq checkpoint.

    Args:
        saved: result of `torch_pickle.load`, with shards already joined.
        head: masked_lm, none, or the name of a classification head. None takes the LM head, or the
            only head.

    Raises:
        InputError: the file does not determine which model it holds.
    """
    file_tensors = saved["model"]
    if not all(
        isinstance(name, str) and isinstance(value, torch_pickle.StoredTensor | np.ndarray)
        for name, value in file_tensors.items()
    ):
        raise InputError(f"{path}: its 'model' holds more than tensors, expected a state dict")
    settings, settings_key = _find_settings(path, saved)
    tensors, copies = tensor_names.upgrade_names(file_tensors)
    source = FairseqModel(path, settings, tensors)
    model, head = _select_head(source, head)
    config, problems = _make_config(source, model, head)
    problems += _encoder_problems(source)
    hf_tensors, unconverted = {}, set()
    if config is not None:
        problems += _head_problems(source, model, head)
        hf_tensors, unconverted = _convert(tensors, config, model, head)
    head_prefixes = (tensor_names.LM_HEAD, tensor_names.CLASSIFICATION_HEADS)
    other_heads = {name for name in unconverted if name.startswith(head_prefixes)}
    if unknown := unconverted - other_heads:
        problems.append(f"unexpected {shorten_list(unknown)}: not part of this model")
    arch = source.arch or "no arch"
    deepspeed = ", DeepSpeed's fused layers" if tensor_names.is_deepspeed(file_tensors) else ""
    return Checkpoint(
        format=f"fairseq checkpoint ({arch}, settings in {settings_key}{deepspeed})",
        path=path,
        tensors=hf_tensors,
        config=config,
        model=model,
        heads=tuple(source.heads),
        norms=_describe_norms(source),
        dropped=_describe_dropped(saved, other_heads, copies),
        notes=_make_notes(source, config, head),
        problems=tuple(problems),
        original=OriginalModel(
            file_tensors,
            "fairseq",
            num_heads=source["encoder_attention_heads"],
            layer_norm_eps=LAYER_NORM_EPS,
            hidden_act=source["activation_fn"],
            lm_head_act=source["activation_fn"],
            head=head,
        ),
    )


def _find_settings(path: Path, saved: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The model's settings and where they are: `args` in old files, `cfg.model` in newer ones."""
    if isinstance(saved.get("args"), dict):
        return saved["args"], "args"
    cfg = saved.get("cfg")
    if isinstance(cfg, dict) and isinstance(cfg.get("model"), dict):
        return cfg["model"], "cfg"
    raise InputError(
        f"{path}: neither args nor cfg.model say how many heads the model has or when it "
        "normalises, expected a checkpoint as fairseq's trainer writes it"
    )


def _select_head(source: FairseqModel, head: str | None) -> tuple[str, str | None]:
    """The model of `params.MODELS`, and the name of its classification head if it has one."""
    heads = source.heads
    if head is None:
        head = heads[0] if heads[:1] == ["masked_lm"] or len(heads) == 1 else "none"
    if head != "none" and head not in heads:
        raise InputError(
            f"{source.path}: --head={head}, expected one of those it has: "
            + ", ".join([*heads, "none"])
        )
    if head in ("none", "masked_lm"):
        return ("encoder" if head == "none" else head), None
    return "sequence_classification", head


def _make_config(
    source: FairseqModel, model: str, head: str | None
) -> tuple[RobertaPreLayerNormConfig | None, list[str]]:
    """The config that follows from shapes and settings, and problems; None if it cannot be made."""
    needed = [tensor_names.ENCODER + n for n in ("embed_tokens", "embed_positions", "layers.0.fc1")]
    if head is not None:
        head_prefix = f"{tensor_names.CLASSIFICATION_HEADS}{head}."
        needed += [head_prefix + "dense", head_prefix + "out_proj"]
    matrices = [source.tensors.get(f"{name}.weight") for name in needed]
    missing = [
        name
        for name, value in zip(needed, matrices, strict=True)
        if value is None or len(value.shape) != 2
    ]
    if missing:
        hint = " (spectral normalisation?)" if missing[0].endswith("out_proj") else ""
        return None, [f"no matrix {missing[0]}.weight{hint}"]
    word, position, fc1 = matrices[:3]
    head_fields = {}
    if head is not None:
        num_labels = matrices[4].shape[0]
        head_fields = {"num_labels": num_labels, "classifier_dropout": source["pooler_dropout"]}
    try:
        config = RobertaPreLayerNormConfig(
            vocab_size=word.shape[0],
            hidden_size=word.shape[1],
            num_hidden_layers=count_layers(source.tensors, tensor_names.ENCODER + "layers."),
            num_attention_heads=source["encoder_attention_heads"],
            intermediate_size=fc1.shape[0],
            hidden_act=ACTIVATIONS.get(source["activation_fn"], "gelu"),
            max_position_embeddings=position.shape[0],
            type_vocab_size=1,
            layer_norm_eps=LAYER_NORM_EPS,
            tie_word_embeddings=not source["untie_weights_roberta"],
            hidden_dropout_prob=source["dropout"],
            attention_probs_dropout_prob=source["attention_dropout"],
            **head_fields,
        )
    except InputError as error:
        return None, [str(error)]
    output = source.tensors.get(tensor_names.LM_HEAD_WEIGHT)
    is_tied = model == "masked_lm" and config.tie_word_embeddings and output is not None
    if is_tied and not np.array_equal(np.asarray(output), np.asarray(word)):
        return config, [
            "contradictory: untie_weights_roberta is false, but lm_head.weight is not "
            "embed_tokens.weight"
        ]
    return config, []


def _convert(
    tensors: Mapping[str, Any], config: RobertaPreLayerNormConfig, model: str, head: str | None
) -> tuple[dict[str, Any], set[str]]:
    """The tensors by transformers' names, and the names of those that the model does not have."""
    names = tensor_names.transformers_to_fairseq(config, model, head)
    hf_tensors = {hf: tensors[fairseq] for hf, fairseq in names.items() if fairseq in tensors}
    shape = (config.type_vocab_size, config.hidden_size)
    dtype = tensors[tensor_names.WORD_EMBEDDINGS].dtype
    hf_tensors[hf_checkpoint.hf_name(tensor_names.TOKEN_TYPE)] = np.zeros(shape, dtype)
    tied = {tensor_names.LM_HEAD_WEIGHT} if config.tie_word_embeddings else set()
    return hf_tensors, set(tensors) - set(names.values()) - tied - {tensor_names.VERSION}


def _encoder_problems(source: FairseqModel) -> list[str]:
    """Why the encoder computes another function than this model's."""
    problems = []
    if source.arch and "roberta" not in source.arch and source.arch not in _ARCH_DEFAULTS:
        problems.append(f"arch {source.arch!r}, expected one of RoBERTa's")
    normalize_before, has_final_norm = source["encoder_normalize_before"], _FINAL_NORM in source
    if has_final_norm and not normalize_before:
        problems.append(
            "contradictory: a final LayerNorm, but encoder_normalize_before is false, so that "
            "fairseq itself runs it as post-LN and refuses that norm"
        )
    elif not has_final_norm:
        problems.append(
            "no final LayerNorm (encoder.sentence_encoder.layer_norm)"
            if normalize_before
            else "post-LN: trained without --encoder-normalize-before, it normalises after each "
            "sublayer, as plain RoBERTa does"
        )
    else:
        problems += _version_problems(source)
    if tensor_names.ENCODER + "layernorm_embedding.weight" not in source:
        problems.append(
            "no embedding LayerNorm (arch roberta_prenorm, or layernorm_embedding false): this "
            "model always has one, and no LayerNorm is the identity"
        )
    elif not source["layernorm_embedding"]:
        problems.append("contradictory: an embedding LayerNorm, but layernorm_embedding is false")
    if source["activation_fn"] not in ACTIVATIONS:
        problems.append(f"activation_fn={source['activation_fn']!r}, which transformers lacks")
    return problems + [
        f"{name}={source[name]!r}: {meaning}"
        for name, (expected, meaning) in _REQUIRED_SETTINGS.items()
        if source[name] != expected
    ]


def _version_problems(source: FairseqModel) -> list[str]:
    flag = source.tensors.get(tensor_names.VERSION)
    version = np.asarray([1.0] if flag is None else flag, np.float64).reshape(-1)
    if version.size and version[0] >= 2:
        return []
    found = "no version flag" if flag is None else f"version flag {version[:1]}"
    return [
        f"{found} (encoder.sentence_encoder.version): below 2, fairseq drops the final LayerNorm "
        "while loading, so this is not the model it runs"
    ]


def _head_problems(source: FairseqModel, model: str, head: str | None) -> list[str]:
    """Why the selected head computes another function than this model's."""
    problems = []
    if model == "masked_lm" and source["activation_fn"] != "gelu":
        problems.append(
            f"activation_fn={source['activation_fn']!r}: fairseq's LM head uses it too, "
            "transformers' is always gelu (--head=none converts the encoder alone)"
        )
    if model == "sequence_classification":
        dense = source.tensors[f"{tensor_names.CLASSIFICATION_HEADS}{head}.dense.weight"]
        inner_size = dense.shape[0]
        if inner_size != source.tensors[tensor_names.WORD_EMBEDDINGS].shape[-1]:
            problems.append(
                f"classification head {head!r} is {inner_size} wide inside, expected the hidden "
                "size"
            )
        if source["pooler_activation_fn"] != "tanh":
            problems.append(
                f"pooler_activation_fn={source['pooler_activation_fn']!r}, expected 'tanh': "
                "transformers' classification head has no other"
            )
    return problems


def _describe_norms(source: FairseqModel) -> str:
    def has(name: str) -> str:
        return "yes" if tensor_names.ENCODER + name in source else "no"

    layers = tensor_names.ENCODER + "layers."
    N = count_layers(source.tensors, layers)
    in_layers = sum(
        f"{layers}{n}.{norm}.weight" in source
        for n in range(N)
        for norm in ("self_attn_layer_norm", "final_layer_norm")
    )
    return (
        f"embedding {has('layernorm_embedding.weight')}, {in_layers} in {N} layers "
        f"({'before' if source['encoder_normalize_before'] else 'AFTER'} each sublayer), "
        f"final {has('layer_norm.weight')}"
    )


def _describe_dropped(
    saved: Mapping[str, Any], other_heads: set[str], copies: Sequence[str]
) -> tuple[str, ...]:
    dropped = []
    if other_heads:
        heads = {".".join(name.split(".")[:2]) for name in other_heads}
        dropped.append(f"other heads: {shorten_list(heads)}")
    if copies:
        dropped.append(
            f"{len(copies)} copies of weights that fairseq 0.12 makes for a fused kernel"
        )
    training = [key for key in ("last_optimizer_state", "optimizer", "criterion") if saved.get(key)]
    if training:
        dropped.append(f"the training's {', '.join(training)}")
    return tuple(dropped)


def _make_notes(
    source: FairseqModel, config: RobertaPreLayerNormConfig | None, head: str | None
) -> tuple[str, ...]:
    notes = []
    if source["activation_dropout"]:
        notes.append(
            f"trained with activation_dropout={source['activation_dropout']}: fine-tuning here has "
            "none; the function is the same"
        )
    if head is not None and config is not None:
        notes.append(f"classification head {head!r} has {config.num_labels} labels, unnamed here")
    return tuple(notes)

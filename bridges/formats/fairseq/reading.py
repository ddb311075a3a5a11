"""fairseq's and DinkyTrain's checkpoints -> what they are, and whether they are this model.

fairseq's RoBERTa with `--encoder-normalize-before` is RoBERTa-PreLayerNorm, exactly, on real
tokens, if a number of facts hold that only the checkpoint can tell. Each is checked here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridges.formats import torch_pickle
from bridges.formats.checkpoint import Checkpoint, count_layers, some
from bridges.formats.fairseq import names
from bridges.verify import float64_reference as float64
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.pretrained import hf_checkpoint

# torch's default, which fairseq never changes.
EPS = 1e-5
# fairseq's activation functions by transformers' names (fairseq/utils.py get_activation_fn).
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "relu": "relu",
    "tanh": "tanh",
    "swish": "silu",
}
# What a Namespace that lacks a name means (base_architecture and its variants in roberta/model.py).
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
_ARCHITECTURES = {
    "roberta": {},
    "roberta_base": {},
    "roberta_large": {"encoder_attention_heads": 16},
    "roberta_prenorm": {"layernorm_embedding": False, "encoder_normalize_before": True},
    "xlm": {"encoder_attention_heads": 16},
}
# Other settings under which the encoder would be another function.
_FIXED = {
    "encoder_learned_pos": (True, "sinusoidal positions; they are learned here"),
    "no_scale_embedding": (True, "embeddings times the root of the hidden size"),
    "no_token_positional_embeddings": (False, "no positions"),
    "encoder_layers_to_keep": (None, "layers that are pruned while loading"),
    "quant_noise_pq": (0, "quantization noise, which adds a projection of the embeddings"),
    "model_parallel_size": (1, "one part of a model-parallel checkpoint; join the parts first"),
}
_FINAL_NORM = names.ENCODER + "layer_norm.weight"


def is_fairseq(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("model"), dict)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself: its settings, and its tensors by today's names."""

    path: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def arch(self) -> str:
        found = self.settings.get("arch") or self.settings.get("_name") or ""
        return str(found).removeprefix("deepspeed_")

    def __getitem__(self, name: str) -> Any:
        """A setting, or what fairseq takes in its place."""
        defaults = _DEFAULTS | _ARCHITECTURES.get(self.arch, {})
        value = self.settings.get(name, defaults[name])
        if not isinstance(value, bool | int | float | str | None):
            raise InputError(f"{self.path}: setting {name} is a {type(value).__name__}")
        return value

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def heads(self) -> list[str]:
        """What stands on the encoder."""
        own = (re.fullmatch(r"classification_heads\.(.+)\.dense\.weight", n) for n in self.tensors)
        lm = ["masked_lm"] if names.LM_HEAD + "dense.weight" in self else []
        return lm + sorted(match[1] for match in own if match)


def read(path: Path, found: Mapping[str, Any], head: str | None) -> Checkpoint:
    """A checkpoint of fairseq, in whole.

    Args:
        found: what `torch_pickle.load` gave, shards already joined.
        head: masked_lm, none, or the name of a classification head; None: the LM head, or else
            the only head there is.

    Raises:
        InputError: the file does not even say what model it holds.
    """
    own = found["model"]
    if not all(isinstance(v, torch_pickle.StoredTensor | np.ndarray) for v in own.values()):
        raise InputError(f"{path}: its 'model' holds more than tensors, expected a state dict")
    settings, where = _settings(path, found)
    tensors, copies = names.upgraded(own)
    facts = Facts(path, settings, tensors)
    model, chosen = _choose(facts, head)
    config, problems = _config(facts, model, chosen)
    problems += _encoder_problems(facts)
    state, others = {}, set()
    if config is not None:
        problems += _head_problems(facts, model, chosen)
        pairs = names.by_transformers_name(config, model, chosen)
        state = {theirs: tensors[ours] for theirs, ours in pairs.items() if ours in tensors}
        T, D = config.type_vocab_size, config.hidden_size
        state[hf_checkpoint.theirs(names.TOKEN_TYPE)] = np.zeros((T, D), tensors[names.WORD].dtype)
        tied = {names.OUTPUT} if config.tie_word_embeddings else set()
        beside = set(tensors) - set(pairs.values()) - tied - {names.VERSION}
        others = {name for name in beside if name.startswith((names.LM_HEAD, names.HEADS))}
        if unknown := beside - others:
            problems.append(f"unexpected {some(unknown)}: not part of this model")
    deepspeed = ", DeepSpeed's fused layers" if names.is_deepspeed(own) else ""
    return Checkpoint(
        form=f"fairseq checkpoint ({facts.arch or 'no arch'}, settings in {where}{deepspeed})",
        source=path,
        state=state,
        config=config,
        model=model,
        heads=tuple(facts.heads),
        norms=_norms(facts),
        dropped=_dropped(found, others, copies),
        remarks=_remarks(facts, config, chosen),
        problems=tuple(problems),
        original=float64.Original(
            own,
            float64.FAIRSEQ,
            H=facts["encoder_attention_heads"],
            eps=EPS,
            activation=facts["activation_fn"],
            head_activation=facts["activation_fn"],
            head=chosen,
        ),
    )


def _settings(path: Path, found: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The model's settings: `args` of old files, `cfg.model` of newer ones."""
    if isinstance(found.get("args"), dict):
        return found["args"], "args"
    cfg = found.get("cfg")
    if isinstance(cfg, dict) and isinstance(cfg.get("model"), dict):
        return cfg["model"], "cfg"
    raise InputError(
        f"{path}: neither args nor cfg.model say how many heads the model has or when it "
        "normalises, expected a checkpoint as fairseq's trainer writes it"
    )


def _choose(facts: Facts, head: str | None) -> tuple[str, str | None]:
    """The model of `params.MODELS` and the name of its classification head, if it has one."""
    heads = facts.heads
    if head is None:
        head = heads[0] if heads[:1] == ["masked_lm"] or len(heads) == 1 else "none"
    if head != "none" and head not in heads:
        raise InputError(
            f"{facts.path}: --head={head}, expected one of those it has: "
            + ", ".join([*heads, "none"])
        )
    if head in ("none", "masked_lm"):
        return ("encoder" if head == "none" else head), None
    return "sequence_classification", head


def _config(
    facts: Facts, model: str, head: str | None
) -> tuple[RobertaPreLayerNormConfig | None, list[str]]:
    """The config that shapes and settings say, or why there is none."""
    needed = [names.ENCODER + n for n in ("embed_tokens", "embed_positions", "layers.0.fc1")]
    if head is not None:
        needed += [f"{names.HEADS}{head}.{name}" for name in ("dense", "out_proj")]
    matrices = [facts.tensors.get(f"{name}.weight") for name in needed]
    lacking = [
        name
        for name, value in zip(needed, matrices, strict=True)
        if value is None or len(value.shape) != 2
    ]
    if lacking:
        spectral = " (spectral normalisation?)" if lacking[0].endswith("out_proj") else ""
        return None, [f"no matrix {lacking[0]}.weight{spectral}"]
    word, position, wi = matrices[:3]
    labels = {}
    if head is not None:
        labels = {"num_labels": matrices[4].shape[0], "classifier_dropout": facts["pooler_dropout"]}
    try:
        config = RobertaPreLayerNormConfig(
            vocab_size=word.shape[0],
            hidden_size=word.shape[1],
            num_hidden_layers=count_layers(facts.tensors, names.ENCODER + "layers."),
            num_attention_heads=facts["encoder_attention_heads"],
            intermediate_size=wi.shape[0],
            hidden_act=ACTIVATIONS.get(facts["activation_fn"], "gelu"),
            max_position_embeddings=position.shape[0],
            type_vocab_size=1,
            layer_norm_eps=EPS,
            tie_word_embeddings=not facts["untie_weights_roberta"],
            hidden_dropout_prob=facts["dropout"],
            attention_probs_dropout_prob=facts["attention_dropout"],
            **labels,
        )
    except InputError as error:
        return None, [str(error)]
    output = facts.tensors.get(names.OUTPUT)
    tied = model == "masked_lm" and config.tie_word_embeddings and output is not None
    if tied and not np.array_equal(np.asarray(output), np.asarray(word)):
        return config, [
            "contradictory: untie_weights_roberta is false, but lm_head.weight is not "
            "embed_tokens.weight"
        ]
    return config, []


def _encoder_problems(facts: Facts) -> list[str]:
    """What of the encoder is another function than this model's."""
    problems = []
    if facts.arch and "roberta" not in facts.arch and facts.arch not in _ARCHITECTURES:
        problems.append(f"arch {facts.arch!r}, expected one of RoBERTa's")
    before, final = facts["encoder_normalize_before"], _FINAL_NORM in facts
    if final and not before:
        problems.append(
            "contradictory: a final LayerNorm, but encoder_normalize_before is false, so that "
            "fairseq itself runs it as post-LN and refuses that norm"
        )
    elif not final:
        problems.append(
            "no final LayerNorm (encoder.sentence_encoder.layer_norm)"
            if before
            else "post-LN: trained without --encoder-normalize-before, it normalises after each "
            "sublayer, as plain RoBERTa does"
        )
    else:
        problems += _version_problems(facts)
    if names.ENCODER + "layernorm_embedding.weight" not in facts:
        problems.append(
            "no embedding LayerNorm (arch roberta_prenorm, or layernorm_embedding false): this "
            "model always has one, and no LayerNorm is the identity"
        )
    elif not facts["layernorm_embedding"]:
        problems.append("contradictory: an embedding LayerNorm, but layernorm_embedding is false")
    if facts["activation_fn"] not in ACTIVATIONS:
        problems.append(f"activation_fn={facts['activation_fn']!r}, which transformers lacks")
    return problems + [
        f"{name}={facts[name]!r}: {meaning}"
        for name, (expected, meaning) in _FIXED.items()
        if facts[name] != expected
    ]


def _version_problems(facts: Facts) -> list[str]:
    flag = facts.tensors.get(names.VERSION)
    version = np.asarray([1.0] if flag is None else flag, np.float64).reshape(-1)
    if version.size and version[0] >= 2:
        return []
    said = "no version flag" if flag is None else f"version flag {version[:1]}"
    return [
        f"{said} (encoder.sentence_encoder.version): below 2, fairseq drops the final LayerNorm "
        "while loading, so this is not the model it runs"
    ]


def _head_problems(facts: Facts, model: str, head: str | None) -> list[str]:
    problems = []
    if model == "masked_lm" and facts["activation_fn"] != "gelu":
        problems.append(
            f"activation_fn={facts['activation_fn']!r}: fairseq's LM head has it too, "
            "transformers' is always gelu (--head=none converts the encoder alone)"
        )
    if model == "sequence_classification":
        inner = facts.tensors[f"{names.HEADS}{head}.dense.weight"].shape[0]
        if inner != facts.tensors[names.WORD].shape[-1]:
            problems.append(
                f"classification head {head!r} is {inner} wide inside, expected the hidden size"
            )
        if facts["pooler_activation_fn"] != "tanh":
            problems.append(
                f"pooler_activation_fn={facts['pooler_activation_fn']!r}, expected 'tanh': "
                "transformers' classification head has no other"
            )
    return problems


def _norms(facts: Facts) -> str:
    def has(name: str) -> str:
        return "yes" if names.ENCODER + name in facts else "no"

    N = count_layers(facts.tensors, names.ENCODER + "layers.")
    each = sum(f"{names.ENCODER}layers.{n}.self_attn_layer_norm.weight" in facts for n in range(N))
    each += sum(f"{names.ENCODER}layers.{n}.final_layer_norm.weight" in facts for n in range(N))
    return (
        f"embedding {has('layernorm_embedding.weight')}, {each} in {N} layers "
        f"({'before' if facts['encoder_normalize_before'] else 'AFTER'} each sublayer), "
        f"final {has('layer_norm.weight')}"
    )


def _dropped(found: Mapping[str, Any], others: set[str], copies: Sequence[str]) -> tuple[str, ...]:
    dropped = []
    if others:
        stems = {".".join(name.split(".")[:2]) for name in others}
        dropped.append(f"other heads: {some(stems)}")
    if copies:
        dropped.append(
            f"{len(copies)} copies of weights that fairseq 0.12 makes for a fused kernel"
        )
    training = [key for key in ("last_optimizer_state", "optimizer", "criterion") if found.get(key)]
    if training:
        dropped.append(f"the training's {', '.join(training)}")
    return tuple(dropped)


def _remarks(
    facts: Facts, config: RobertaPreLayerNormConfig | None, head: str | None
) -> tuple[str, ...]:
    remarks = []
    if facts["activation_dropout"]:
        remarks.append(
            f"trained with activation_dropout={facts['activation_dropout']}: fine-tuning here has "
            "none; the function is the same"
        )
    if head is not None and config is not None:
        remarks.append(f"classification head {head!r} has {config.num_labels} labels, unnamed here")
    return tuple(remarks)

"""Writes a checkpoint that fairseq loads: `model.pt`, its dictionary and its BPE.

    RobertaModel.from_pretrained(directory, "model.pt", directory, bpe="gpt2",
        gpt2_encoder_json=directory + "/encoder.json", gpt2_vocab_bpe=directory + "/vocab.bpe")

fairseq has no token types. The row of type 0, which every token of a text has, is added to each
position embedding, so that all sums stay the same; other types are lost. If that row is zero, as in
every model that was read from fairseq, the round trip is exact.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bridges.formats.fairseq import tensor_names
from bridges.formats.fairseq.reader import ACTIVATIONS, LAYER_NORM_EPS
from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.data.tokenizer import MASK_TOKEN, SPECIAL_TOKENS
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write
from prelnroberta.pretrained import hf_checkpoint

if TYPE_CHECKING:
    import tokenizers

MODEL_NAME = "model.pt"
# The name in fairseq's own fine-tuning scripts.
HEAD_NAME = "sentence_classification_head"
# transformers' activation functions -> fairseq's names.
_ACTIVATIONS = {hf: own for own, hf in ACTIVATIONS.items() if own != "gelu_fast"} | {
    "swish": "swish",
    "gelu_pytorch_tanh": "gelu_accurate",
}


def save_checkpoint(
    directory: Path,
    params: parameters.Tree,
    config: RobertaPreLayerNormConfig,
    model: str,
    tokenizer: tokenizers.Tokenizer | None = None,
    dtype: str = "float32",
) -> None:
    """Writes `model.pt` and `dict.txt`, and with a tokenizer `encoder.json` and `vocab.bpe`.

    Args:
        dtype: of the weights: float32, float16 or bfloat16.

    Raises:
        InputError: one message listing everything that fairseq does not support; or torch is not
            installed.
    """
    if problems := _unsupported(config, model):
        raise InputError("fairseq cannot hold this model: " + "; ".join(problems))
    try:
        import torch
    except ImportError:
        raise InputError("writing fairseq's files needs torch: pip install torch") from None

    def to_torch(name: str, value: np.ndarray) -> torch.Tensor:
        # Through float32, because torch does not accept numpy's bfloat16.
        exact = np.array(hf_checkpoint.as_dtype(name, value, dtype), np.float32)
        return torch.from_numpy(exact).to(getattr(torch, dtype))

    arrays = to_state_dict(params, config, model)
    tensors = {name: to_torch(name, value) for name, value in arrays.items()}
    tensors.setdefault(tensor_names.LM_HEAD_WEIGHT, tensors[tensor_names.WORD_EMBEDDINGS])
    tensors[tensor_names.VERSION] = torch.tensor([3.0])
    checkpoint = {
        "args": argparse.Namespace(**_make_settings(config, model)),
        "model": tensors,
        "optimizer_history": [
            {
                "criterion_name": "MaskedLmLoss",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }
    with atomic_write(directory / MODEL_NAME) as partial:
        torch.save(checkpoint, partial)
    _write_dictionary(directory, config.vocab_size, tokenizer)


def to_state_dict(
    params: parameters.Tree, config: RobertaPreLayerNormConfig, model: str
) -> dict[str, np.ndarray]:
    """Returns float32 tensors by fairseq's names, with token type 0 folded into the positions."""
    hf_tensors = hf_checkpoint.to_state_dict(params, config, model)
    names = tensor_names.transformers_to_fairseq(config, model, HEAD_NAME)
    tensors = {fairseq_name: hf_tensors[hf_name] for hf_name, fairseq_name in names.items()}
    prefix = "" if model == "encoder" else hf_checkpoint.BASE_PREFIX
    type_embeddings = hf_tensors[prefix + hf_checkpoint.MODULE_NAMES[tensor_names.TOKEN_TYPE]]
    if type_embeddings[0].any():
        position = tensor_names.ENCODER + "embed_positions.weight"
        tensors[position] = tensors[position] + type_embeddings[0]
    if model == "sequence_classification":
        # fairseq's model always has an LM head.
        V, D = config.vocab_size, config.hidden_size
        tensors |= {
            tensor_names.LM_HEAD + "dense.weight": np.zeros((D, D), np.float32),
            tensor_names.LM_HEAD + "dense.bias": np.zeros(D, np.float32),
            tensor_names.LM_HEAD + "layer_norm.weight": np.ones(D, np.float32),
            tensor_names.LM_HEAD + "layer_norm.bias": np.zeros(D, np.float32),
            tensor_names.LM_HEAD + "bias": np.zeros(V, np.float32),
        }
    return tensors


def conversion_notes(
    params: parameters.Tree, config: RobertaPreLayerNormConfig, model: str
) -> list[str]:
    """Describes what differs between the model and its fairseq checkpoint."""
    notes = []
    types = np.asarray(params["embeddings"]["token_type"])
    if types[0].any():
        notes.append("the row of token type 0 is added to every position")
    if len(types) > 1:
        notes.append(f"token types 1 to {len(types) - 1} are dropped: fairseq has none")
    if model == "sequence_classification":
        notes.append(
            f"the head is called {HEAD_NAME}; the LM head, which fairseq always has, is zeros"
        )
    return notes


def _unsupported(config: RobertaPreLayerNormConfig, model: str) -> list[str]:
    """What fairseq cannot represent."""
    problems = []
    if model not in ("masked_lm", "sequence_classification"):
        problems.append(f"a {model} model; it has only masked_lm and sequence_classification")
    if config.is_decoder:
        problems.append("is_decoder=True; its RoBERTa is an encoder")
    if config.layer_norm_eps != LAYER_NORM_EPS:
        problems.append(f"layer_norm_eps={config.layer_norm_eps}; its own is {LAYER_NORM_EPS}")
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    problems += [
        f"{name}={getattr(config, name)}; its own is {value}"
        for name, value in ids.items()
        if getattr(config, name) != value
    ]
    if config.hidden_act not in _ACTIVATIONS:
        problems.append(f"hidden_act={config.hidden_act!r}; it has {', '.join(_ACTIVATIONS)}")
    elif model == "masked_lm" and config.hidden_act != "gelu":
        problems.append(
            f"hidden_act={config.hidden_act!r}; its LM head would use it too, ours is always gelu"
        )
    return problems


def _make_settings(config: RobertaPreLayerNormConfig, model: str) -> dict[str, Any]:
    """The arguments of a fairseq training that makes such a model."""
    head_dropout = config.classifier_dropout
    return {
        "arch": "roberta_base",
        "task": "masked_lm",
        "criterion": "masked_lm",
        "data": ".",
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "encoder_normalize_before": True,
        "layernorm_embedding": True,
        "encoder_learned_pos": True,
        "no_scale_embedding": True,
        "no_token_positional_embeddings": False,
        "activation_fn": _ACTIVATIONS[config.hidden_act],
        "pooler_activation_fn": "tanh",
        "untie_weights_roberta": model == "masked_lm" and not config.tie_word_embeddings,
        "max_positions": config.max_length,
        "tokens_per_sample": config.max_length,
        "dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob,
        "activation_dropout": 0.0,
        "pooler_dropout": config.hidden_dropout_prob if head_dropout is None else head_dropout,
        "mask_prob": 0.15,
        "leave_unmasked_prob": 0.1,
        "random_token_prob": 0.1,
        "sample_break_mode": "none",
        "seed": 1,
        # fairseq 0.12 takes absent ones as true.
        "fp16": False,
        "memory_efficient_fp16": False,
        "tpu": False,
    }


def _write_dictionary(directory: Path, V: int, tokenizer: tokenizers.Tokenizer | None) -> None:
    """dict.txt has a line for each id from 4 on, except a last `<mask>`, which the task adds."""
    pieces = {} if tokenizer is None else {i: p for p, i in tokenizer.get_vocab().items()}
    first = len(SPECIAL_TOKENS)
    symbols = []
    for i in range(first, V):
        piece = pieces.get(i, MASK_TOKEN if i == V - 1 and not pieces else f"madeupword{i:04}")
        symbols.append(str(i - first) if _is_bpe_piece(piece) else piece)
    if symbols[-1] == MASK_TOKEN:
        symbols.pop()
    lines = "".join(f"{symbol} 1\n" for symbol in symbols)
    with atomic_write(directory / "dict.txt") as partial:
        partial.write_text(lines, encoding="utf-8")
    if tokenizer is not None:
        _write_bpe(directory, tokenizer, pieces)


def _write_bpe(directory: Path, tokenizer: tokenizers.Tokenizer, pieces: dict[int, str]) -> None:
    """Writes encoder.json and vocab.bpe, as GPT-2's."""
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    first = len(SPECIAL_TOKENS)
    encoder = {
        piece: i - first
        for i, piece in sorted(pieces.items())
        if i >= first and _is_bpe_piece(piece)
    }
    with atomic_write(directory / "encoder.json") as partial:
        partial.write_text(json.dumps(encoder) + "\n", encoding="utf-8")
    with atomic_write(directory / "vocab.bpe") as partial:
        partial.write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _is_bpe_piece(piece: str) -> bool:
    return piece != MASK_TOKEN and not piece.startswith("madeupword")

"""Tensor names of fairseq: the current ones, their transformers equivalents, and older ones.

The current names are those of fairseq/models/roberta/model.py and
models/transformer/transformer_encoder.py. Older names are upgraded as fairseq does when it loads
them (`upgrade_state_dict_named` in those files and in modules/multihead_attention.py), DeepSpeed's
fused layers as princeton-nlp/DinkyTrain's scripts/convert_dsfs_ckpt_to_fs_ckpt.py does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.pretrained import hf_checkpoint

ENCODER = "encoder.sentence_encoder."
LM_HEAD = "encoder.lm_head."
CLASSIFICATION_HEADS = "classification_heads."
VERSION = ENCODER + "version"
LM_HEAD_WEIGHT = LM_HEAD + "weight"
WORD_EMBEDDINGS = ENCODER + "embed_tokens.weight"

# Path of a module or leaf in the parameter tree -> fairseq's name. {n} is the layer, {head} the
# name of a classification head.
MODULE_NAMES = {
    "embeddings/word": WORD_EMBEDDINGS,
    "embeddings/position": ENCODER + "embed_positions.weight",
    "embeddings/norm": ENCODER + "layernorm_embedding",
    "encoder/layers/attention_norm": ENCODER + "layers.{n}.self_attn_layer_norm",
    "encoder/layers/attention/query": ENCODER + "layers.{n}.self_attn.q_proj",
    "encoder/layers/attention/key": ENCODER + "layers.{n}.self_attn.k_proj",
    "encoder/layers/attention/value": ENCODER + "layers.{n}.self_attn.v_proj",
    "encoder/layers/attention/output": ENCODER + "layers.{n}.self_attn.out_proj",
    "encoder/layers/mlp_norm": ENCODER + "layers.{n}.final_layer_norm",
    "encoder/layers/mlp/wi": ENCODER + "layers.{n}.fc1",
    "encoder/layers/mlp/wo": ENCODER + "layers.{n}.fc2",
    "encoder/final_norm": ENCODER + "layer_norm",
    "lm_head/dense": LM_HEAD + "dense",
    "lm_head/norm": LM_HEAD + "layer_norm",
    "lm_head/bias": LM_HEAD + "bias",
    "lm_head/decoder": LM_HEAD_WEIGHT,
    "classifier/dense": CLASSIFICATION_HEADS + "{head}.dense",
    "classifier/output": CLASSIFICATION_HEADS + "{head}.out_proj",
}
# Absent in fairseq: reading fills it with zeros, writing adds the row of type 0 to each position.
TOKEN_TYPE = "embeddings/token_type"

_LAYER = r"(?P<layer>.*\.layers\.\d+\.)"
_RENAMES = (
    (r"^decoder\.", "encoder."),
    (r"\.emb_layer_norm\.", ".layernorm_embedding."),
    (r"\.layer_norms\.0\.", ".self_attn_layer_norm."),
    (r"\.layer_norms\.1\.", ".final_layer_norm."),
    # DeepSpeed's "attn" norm comes after attention, before the MLP.
    (_LAYER + r"norm_(w|b)$", r"\g<layer>self_attn_layer_norm.\2"),
    (_LAYER + r"attn_n(w|b)$", r"\g<layer>final_layer_norm.\2"),
    (_LAYER + r"attn_qkv(w|b)$", r"\g<layer>self_attn.in_proj_\2"),
    (_LAYER + r"attn_o(w|b)$", r"\g<layer>self_attn.out_proj.\2"),
    (_LAYER + r"inter_(w|b)$", r"\g<layer>fc1.\2"),
    (_LAYER + r"output_(w|b)$", r"\g<layer>fc2.\2"),
    (r"(?<=[._])w$", "weight"),
    (r"(?<=[._])b$", "bias"),
)
_DEEPSPEED = re.compile(r"\.layers\.\d+\.attn_qkvw$")
_PACKED = re.compile(r"(?P<layer>.*\.layers\.\d+\.self_attn\.)in_proj_(?P<leaf>weight|bias)$")
# Since 0.12 each layer has copies of its weights for a fused kernel, which loading recreates.
_COPY = re.compile(r"\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$")


def is_deepspeed(names: Mapping[str, Any]) -> bool:
    return any(map(_DEEPSPEED.search, names))


def upgrade_names(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the tensors under current names, and the names of the copies that were left out."""
    upgraded, copies = {}, []
    for name, value in tensors.items():
        if _COPY.search(name):
            copies.append(name)
            continue
        for old, new in _RENAMES:
            name = re.sub(old, new, name)
        packed = _PACKED.match(name)
        if packed and value.shape and value.shape[0] % 3 == 0:
            thirds = np.split(np.asarray(value), 3)
            for letter, third in zip("qkv", thirds, strict=True):
                upgraded[f"{packed['layer']}{letter}_proj.{packed['leaf']}"] = third
        else:
            upgraded[name] = value
    return upgraded, copies


def transformers_to_fairseq(
    config: RobertaPreLayerNormConfig, model: str, head: str | None = None
) -> dict[str, str]:
    """Maps transformers' names to fairseq's, for all tensors of a model except token types."""
    names = {}
    for path, row in parameters.table(config, model).items():
        if path == TOKEN_TYPE:
            continue
        hf_name = hf_checkpoint.hf_name(path)
        module, leaf = path.rpartition("/")[0], hf_name.rpartition(".")[2]
        fairseq_name = MODULE_NAMES.get(path) or f"{MODULE_NAMES[module]}.{leaf}"
        for n in range(config.num_hidden_layers) if row.is_stacked else (None,):
            names[hf_name.format(n=n)] = fairseq_name.format(n=n, head=head)
    return names

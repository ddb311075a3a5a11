"""fairseq's names of tensors: today's, beside transformers', and how older ones become today's.

Today's are those of fairseq/models/roberta/model.py over models/transformer/transformer_encoder.py.
Older forms are upgraded as fairseq does it while loading (`upgrade_state_dict_named` in those
files and in modules/multihead_attention.py), DeepSpeed's fused layers as
princeton-nlp/DinkyTrain's scripts/convert_dsfs_ckpt_to_fs_ckpt.py does.
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
HEADS = "classification_heads."
VERSION = ENCODER + "version"
OUTPUT = LM_HEAD + "weight"
WORD = ENCODER + "embed_tokens.weight"

# Our module (or leaf) -> theirs. {n} is the layer, {head} the name of a classification head.
NAMES = {
    "embeddings/word": WORD,
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
    "lm_head/decoder": OUTPUT,
    "classifier/dense": HEADS + "{head}.dense",
    "classifier/output": HEADS + "{head}.out_proj",
}
# fairseq has no token types: the row of type 0 is zeros there, or part of each position.
TOKEN_TYPE = "embeddings/token_type"

_LAYER = r"(?P<layer>.*\.layers\.\d+\.)"
_RENAMED = (
    (r"^decoder\.", "encoder."),
    (r"\.emb_layer_norm\.", ".layernorm_embedding."),
    (r"\.layer_norms\.0\.", ".self_attn_layer_norm."),
    (r"\.layer_norms\.1\.", ".final_layer_norm."),
    # DeepSpeed's "attn" norm stands after attention, before the MLP.
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
# Since 0.12 each layer has copies of its weights for a fused kernel; loading makes them anew.
_COPY = re.compile(r"\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$")


def is_deepspeed(names: Mapping[str, Any]) -> bool:
    return any(map(_DEEPSPEED.search, names))


def upgraded(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The state dict by today's names, and the names of copies that were left out."""
    found, copies = {}, []
    for name, value in tensors.items():
        if _COPY.search(name):
            copies.append(name)
            continue
        for old, new in _RENAMED:
            name = re.sub(old, new, name)
        packed = _PACKED.match(name)
        if packed and value.shape and value.shape[0] % 3 == 0:
            thirds = np.split(np.asarray(value), 3)
            for letter, third in zip("qkv", thirds, strict=True):
                found[f"{packed['layer']}{letter}_proj.{packed['leaf']}"] = third
        else:
            found[name] = value
    return found, copies


def by_transformers_name(
    config: RobertaPreLayerNormConfig, model: str, head: str | None = None
) -> dict[str, str]:
    """Each tensor of a model but the token types: transformers' name -> fairseq's."""
    pairs = {}
    for path, row in parameters.table(config, model).items():
        if path == TOKEN_TYPE:
            continue
        theirs = hf_checkpoint.theirs(path)
        ours = NAMES.get(path) or f"{NAMES[path.rpartition('/')[0]]}.{theirs.rpartition('.')[2]}"
        for n in range(config.num_hidden_layers) if row.stacked else (None,):
            pairs[theirs.format(n=n)] = ours.format(n=n, head=head)
    return pairs

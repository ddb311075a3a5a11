"""The model in float64 numpy, over a checkpoint's own names: what a conversion is held to.

Written from the descriptions of fairseq's encoder (fairseq/models/transformer/
transformer_encoder.py and modules/transformer_layer.py with normalize_before) and of transformers'
`modeling_roberta_prelayernorm.py`, and sharing nothing with the conversion: neither its name table,
nor its transposes, nor jax.

    B batch  L length  D hidden  H heads  K head dim  F mlp  V vocab
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray

# Where a tensor may be in a file, most recent first. {n} is the layer, {weight} is weight or bias,
# {w} is w or b, {head} the name of a classification head.
FAIRSEQ = {
    "word": ("encoder.sentence_encoder.embed_tokens.weight",),
    "position": ("encoder.sentence_encoder.embed_positions.weight",),
    "embedding_norm": (
        "encoder.sentence_encoder.layernorm_embedding.{weight}",
        "encoder.sentence_encoder.emb_layer_norm.{weight}",
    ),
    "attention_norm": (
        "encoder.sentence_encoder.layers.{n}.self_attn_layer_norm.{weight}",
        "encoder.sentence_encoder.layers.{n}.layer_norms.0.{weight}",
        "encoder.sentence_encoder.layers.{n}.norm_{w}",
    ),
    "qkv": (
        "encoder.sentence_encoder.layers.{n}.self_attn.in_proj_{weight}",
        "encoder.sentence_encoder.layers.{n}.attn_qkv{w}",
    ),
    "q": ("encoder.sentence_encoder.layers.{n}.self_attn.q_proj.{weight}",),
    "k": ("encoder.sentence_encoder.layers.{n}.self_attn.k_proj.{weight}",),
    "v": ("encoder.sentence_encoder.layers.{n}.self_attn.v_proj.{weight}",),
    "attention_output": (
        "encoder.sentence_encoder.layers.{n}.self_attn.out_proj.{weight}",
        "encoder.sentence_encoder.layers.{n}.attn_o{w}",
    ),
    "mlp_norm": (
        "encoder.sentence_encoder.layers.{n}.final_layer_norm.{weight}",
        "encoder.sentence_encoder.layers.{n}.layer_norms.1.{weight}",
        "encoder.sentence_encoder.layers.{n}.attn_n{w}",
    ),
    "mlp_input": (
        "encoder.sentence_encoder.layers.{n}.fc1.{weight}",
        "encoder.sentence_encoder.layers.{n}.inter_{w}",
    ),
    "mlp_output": (
        "encoder.sentence_encoder.layers.{n}.fc2.{weight}",
        "encoder.sentence_encoder.layers.{n}.output_{w}",
    ),
    "final_norm": ("encoder.sentence_encoder.layer_norm.{weight}",),
    "lm_dense": ("encoder.lm_head.dense.{weight}",),
    "lm_norm": ("encoder.lm_head.layer_norm.{weight}",),
    "lm_output": ("encoder.lm_head.weight",),
    "lm_bias": ("encoder.lm_head.bias",),
    "classifier_dense": ("classification_heads.{head}.dense.{weight}",),
    "classifier_output": ("classification_heads.{head}.out_proj.{weight}",),
}
TRANSFORMERS = {
    "word": ("embeddings.word_embeddings.weight",),
    "position": ("embeddings.position_embeddings.weight",),
    "token_type": ("embeddings.token_type_embeddings.weight",),
    "embedding_norm": ("embeddings.LayerNorm.{weight}",),
    "attention_norm": ("encoder.layer.{n}.attention.LayerNorm.{weight}",),
    "q": ("encoder.layer.{n}.attention.self.query.{weight}",),
    "k": ("encoder.layer.{n}.attention.self.key.{weight}",),
    "v": ("encoder.layer.{n}.attention.self.value.{weight}",),
    "attention_output": ("encoder.layer.{n}.attention.output.dense.{weight}",),
    "mlp_norm": ("encoder.layer.{n}.intermediate.LayerNorm.{weight}",),
    "mlp_input": ("encoder.layer.{n}.intermediate.dense.{weight}",),
    "mlp_output": ("encoder.layer.{n}.output.dense.{weight}",),
    "final_norm": ("LayerNorm.{weight}",),
    "pooler": ("pooler.dense.{weight}",),
    "lm_dense": ("lm_head.dense.{weight}",),
    "lm_norm": ("lm_head.layer_norm.{weight}",),
    "lm_output": ("lm_head.decoder.weight",),
    "lm_bias": ("lm_head.decoder.bias", "lm_head.bias"),
    "classifier_dense": ("classifier.dense.{weight}",),
    "classifier_output": ("classifier.out_proj.{weight}", "classifier.{weight}"),
    "span": ("qa_outputs.{weight}",),
}
_PREFIXES = ("", "roberta_prelayernorm.", "roberta.")


def _gelu(x: Array) -> Array:
    from scipy.special import erf

    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": _silu,
    "swish": _silu,
    "tanh": np.tanh,
}


@dataclasses.dataclass(frozen=True)
class Original:
    """A model as its file has it.

    Attributes:
        tensors: by the file's own names; anything numpy can read.
        names: FAIRSEQ or TRANSFORMERS.
        H: heads.
        eps: of every norm.
        activation: of the MLP, by the file's name for it.
        head_activation: of the LM head.
        pad: the id of padding.
        causal: whether no token sees a later one.
        head: which classification head.
    """

    tensors: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]]
    H: int
    eps: float
    activation: str
    head_activation: str = "gelu"
    pad: int = 1
    causal: bool = False
    head: str | None = None

    def __call__(self, model: str, ids: Array) -> Array:
        """What a model of `params.MODELS` gives for ids [B, L], in float64.

        Logits [B, L, V], [B, L, C] (token classes, spans), [B, C] or [B, 1] (a choice's score),
        the pooled [B, D] of `base`, the hidden states [B, L, D] of `encoder`.
        """
        hidden = self.encode(ids)
        if model in ("masked_lm", "causal_lm"):
            return self.vocabulary(hidden)
        if model == "encoder":
            return hidden
        if model == "question_answering":
            return self.dense("span", hidden)
        if model == "token_classification":
            return self.dense("classifier_output", hidden)
        first = hidden[:, 0]
        if model == "sequence_classification":
            return self.dense("classifier_output", np.tanh(self.dense("classifier_dense", first)))
        pooled = np.tanh(self.dense("pooler", first))
        return pooled if model == "base" else self.dense("classifier_output", pooled)

    def encode(self, ids: Array) -> Array:
        """ids [B, L] -> [B, L, D], after the final norm."""
        real = ids != self.pad
        positions = np.cumsum(real, axis=-1) * real + self.pad
        x = self.rows("word", ids) + self.rows("position", positions)
        if self.find("token_type") is not None:
            x = x + self.rows("token_type", np.zeros_like(ids))
        x = self.norm("embedding_norm", x)
        visible = np.broadcast_to(real[:, None, None, :], (*real.shape[:1], 1, *2 * ids.shape[1:]))
        if self.causal:
            visible = visible & np.tri(ids.shape[1], dtype=bool)
        n = 0
        while self.find("mlp_input", n=n) is not None:
            x = x + self.attend(n, self.norm("attention_norm", x, n), visible)
            inner = self.dense("mlp_input", self.norm("mlp_norm", x, n), n)
            x = x + self.dense("mlp_output", ACTIVATIONS[self.activation](inner), n)
            n += 1
        return self.norm("final_norm", x)

    def attend(self, n: int, x: Array, visible: Array) -> Array:
        """x [B, L, D], visible [B, 1, L, L] -> [B, L, D]."""
        B, L, D = x.shape
        if self.find("qkv", n=n) is not None:
            parts = np.split(self.dense("qkv", x, n), 3, axis=-1)
        else:
            parts = [self.dense(name, x, n) for name in "qkv"]
        q, k, v = (part.reshape(B, L, self.H, -1).swapaxes(1, 2) for part in parts)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(D / self.H)
        scores = np.where(visible, scores, -1e300)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        return self.dense("attention_output", mixed.swapaxes(1, 2).reshape(B, L, D), n)

    def vocabulary(self, hidden: Array) -> Array:
        x = ACTIVATIONS[self.head_activation](self.dense("lm_dense", hidden))
        x = self.norm("lm_norm", x)
        table = self.find("lm_output")
        table = np.asarray(self.find("word") if table is None else table)
        # In slices: a whole vocabulary in float64 is 400 MB.
        slices = [x @ np.float64(table[i : i + 4096]).T for i in range(0, len(table), 4096)]
        return np.concatenate(slices, axis=-1) + self.array("lm_bias")

    def norm(self, where: str, x: Array, n: int | None = None) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + self.eps)
        return centred / scale * self.array(where, "weight", n) + self.array(where, "bias", n)

    def dense(self, where: str, x: Array, n: int | None = None) -> Array:
        return x @ self.array(where, "weight", n).T + self.array(where, "bias", n)

    def rows(self, where: str, ids: Array) -> Array:
        return np.float64(np.asarray(self.find(where))[ids])

    def array(self, where: str, leaf: str = "weight", n: int | None = None) -> Array:
        found = self.find(where, leaf, n)
        if found is None:
            raise KeyError(f"{where} {leaf} of layer {n}")
        return np.asarray(found).astype(np.float64)

    def find(self, where: str, leaf: str = "weight", n: int | None = None) -> Any:
        """The tensor under the first of its possible names that the file has, or None."""
        for template in self.names.get(where, ()):
            name = template.format(n=n, weight=leaf, w=leaf[0], head=self.head)
            for candidate in self.spellings(name):
                if candidate in self.tensors:
                    return self.tensors[candidate]
        return None

    def spellings(self, name: str) -> list[str]:
        if self.names is FAIRSEQ:
            return [name, name.replace("encoder.", "decoder.", 1)]
        return [prefix + name for prefix in _PREFIXES]

"""The model in float64 numpy, on a checkpoint's own tensor names: the reference for conversions.

Written after fairseq's encoder (fairseq/models/transformer/transformer_encoder.py and
modules/transformer_layer.py with normalize_before) and transformers'
`modeling_roberta_prelayernorm.py`. It shares nothing with the conversion: no name table, no
transposes, no jax.

    B batch  L length  D hidden  H heads  K head dim  F mlp  V vocab
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bridges.formats.foreign_checkpoint import OriginalModel

Array = np.ndarray

# Module -> its possible names in a file, most recent first. {n} is the layer, {weight} is weight or
# bias, {w} is w or b, {head} the name of a classification head.
_FAIRSEQ_NAMES = {
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
_TRANSFORMERS_NAMES = {
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
NAMES = {"fairseq": _FAIRSEQ_NAMES, "transformers": _TRANSFORMERS_NAMES}
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


class Float64Reference:
    """Runs the model of a checkpoint in float64, from the file's own tensors."""

    def __init__(self, model: OriginalModel):
        self.model = model
        self.names = NAMES[model.naming]

    def __call__(self, model: str, ids: Array) -> Array:
        """Runs one model of `params.MODELS` on ids [B, L].

        Returns:
            Logits [B, L, V], [B, L, C] (token classes, spans), [B, C] or [B, 1] (a choice's score);
            for "base" the pooled output [B, D], for "encoder" the hidden states [B, L, D].
        """
        hidden = self.encode(ids)
        if model in ("masked_lm", "causal_lm"):
            return self.lm_head(hidden)
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
        """ids [B, L] -> hidden states [B, L, D], after the final norm."""
        mask = ids != self.model.pad_token_id
        positions = np.cumsum(mask, axis=-1) * mask + self.model.pad_token_id
        x = self.embed("word", ids) + self.embed("position", positions)
        if self.find("token_type") is not None:
            x = x + self.embed("token_type", np.zeros_like(ids))
        x = self.norm("embedding_norm", x)
        visible = np.broadcast_to(mask[:, None, None, :], (*mask.shape[:1], 1, *2 * ids.shape[1:]))
        if self.model.is_causal:
            visible = visible & np.tri(ids.shape[1], dtype=bool)
        activation = ACTIVATIONS[self.model.hidden_act]
        n = 0
        while self.find("mlp_input", n=n) is not None:
            x = x + self.attention(n, self.norm("attention_norm", x, n), visible)
            inner = self.dense("mlp_input", self.norm("mlp_norm", x, n), n)
            x = x + self.dense("mlp_output", activation(inner), n)
            n += 1
        return self.norm("final_norm", x)

    def attention(self, n: int, x: Array, visible: Array) -> Array:
        """x [B, L, D], visible [B, 1, L, L] -> [B, L, D]."""
        B, L, D = x.shape
        H = self.model.num_heads
        if self.find("qkv", n=n) is not None:
            projections = np.split(self.dense("qkv", x, n), 3, axis=-1)
        else:
            projections = [self.dense(name, x, n) for name in "qkv"]
        q, k, v = (p.reshape(B, L, H, -1).swapaxes(1, 2) for p in projections)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(D / H)
        scores = np.where(visible, scores, -1e300)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        context = weights / weights.sum(-1, keepdims=True) @ v
        return self.dense("attention_output", context.swapaxes(1, 2).reshape(B, L, D), n)

    def lm_head(self, hidden: Array) -> Array:
        """hidden [B, L, D] -> logits [B, L, V]."""
        x = ACTIVATIONS[self.model.lm_head_act](self.dense("lm_dense", hidden))
        x = self.norm("lm_norm", x)
        table = self.find("lm_output")
        table = np.asarray(self.find("word") if table is None else table)
        # In slices, because a whole vocabulary in float64 takes 400 MB.
        slices = [x @ np.float64(table[i : i + 4096]).T for i in range(0, len(table), 4096)]
        return np.concatenate(slices, axis=-1) + self.tensor("lm_bias")

    def norm(self, module: str, x: Array, n: int | None = None) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + self.model.layer_norm_eps)
        return centred / scale * self.tensor(module, "weight", n) + self.tensor(module, "bias", n)

    def dense(self, module: str, x: Array, n: int | None = None) -> Array:
        return x @ self.tensor(module, "weight", n).T + self.tensor(module, "bias", n)

    def embed(self, module: str, ids: Array) -> Array:
        return np.float64(np.asarray(self.find(module))[ids])

    def tensor(self, module: str, leaf: str = "weight", n: int | None = None) -> Array:
        """A tensor in float64."""
        found = self.find(module, leaf, n)
        if found is None:
            raise KeyError(f"{module} {leaf} of layer {n}")
        return np.asarray(found).astype(np.float64)

    def find(self, module: str, leaf: str = "weight", n: int | None = None) -> Any:
        """The tensor under the first of its possible names that the file has, or None."""
        for template in self.names.get(module, ()):
            name = template.format(n=n, weight=leaf, w=leaf[0], head=self.model.head)
            for candidate in self.with_prefixes(name):
                if candidate in self.model.tensors:
                    return self.model.tensors[candidate]
        return None

    def with_prefixes(self, name: str) -> list[str]:
        if self.model.naming == "fairseq":
            return [name, name.replace("encoder.", "decoder.", 1)]
        return [prefix + name for prefix in _PREFIXES]

"""RoBERTa-PreLayerNorm's encoder: Embeddings -> Attention -> Mlp -> Block -> Encoder.

Each part is a pure function of its own sub-tree of parameters (`params.py` declares them) and is
read top to bottom; `Encoder` is the Linen module around them, with the usual `init` and `apply`.
Because a layer is a plain function of a plain dict, running layers unrolled, scanned or
rematerialised, or the last one at a few positions only, is ordinary jax over one tree.

Computes what transformers' `modeling_roberta_prelayernorm.py` does (both its torch and its last
Flax version), which on real tokens is fairseq's RoBERTa with `--encoder-normalize-before`.

    B batch  L length  D hidden  H heads  K head dim  F mlp  N layers  V vocab  M read positions
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig

Array = jax.Array

# gelu is the exact erf form, as in every reference; jax's default is the tanh approximation.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the function is computed; never what it computes.

    Attributes:
        dtype: of activations and matrix products: float32 or bfloat16. Parameters stay float32;
            softmax, norms and losses are computed in float32 always.
        scan_layers: one compiled block looped over N. None: unrolled on CPU, where the loop
            costs 11 to 16 % of the step, unless layers are rematerialised; scanned elsewhere.
        remat: what the backward pass computes again instead of storing it: nothing, everything
            but matrix products, or whole blocks.
    """

    dtype: Any = jnp.float32
    scan_layers: bool | None = None
    remat: Literal["none", "dots", "full"] = "none"

    @property
    def scans(self) -> bool:
        if self.scan_layers is not None:
            return self.scan_layers
        return self.remat != "none" or jax.default_backend() != "cpu"


@flax.struct.dataclass
class EncoderOutput:
    """What the encoder returns.

    Attributes:
        last_hidden_state: [B, L, D], after the final norm; [B, M, D] where `read_positions` chose.
        residuals: tuple of N + 1 arrays [B, L, D]: the normed embeddings and the residual stream
            after each block, before the final norm. None unless asked for.
    """

    last_hidden_state: Array
    residuals: tuple[Array, ...] | None = None


def default_position_ids(input_ids: Array, pad_token_id: int) -> Array:
    """Positions by counting real tokens: pad + 1, pad + 2, ...; pads get pad. [B, L] int32.

    The rule reads ids, not the attention mask, and works for padding on either side or amid
    (fairseq/utils.py make_positions; transformers create_position_ids_from_input_ids).
    """
    real = (input_ids != pad_token_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=-1) * real + pad_token_id


def visibility(
    attention_mask: Array | None = None, segment_ids: Array | None = None
) -> Array | None:
    """Which keys each query may see: bool, [B, 1, L] or [B, L, L]; None means all.

    Args:
        attention_mask: [B, L] over keys or [B, L, L] over queries and keys; nonzero is visible.
        segment_ids: [B, L] int. Tokens see their own segment only. 0 is padding, a segment of
            its own, so that no row of attention is ever empty.
    """
    visible = None
    if attention_mask is not None:
        visible = attention_mask != 0
        if visible.ndim == 2:
            visible = visible[:, None, :]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        visible = same if visible is None else visible & same
    return visible


def layer_norm(p: dict, x: Array, epsilon: float) -> Array:
    """Normalises the last axis; statistics in float32 by two passes, result in x's dtype.

    E[x^2] - E[x]^2 in one pass, Flax's default, is off by 1.7e-3 for rows of mean 100, std 1.
    """
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon)
    return (normed * p["scale"] + p["bias"]).astype(x.dtype)


def project(p: dict, equation: str, x: Array) -> Array:
    """einsum with the kernel, in x's dtype, and the bias."""
    return jnp.einsum(equation, x, p["kernel"].astype(x.dtype)) + p["bias"].astype(x.dtype)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout; the identity without a key. Every element draws its own bit."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def take_positions(x: Array, positions: Array) -> Array:
    """Gathers [B, L, ...] at [B, M] -> [B, M, ...], row by row.

    A gather over the flattened batch would make sharded programs collect the whole batch.
    """
    index = positions.reshape(positions.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def embeddings(
    p: dict,
    config: RobertaPreLayerNormConfig,
    dtype: Any,
    input_ids: Array,
    token_type_ids: Array | None,
    position_ids: Array | None,
    key: Array | None,
) -> Array:
    """Word + type + position, normed, dropped out: [B, L] ids -> [B, L, D]."""
    if position_ids is None:
        position_ids = default_position_ids(input_ids, config.pad_token_id)
    x = p["word"][input_ids]
    x = x + (p["token_type"][0] if token_type_ids is None else p["token_type"][token_type_ids])
    x = x + p["position"][position_ids]
    x = layer_norm(p["norm"], x, config.layer_norm_eps).astype(dtype)
    return dropout(x, config.hidden_dropout_prob, key)


def attention(
    p: dict,
    config: RobertaPreLayerNormConfig,
    queries: Array,
    keys: Array,
    visible: Array | None,
    key: Array | None,
) -> Array:
    """Multi-head attention of queries [B, M, D] over keys [B, L, D] -> [B, M, D].

    Softmax in float32. A query that may see nothing attends evenly to everything: finite, and
    the same as transformers' torch and Flax classes give.
    """
    q = project(p["query"], "bmd,dhk->bmhk", queries)
    k = project(p["key"], "bld,dhk->blhk", keys)
    v = project(p["value"], "bld,dhk->blhk", keys)
    q = q * config.head_dim**-0.5
    scores = jnp.einsum("bmhk,blhk->bhml", q, k, preferred_element_type=jnp.float32)
    if visible is not None:
        scores = jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
    probabilities = dropout(probabilities, config.attention_probs_dropout_prob, key)
    mixed = jnp.einsum("bhml,blhk->bmhk", probabilities, v)
    return project(p["output"], "bmhk,hkd->bmd", mixed)


def mlp(p: dict, config: RobertaPreLayerNormConfig, x: Array) -> Array:
    """[B, L, D] -> [B, L, F] -> [B, L, D]; no dropout in between."""
    wide = ACTIVATIONS[config.hidden_act](project(p["wi"], "bld,df->blf", x))
    return project(p["wo"], "blf,fd->bld", wide)


def block(
    p: dict,
    config: RobertaPreLayerNormConfig,
    x: Array,
    visible: Array | None = None,
    key: Array | None = None,
    read_positions: Array | None = None,
) -> Array:
    """One layer, norm-and-add: [B, L, D] -> [B, L, D], or [B, M, D] at `read_positions`.

    Args:
        p: one layer's parameters, without the N axis.
        visible: from `visibility`.
        key: for dropout; None turns it off.
        read_positions: [B, M]. Queries, output and MLP are computed there alone: exact, because
            after its keys and values a block works on each position by itself.
    """
    k_probabilities, k_attention, k_mlp = (None,) * 3 if key is None else jax.random.split(key, 3)
    eps, rate = config.layer_norm_eps, config.hidden_dropout_prob

    keys = layer_norm(p["attention_norm"], x, eps)
    queries = keys
    if read_positions is not None:
        queries, x = take_positions(keys, read_positions), take_positions(x, read_positions)
        if visible is not None and visible.shape[1] > 1:
            visible = take_positions(visible, read_positions)
    mixed = attention(p["attention"], config, queries, keys, visible, k_probabilities)
    x = x + dropout(mixed, rate, k_attention)

    normed = layer_norm(p["mlp_norm"], x, eps)
    return x + dropout(mlp(p["mlp"], config, normed), rate, k_mlp)


def split_layers(stacked: dict, layers: tuple[int, ...]) -> list[dict]:
    """Cuts every leaf [N, ...] into consecutive runs of layers.

    By `lax.split`, whose gradient is one concatenation: that of N indexings is a sum of N arrays
    as large as all layers together.
    """
    leaves, structure = jax.tree.flatten(stacked)
    cut = [jax.lax.split(leaf, layers) for leaf in leaves]
    return [jax.tree.unflatten(structure, run) for run in zip(*cut, strict=True)]


def first_layer(stacked: dict) -> dict:
    """The parameters of a run of one layer, without the N axis."""
    return jax.tree.map(lambda leaf: leaf[0], stacked)


def run_layers(
    stacked: dict,
    config: RobertaPreLayerNormConfig,
    execution: Execution,
    x: Array,
    visible: Array | None,
    key: Array | None,
    read_positions: Array | None,
    keep_residuals: bool,
) -> tuple[Array, tuple[Array, ...]]:
    """All N blocks over the stacked tree, scanned or unrolled, to the same numbers.

    Returns the last block's output and, if kept, the stream after every block.
    """
    N = config.num_hidden_layers
    layer_keys = None if key is None else jax.random.split(key, N)

    def step(p: dict, x: Array, key: Array | None, read_positions: Array | None = None) -> Array:
        return block(p, config, x, visible, key, read_positions)

    if execution.remat != "none":
        saved = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        # Under a scan nothing can undo the recomputation, so the barrier against it is left out.
        step = jax.checkpoint(step, policy=saved[execution.remat], prevent_cse=not execution.scans)

    # The last block stands outside the loop: it alone may be narrowed to the read positions.
    residuals = []
    if execution.scans and N > 1:
        body, tail = split_layers(stacked, (N - 1, 1))

        def scanned(x: Array, layer: tuple[dict, Array | None]) -> tuple[Array, Array | None]:
            x = step(layer[0], x, layer[1])
            return x, x if keep_residuals else None

        x, kept = jax.lax.scan(scanned, x, (body, None if key is None else layer_keys[:-1]))
        residuals = list(kept) if keep_residuals else []
    else:
        *body, tail = split_layers(stacked, (1,) * N)
        for i, p in enumerate(body):
            x = step(first_layer(p), x, None if key is None else layer_keys[i])
            residuals.append(x)
    x = step(first_layer(tail), x, None if key is None else layer_keys[-1], read_positions)
    residuals.append(x)
    return x, tuple(residuals) if keep_residuals else ()


def encode(
    p: dict,
    config: RobertaPreLayerNormConfig,
    execution: Execution,
    input_ids: Array,
    attention_mask: Array | None = None,
    token_type_ids: Array | None = None,
    position_ids: Array | None = None,
    segment_ids: Array | None = None,
    read_positions: Array | None = None,
    key: Array | None = None,
    keep_residuals: bool = False,
) -> EncoderOutput:
    """The encoder as a pure function of the parameter tree; `Encoder.__call__` says the shapes."""
    k_embeddings, k_layers = (None, None) if key is None else jax.random.split(key)
    x = embeddings(
        p["embeddings"],
        config,
        execution.dtype,
        input_ids,
        token_type_ids,
        position_ids,
        k_embeddings,
    )
    last, residuals = run_layers(
        p["encoder"]["layers"],
        config,
        execution,
        x,
        visibility(attention_mask, segment_ids),
        k_layers,
        read_positions,
        keep_residuals,
    )
    return EncoderOutput(
        last_hidden_state=layer_norm(p["encoder"]["final_norm"], last, config.layer_norm_eps),
        residuals=(x, *residuals) if keep_residuals else None,
    )


class TableModule(nn.Module):
    """A Linen module whose parameters are one model's rows of the parameter table.

    Attributes:
        config: the architecture.
        execution: how to compute it.
    """

    config: RobertaPreLayerNormConfig
    execution: Execution = Execution()

    def tree(self, model: str) -> dict:
        """Declares (under `init`) or fetches (under `apply`) the parameters of `model`."""
        parts = {path.partition("/")[0] for path in parameters.table(self.config, model)}

        def initial(part: str) -> Callable[[Array], dict]:
            return lambda key: parameters.init(self.config, key, model)[part]

        return {part: self.param(part, initial(part)) for part in sorted(parts)}

    def dropout_key(self, deterministic: bool) -> Array | None:
        return None if deterministic else self.make_rng("dropout")


class Encoder(TableModule):
    """The encoder alone."""

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
        read_positions: Array | None = None,
        deterministic: bool = True,
        keep_residuals: bool = False,
    ) -> EncoderOutput:
        """Encodes a batch.

        Args:
            input_ids: [B, L] int, each in [0, V).
            attention_mask: [B, L] or [B, L, L], nonzero where a key may be seen; None: all.
            token_type_ids: [B, L] int in [0, T); None: all 0.
            position_ids: [B, L] int in [0, P); None: `default_position_ids`.
            segment_ids: [B, L] int, for packed rows: attention stays within a segment.
            read_positions: [B, M] int: compute the last block and norm there alone.
            deterministic: no dropout. Otherwise `apply` needs `rngs={"dropout": key}`.
            keep_residuals: return the residual stream around every block, too.

        Ids out of range give NaN under jit, without an error: check them on the host.
        """
        return encode(
            self.tree("encoder"),
            self.config,
            self.execution,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            segment_ids,
            read_positions,
            self.dropout_key(deterministic),
            keep_residuals,
        )

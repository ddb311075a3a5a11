"""RoBERTa-PreLayerNorm's encoder: Embeddings -> Attention -> Mlp -> Block -> Encoder.

Each part is a pure function of its own sub-tree of parameters (`params.py` declares them).
`Encoder` is the Linen module around them, with the usual `init` and `apply`. Because a layer is a
plain function of a plain dict, running layers unrolled, scanned or rematerialised, or the last one
at a few positions only, is ordinary JAX over one tree.

Computes what transformers' `modeling_roberta_prelayernorm.py` does (both its torch and its last
Flax version), which on real tokens is fairseq's RoBERTa with `--encoder-normalize-before`. Shape
letters are listed in `params.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.distributed.sharding import constrain, target_platform
from prelnroberta.errors import InputError
from prelnroberta.model import attention_kernels, kv_cache
from prelnroberta.model.kv_cache import KVCache
from prelnroberta.model.layers import (
    ACTIVATIONS,
    as_typed_rngs,
    default_position_ids,
    dropout,
    gather_positions,
    layer_norm,
    per_row_rngs,
    project,
    split_rngs,
    visibility_mask,
)

Array = jax.Array

# What the backward pass stores of a block, by `Execution.remat`. Never a loop's slice of the
# stacked layers, which would be a copy of nearly all of them.
REMAT_POLICIES = {
    "none": lambda primitive, *_, **__: primitive.name not in ("dynamic_slice", "squeeze"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the function is computed; no option changes what it computes.

    Attributes:
        dtype: of activations and matrix products, float32 or bfloat16. Parameters stay float32;
            softmax, norms and losses are always computed in float32.
        scan_layers: whether to loop over layers with one compiled block. None: scan, except on
            CPU without rematerialisation, where the loop costs 11 to 16 % of the step.
        remat: what the backward pass computes again instead of storing it: nothing, everything
            but matrix products, or whole blocks.
        attention: "xla" for einsum and softmax, or a fused kernel (`attention_kernels.py`), which
            is refused if it does not support the inputs; "auto" for the backend's kernel where it
            does.
        logits_chunk_size: positions per row whose logits `masked_lm_scores` computes together; 0:
            all. Chunks take less memory and a third more work in the head.
    """

    dtype: Any = jnp.float32
    scan_layers: bool | None = None
    remat: Literal["none", "dots", "full"] = "none"
    attention: attention_kernels.Attention = "xla"
    logits_chunk_size: int = 0

    def __post_init__(self) -> None:
        allowed = {"remat": tuple(REMAT_POLICIES), "attention": attention_kernels.ATTENTIONS}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InputError(f"{name}={getattr(self, name)!r}, expected one of {values}")
        if (size := self.logits_chunk_size) < 0:
            raise InputError(f"logits_chunk_size={size}, expected 0 (all) or more")

    @property
    def uses_scan(self) -> bool:
        if self.scan_layers is not None:
            return self.scan_layers
        return self.remat != "none" or target_platform() != "cpu"

    def params_for_inference(self, params: parameters.Tree) -> parameters.Tree:
        """The parameters on the device, in the form that is fastest without gradients.

        An unrolled program would slice stacked layers in each call, which copies all of them: a
        sixth of the time of base at 8 x 128 on a CPU.
        """
        return jax.device_put(params) if self.uses_scan else parameters.unstack_layers(params)


@flax.struct.dataclass
class EncoderOutput:
    """The encoder's output; optional fields are None unless requested.

    Attributes:
        last_hidden_state: [B, L, D], after the final norm; [B, M, D] at `read_positions`.
        residuals: tuple of N + 1 arrays [B, L, D]: the normed embeddings and the residual stream
            after each block, before the final norm.
        attentions: tuple of N arrays [B, H, L, T], the probabilities after dropout and
            `head_mask`.
        cross_attentions: the same over the encoder states, [B, H, L, S].
        cache: the given cache with L more columns.
    """

    last_hidden_state: Array
    residuals: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None
    cache: KVCache | None = None


@flax.struct.dataclass
class LayerInputs:
    """What one layer has to itself; or all layers, stacked on a leading N axis.

    Attributes:
        params: its sub-tree of `encoder/layers`.
        dropout_rngs: [B], one key per row; None turns dropout off.
        head_mask: [H] float, by which each head's probabilities are multiplied.
        cache: `keys`, `values` [B, T, H, K], when decoding; `cross_keys`, `cross_values`
            [B, S, H, K], if there are encoder states.
    """

    params: dict
    dropout_rngs: Array | None = None
    head_mask: Array | None = None
    cache: KVCache = dataclasses.field(default_factory=dict)


class AttentionContext(flax.struct.PyTreeNode):
    """What all layers share.

    Attributes:
        visible: bool, [B, 1, T] or [B, L, T]: the keys that a query may attend to; None: all.
        splash_segment_ids: [B, L] int, `visible` in the form that splash needs.
        encoder_visible: bool, [B, 1, S] or [B, L, S]: the same of encoder states.
        cache_index: [] int32, the column of the cache at which new keys start.
        kernel: the fused kernel that computes attention; None: einsum and softmax.
        keep_attentions: whether to return probabilities.
    """

    visible: Array | None = None
    splash_segment_ids: Array | None = None
    encoder_visible: Array | None = None
    cache_index: Array | None = None
    kernel: attention_kernels.Kernel | None = flax.struct.field(pytree_node=False, default=None)
    keep_attentions: bool = flax.struct.field(pytree_node=False, default=False)

    def at_positions(self, positions: Array) -> AttentionContext:
        """The context of the queries at `positions` [B, M] or [1, M] alone."""

        def gather_queries(visible: Array | None) -> Array | None:
            if visible is None or visible.shape[1] == 1:
                return visible
            return gather_positions(visible, positions)

        # A kernel works on whole tiles of queries: not worth it for a few.
        return self.replace(
            visible=gather_queries(self.visible),
            encoder_visible=gather_queries(self.encoder_visible),
            kernel=None,
        )


@flax.struct.dataclass
class BlockAux:
    """A block's auxiliary outputs: attention probabilities, and new columns for the cache."""

    attention: Array | None = None
    cross_attention: Array | None = None
    cache: KVCache | None = None


def embeddings(
    params: dict,
    config: RobertaPreLayerNormConfig,
    dtype: Any,
    words: Array,
    token_type_ids: Array | None,
    position_ids: Array,
    dropout_rngs: Array | None,
) -> Array:
    """Word + type + position, norm, dropout: words [B, L, D] -> [B, L, D]."""
    types = constrain(params["token_type"], "YD")
    x = constrain(words, "BLD") + (types[0] if token_type_ids is None else types[token_type_ids])
    x = x + constrain(params["position"], "PD")[position_ids]
    x = layer_norm(params["norm"], x, config.layer_norm_eps).astype(dtype)
    return dropout(x, config.hidden_dropout_prob, dropout_rngs)


def keys_and_values(params: dict, x: Array) -> tuple[Array, Array]:
    """[B, L, D] -> two of [B, L, H, K]."""
    keys, values = (project(params[name], "bld,dhk->blhk", x) for name in ("key", "value"))
    return constrain(keys, "BLHK"), constrain(values, "BLHK")


def attention(
    params: dict,
    config: RobertaPreLayerNormConfig,
    hidden: Array,
    keys: Array,
    values: Array,
    context: AttentionContext,
    dropout_rngs: Array | None = None,
    head_mask: Array | None = None,
) -> tuple[Array, Array | None]:
    """Multi-head attention of hidden states [B, M, D] over keys, values [B, T, H, K].

    Returns:
        [B, M, D], and the probabilities [B, H, M, T]; None from a fused kernel.
    """
    queries = project(params["query"], "bmd,dhk->bmhk", hidden)
    queries = constrain(queries, "BMHK") * config.head_dim**-0.5
    probabilities = None
    if context.kernel == "cudnn":
        mixed = attention_kernels.cudnn_attention(queries, keys, values, context.visible)
    elif context.kernel == "splash":
        mixed = attention_kernels.splash_attention(
            queries, keys, values, context.splash_segment_ids, config.is_decoder
        )
    else:
        rate = config.attention_probs_dropout_prob
        mixed, probabilities = softmax_attention(
            queries, keys, values, context.visible, rate, dropout_rngs, head_mask
        )
    return project(params["output"], "bmhk,hkd->bmd", mixed), probabilities


def softmax_attention(
    queries: Array,
    keys: Array,
    values: Array,
    visible: Array | None,
    dropout_rate: float,
    dropout_rngs: Array | None,
    head_mask: Array | None,
) -> tuple[Array, Array]:
    """Attention of scaled queries [B, M, H, K] over keys, values [B, T, H, K], by einsum.

    Softmax in float32. A query that sees no key attends evenly to all: finite, and as in
    transformers' torch and Flax classes.

    Returns:
        [B, M, H, K], and the probabilities [B, H, M, T].
    """
    # Heads before positions: products of [M, K] by [T, K] rather than of transposed factors.
    queries, keys, values = (x.swapaxes(1, 2) for x in (queries, keys, values))
    scores = jnp.einsum("bhmk,bhtk->bhmt", queries, keys, preferred_element_type=jnp.float32)
    if visible is not None:
        # Added, not selected: XLA:CPU then computes mask and softmax in one pass.
        mask_bias = jnp.where(visible, 0.0, jnp.finfo(jnp.float32).min)
        scores = scores + mask_bias[:, None]
    probabilities = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
    probabilities = dropout(probabilities, dropout_rate, dropout_rngs)
    if head_mask is not None:
        probabilities = probabilities * head_mask[:, None, None].astype(queries.dtype)
    return jnp.einsum("bhmt,bhtk->bhmk", probabilities, values).swapaxes(1, 2), probabilities


def mlp(params: dict, config: RobertaPreLayerNormConfig, x: Array) -> Array:
    """[B, L, D] -> [B, L, F] -> [B, L, D]; no dropout in between."""
    x = constrain(project(params["wi"], "bld,df->blf", x), "BLF")
    return project(params["wo"], "blf,fd->bld", ACTIVATIONS[config.hidden_act](x))


def block(
    layer: LayerInputs,
    config: RobertaPreLayerNormConfig,
    x: Array,
    context: AttentionContext,
    read_positions: Array | None = None,
) -> tuple[Array, BlockAux]:
    """One pre-norm layer: [B, L, D] -> [B, L, D], or [B, M, D] at `read_positions`.

    Args:
        read_positions: [B, M] or [1, M]. Queries, output and MLP are computed there alone. This is
            exact, because after its keys and values a block treats each position independently.
    """
    params, cache = layer.params, layer.cache
    score_rngs, attention_rngs, mlp_rngs = split_rngs(layer.dropout_rngs, 3)
    eps, rate = config.layer_norm_eps, config.hidden_dropout_prob
    new_columns = None

    normed = layer_norm(params["attention_norm"], x, eps)
    keys, values = keys_and_values(params["attention"], normed)
    if "keys" in cache:
        new_columns = {"keys": keys, "values": values}
        keys = jax.lax.dynamic_update_slice_in_dim(cache["keys"], keys, context.cache_index, 1)
        values = jax.lax.dynamic_update_slice_in_dim(
            cache["values"], values, context.cache_index, 1
        )
    if read_positions is not None:
        normed, x = gather_positions(normed, read_positions), gather_positions(x, read_positions)
        context = context.at_positions(read_positions)
    attended, probabilities = attention(
        params["attention"], config, normed, keys, values, context, score_rngs, layer.head_mask
    )
    x = constrain(x + dropout(attended, rate, attention_rngs), "BMD")

    cross_probabilities = None
    if "cross_keys" in cache:
        x, cross_probabilities = cross_attention(layer, config, x, context)

    normed = layer_norm(params["mlp_norm"], x, eps)
    x = constrain(x + dropout(mlp(params["mlp"], config, normed), rate, mlp_rngs), "BMD")
    if not context.keep_attentions:
        probabilities = cross_probabilities = None
    return x, BlockAux(probabilities, cross_probabilities, new_columns)


def cross_attention(
    layer: LayerInputs, config: RobertaPreLayerNormConfig, x: Array, context: AttentionContext
) -> tuple[Array, Array]:
    """Pre-norm attention over the encoder states. The queries are normed, the states are not.

    Returns the residual stream [B, M, D] and the probabilities [B, H, M, S].
    """
    params, cache, rngs = layer.params, layer.cache, layer.dropout_rngs
    if rngs is not None:
        # The block splits these keys in three; this is the fourth.
        rngs = jax.vmap(lambda rng: jax.random.fold_in(rng, 3))(rngs)
    score_rngs, output_rngs = split_rngs(rngs, 2)
    attended, probabilities = attention(
        params["cross_attention"],
        config,
        layer_norm(params["cross_attention_norm"], x, config.layer_norm_eps),
        cache["cross_keys"],
        cache["cross_values"],
        AttentionContext(visible=context.encoder_visible),
        score_rngs,
        layer.head_mask,
    )
    return x + dropout(attended, config.hidden_dropout_prob, output_rngs), probabilities


def project_encoder_states(
    layers: dict | tuple, states: Array, mask: Array | None = None
) -> KVCache:
    """The cache entries of encoder states [B, S, D] for all layers, and of their mask [B, S]."""
    if isinstance(layers, tuple):
        pairs = [keys_and_values(layer["cross_attention"], states) for layer in layers]
        keys, values = (jnp.stack(leaves) for leaves in zip(*pairs, strict=True))
    else:
        keys, values = jax.vmap(keys_and_values, (0, None))(layers["cross_attention"], states)
    valid = jnp.ones(states.shape[:2], bool) if mask is None else mask != 0
    return {"cross_keys": keys, "cross_values": values, "cross_valid": valid}


def take_layer(stacked: Any, n: int | Array) -> Any:
    """The n-th layer of a pytree that is stacked on a leading axis."""
    return jax.tree.map(lambda leaf: leaf[n], stacked)


@jax.custom_jvp
def last_layer(stacked: Array) -> Array:
    """stacked[-1], with a gradient that XLA adds to another gradient of `stacked` in one pass.

    The gradient of an index is first padded with zeros, in memory as large as `stacked`.
    """
    return stacked[-1]


@last_layer.defjvp
def _last_layer_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (stacked,), (tangent,) = primals, tangents
    is_last = jax.lax.broadcasted_iota(jnp.int32, stacked.shape, 0) == stacked.shape[0] - 1
    return last_layer(stacked), jnp.where(is_last, tangent, 0).sum(0)


def split_layers(layers: LayerInputs, N: int) -> list[LayerInputs]:
    """One LayerInputs per layer. Already unstacked parameters are used unchanged.

    By `lax.split`, whose gradient is one concatenation. The gradient of N indexings is a sum of N
    arrays as large as all layers together.
    """
    if isinstance(layers.params, tuple):
        rest = split_layers(layers.replace(params={}), N)
        return [layer.replace(params=p) for layer, p in zip(rest, layers.params, strict=True)]
    leaves, structure = jax.tree.flatten(layers)
    parts = [jax.lax.split(leaf, (1,) * N) for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[n][0] for part in parts]) for n in range(N)]


def run_layers(
    layers: LayerInputs,
    config: RobertaPreLayerNormConfig,
    execution: Execution,
    x: Array,
    context: AttentionContext,
    read_positions: Array | None,
    keep_residuals: bool,
) -> tuple[Array, list[Array], list[BlockAux]]:
    """All N blocks over the stacked tree, scanned or unrolled, with equal results.

    Returns:
        The last block's output; the residual stream after each block, if kept; each block's
        BlockAux.
    """
    N, remat = config.num_hidden_layers, execution.remat

    def run_block(
        layer: LayerInputs, x: Array, read_positions: Array | None = None
    ) -> tuple[Array, BlockAux]:
        return block(layer, config, x, context, read_positions)

    if remat != "none":
        # Under a scan nothing can undo the recomputation, so it needs no barrier against CSE.
        prevent_cse = not execution.uses_scan
        run_block = jax.checkpoint(run_block, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)

    # The last block is outside the loop: it alone may be narrowed to the read positions.
    residuals: list[Array] = []
    auxes: list[BlockAux] = []
    if execution.uses_scan and N > 1:
        x, residuals, auxes = _scan_layers(layers, config, remat, x, context, keep_residuals)
        last = jax.tree.map(last_layer, layers)
    else:
        *others, last = split_layers(layers, N)
        for layer in others:
            x, aux = run_block(layer, x)
            residuals.append(x)
            auxes.append(aux)
    x, aux = run_block(last, x, read_positions)
    return x, [*residuals, x] if keep_residuals else [], [*auxes, aux]


def _scan_layers(
    layers: LayerInputs,
    config: RobertaPreLayerNormConfig,
    remat: str,
    x: Array,
    context: AttentionContext,
    keep_residuals: bool,
) -> tuple[Array, list[Array], list[BlockAux]]:
    """All blocks but the last, as `run_layers`, by one `lax.scan`."""
    if isinstance(layers.params, tuple):
        raise InputError("params.unstack_layers: unstacked layers cannot be scanned")
    N = config.num_hidden_layers

    # Each iteration slices its layer out of the stacked tree, and so does the backward pass. As
    # the loop's inputs, N - 1 of the N layers would be a copy of nearly all.
    def scan_block(x: Array, n: Array) -> tuple[Array, tuple[Array | None, BlockAux]]:
        x, aux = block(take_layer(layers, n), config, x, context)
        return x, (x if keep_residuals else None, aux)

    scan_block = jax.checkpoint(scan_block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    x, (residuals, auxes) = jax.lax.scan(scan_block, x, jnp.arange(N - 1))
    auxes = [take_layer(auxes, n) for n in range(N - 1)]
    return x, list(residuals) if keep_residuals else [], auxes


def encode(
    params: dict,
    config: RobertaPreLayerNormConfig,
    execution: Execution,
    input_ids: Array | None = None,
    attention_mask: Array | None = None,
    token_type_ids: Array | None = None,
    position_ids: Array | None = None,
    segment_ids: Array | None = None,
    read_positions: Array | None = None,
    *,
    inputs_embeds: Array | None = None,
    head_mask: Array | None = None,
    encoder_hidden_states: Array | None = None,
    encoder_attention_mask: Array | None = None,
    cache: KVCache | None = None,
    dropout_rng: Array | None = None,
    keep_residuals: bool = False,
    keep_attentions: bool = False,
) -> EncoderOutput:
    """The encoder as a pure function of the parameter tree; shapes as in `Encoder.__call__`.

    `dropout_rng` is a single key or [B], one per row; None turns dropout off.
    """
    words, ids = _word_embeddings(params["embeddings"], config, input_ids, inputs_embeds)
    B, L = ids.shape
    if encoder_hidden_states is not None and not config.add_cross_attention:
        raise InputError("encoder_hidden_states: this model has no cross-attention to read them")
    if position_ids is None:
        past_count = 0 if cache is None else cache["count"][:, None]
        position_ids = default_position_ids(ids, config.pad_token_id, past_count)
    masks = (attention_mask, segment_ids, encoder_attention_mask)
    new_cache, visible = _visible_keys(config, cache, ids, *masks)
    if encoder_hidden_states is not None and "cross_keys" not in new_cache:
        states = encoder_hidden_states.astype(execution.dtype)
        layers = params["encoder"]["layers"]
        new_cache |= project_encoder_states(layers, states, encoder_attention_mask)
    unsupported = {
        "head_mask": head_mask is not None,
        "attention probabilities": keep_attentions,
        "a cache": cache is not None,
    }
    training = dropout_rng is not None
    kernel = attention_kernels.choose_kernel(
        execution.attention, config, execution.dtype, L, attention_mask, training, unsupported
    )
    segments = None
    if kernel == "splash":
        segments = attention_kernels.to_segment_ids(attention_mask, segment_ids, (B, L))

    rngs = per_row_rngs(dropout_rng, B) if training else None
    embedding_rngs, layer_rngs = split_rngs(rngs, 2)
    inputs = words, token_type_ids, position_ids
    x = embeddings(params["embeddings"], config, execution.dtype, *inputs, embedding_rngs)
    layers = _layer_inputs(params, config, layer_rngs, head_mask, new_cache)
    context = AttentionContext(
        visible=visible,
        splash_segment_ids=segments,
        encoder_visible=visibility_mask(new_cache.get("cross_valid")),
        cache_index=new_cache.get("index"),
        kernel=kernel,
        keep_attentions=keep_attentions,
    )
    last, residuals, auxes = run_layers(
        layers, config, execution, x, context, read_positions, keep_residuals
    )
    has_cross = keep_attentions and auxes[0].cross_attention is not None
    last = layer_norm(params["encoder"]["final_norm"], last, config.layer_norm_eps)
    if cache is not None:
        cache = kv_cache.write_kv(new_cache, [aux.cache for aux in auxes], L)
    return EncoderOutput(
        last_hidden_state=last,
        residuals=(x, *residuals) if keep_residuals else None,
        attentions=tuple(aux.attention for aux in auxes) if keep_attentions else None,
        cross_attentions=tuple(aux.cross_attention for aux in auxes) if has_cross else None,
        cache=cache,
    )


def _word_embeddings(
    params: dict,
    config: RobertaPreLayerNormConfig,
    input_ids: Array | None,
    inputs_embeds: Array | None,
) -> tuple[Array, Array]:
    """The words [B, L, D], and ids [B, L] by which positions are counted."""
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("give input_ids or inputs_embeds: one of the two, and not both")
    if input_ids is not None:
        return constrain(params["word"], "VD")[input_ids], input_ids
    # Pads cannot be recognised by their vectors: every column counts.
    return inputs_embeds, jnp.full(inputs_embeds.shape[:2], config.pad_token_id + 1)


def _visible_keys(
    config: RobertaPreLayerNormConfig,
    cache: KVCache | None,
    ids: Array,
    attention_mask: Array | None,
    segment_ids: Array | None,
    encoder_attention_mask: Array | None,
) -> tuple[KVCache, Array | None]:
    """The cache with L more valid columns ({} without one), and the keys that a query sees."""
    if cache is None:
        causal_length = ids.shape[1] if config.is_decoder else None
        return {}, visibility_mask(attention_mask, segment_ids, causal_length)
    masks = [m for m in (attention_mask, encoder_attention_mask) if m is not None]
    if segment_ids is not None or any(mask.ndim == 3 for mask in masks):
        raise InputError("a cache takes masks [B, L] and [B, S] alone, and no segment_ids")
    return kv_cache.append_mask(cache, attention_mask, ids != config.pad_token_id)


def _layer_inputs(
    params: dict,
    config: RobertaPreLayerNormConfig,
    dropout_rngs: Array | None,
    head_mask: Array | None,
    cache: KVCache,
) -> LayerInputs:
    """The inputs of all layers, stacked."""
    N, H = config.num_hidden_layers, config.num_attention_heads
    if head_mask is not None:
        head_mask = jnp.broadcast_to(head_mask, (N, H))
    return LayerInputs(
        params=params["encoder"]["layers"],
        dropout_rngs=None if dropout_rngs is None else split_rngs(dropout_rngs, N),
        head_mask=head_mask,
        cache={name: cache[name] for name in kv_cache.PER_LAYER_KEYS if name in cache},
    )


class TableModule(nn.Module):
    """A Linen module whose parameters are one model's rows of the parameter table.

    Attributes:
        config: the architecture.
        execution: how to compute it.
    """

    config: RobertaPreLayerNormConfig
    execution: Execution = Execution()

    def get_params(self, model: str) -> dict:
        """Declares (under `init`) or fetches (under `apply`) the parameters of `model`."""
        parts = {path.partition("/")[0] for path in parameters.table(self.config, model)}

        def fetch(part: str) -> Any:
            found: Any = self.get_variable("params", part)
            if isinstance(found, Mapping) and isinstance(found.get("layers"), tuple):
                return found  # by `params.unstack_layers`: Linen would refuse its shapes
            return self.param(part, lambda rng: parameters.init(self.config, rng, model)[part])

        return {part: fetch(part) for part in sorted(parts)}

    def encode(self, params: dict, *inputs: Any, **kwargs: Any) -> EncoderOutput:
        """`encode` with this module's config and execution."""
        return encode(params, self.config, self.execution, *inputs, **kwargs)

    def make_dropout_rngs(
        self, count: int, deterministic: bool, dropout_rngs: Array | None
    ) -> Array | tuple[None, ...]:
        """Keys for `count` uses of dropout; Nones without dropout.

        Returns:
            [count, B] from `dropout_rngs` [B], or [count] from Linen's "dropout" stream.
        """
        if dropout_rngs is None and not deterministic:
            dropout_rngs = self.make_rng("dropout")
        return split_rngs(None if dropout_rngs is None else as_typed_rngs(dropout_rngs), count)


class Encoder(TableModule):
    """The encoder alone."""

    @nn.compact
    def __call__(
        self,
        *inputs: Any,
        deterministic: bool = True,
        dropout_rngs: Array | None = None,
        **kwargs: Any,
    ) -> EncoderOutput:
        """Encodes a batch.

        Args:
            input_ids: [B, L] int, each in [0, V).
            attention_mask: [B, L] or [B, L, L], nonzero where a key may be attended to; None: all.
            token_type_ids: [B, L] int in [0, Y); None: all 0.
            position_ids: [B, L] int in [0, P); None: `default_position_ids`.
            segment_ids: [B, L] int, for packed rows: attention stays within a segment.
            read_positions: [B, M] or [1, M] int: compute the last block and norm there alone.
            inputs_embeds: [B, L, D], a keyword as are all below; replaces the word vectors of
                input_ids. Positions then count every column.
            head_mask: [H] or [N, H] float, by which probabilities are multiplied after dropout.
            encoder_hidden_states: [B, S, D], for cross-attention.
            encoder_attention_mask: [B, S] or [B, L, S], nonzero where a state may be attended to.
            cache: from `kv_cache.init_cache`; the L columns are appended and see earlier ones.
                attention_mask is then [B, L], the validity of the new columns.
            deterministic: no dropout. Otherwise `apply` needs `rngs={"dropout": key}`.
            dropout_rngs: [B], one key per row, in place of `deterministic` and `rngs`. Dropout is
                on, and a row's bits depend on its key alone, not on its index in the batch.
            keep_residuals: also return the residual stream around every block.
            keep_attentions: also return the attention probabilities.

        Ids out of range give NaN under jit, without an error: check them on the host.

        Raises:
            InputError: inputs that exclude each other, or an attention kernel that does not
                support them.
        """
        [rng] = self.make_dropout_rngs(1, deterministic, dropout_rngs)
        return self.encode(self.get_params("encoder"), *inputs, dropout_rng=rng, **kwargs)

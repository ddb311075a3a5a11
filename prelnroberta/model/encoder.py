"""RoBERTa-PreLayerNorm's encoder: Embeddings -> Attention -> Mlp -> Block -> Encoder.

Each part is a pure function of its own sub-tree of parameters (`params.py` declares them) and is
read top to bottom; `Encoder` is the Linen module around them, with the usual `init` and `apply`.
Because a layer is a plain function of a plain dict, running layers unrolled, scanned or
rematerialised, or the last one at a few positions only, is ordinary jax over one tree.

Computes what transformers' `modeling_roberta_prelayernorm.py` does (both its torch and its last
Flax version), which on real tokens is fairseq's RoBERTa with `--encoder-normalize-before`.

    B batch  L length  D hidden  H heads  K head dim  F mlp  N layers  V vocab  M read positions
    T keys, cached ones too  S encoder states
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
from prelnroberta.model import attention_kernels
from prelnroberta.model import kv_cache as caches
from prelnroberta.model.kv_cache import KVCache
from prelnroberta.model.layers import (
    ACTIVATIONS,
    default_position_ids,
    dropout,
    layer_norm,
    project,
    per_row_rngs,
    split_rngs,
    gather_positions,
    as_typed_rngs,
    visibility_mask,
)

Array = jax.Array

# What the backward pass finds stored of a block, by `Execution.remat`; never a loop's cut of the
# stacked layers, which would be a copy of nearly all of them.
STORED = {
    "none": lambda primitive, *_, **__: primitive.name not in ("dynamic_slice", "squeeze"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
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
        attention: einsum and softmax by XLA, or a fused kernel (`attention_kernels.py`), which is
            refused where it cannot serve; auto: the backend's kernel where it can.
        logits_chunk_size: positions of a row whose logits stand in memory at the same time in
            `masked_lm_scores`; 0: all. Less memory for a third more work in the head.
    """

    dtype: Any = jnp.float32
    scan_layers: bool | None = None
    remat: Literal["none", "dots", "full"] = "none"
    attention: attention_kernels.Choice = "xla"
    logits_chunk_size: int = 0

    def __post_init__(self) -> None:
        allowed = {"remat": ("none", "dots", "full"), "attention": attention_kernels.CHOICES}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InputError(f"{name}={getattr(self, name)!r}, expected one of {values}")
        if self.logits_chunk_size < 0:
            raise InputError(f"logits_chunk_size={self.logits_chunk_size}, expected 0 (all) or more")

    @property
    def uses_scan(self) -> bool:
        if self.scan_layers is not None:
            return self.scan_layers
        return self.remat != "none" or target_platform() != "cpu"

    def params_for_inference(self, params: parameters.Tree) -> parameters.Tree:
        """Parameters on the device, in the form that this execution reads fastest, for use without
        gradients. An unrolled program would cut stacked layers apart anew in each call: copies of
        all of them, a sixth of the time of base at 8 x 128 on a CPU."""
        return jax.device_put(params) if self.uses_scan else parameters.unstack_layers(params)


@flax.struct.dataclass
class EncoderOutput:
    """What the encoder returns; what was not asked for is None.

    Attributes:
        last_hidden_state: [B, L, D], after the final norm; [B, M, D] where `read_positions` chose.
        residuals: tuple of N + 1 arrays [B, L, D]: the normed embeddings and the residual stream
            after each block, before the final norm.
        attentions: tuple of N arrays [B, H, L, T], the probabilities used: after dropout and
            `head_mask`. T is L, or the columns of the cache.
        cross_attentions: the same over the S encoder states, [B, H, L, S].
        cache: the given one with L more columns.
    """

    last_hidden_state: Array
    residuals: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None
    cache: KVCache | None = None


@flax.struct.dataclass
class Layer:
    """What one layer has for itself; or all of them, on a leading N axis.

    Attributes:
        params: its sub-tree of `encoder/layers`.
        key: [B], for dropout; None turns it off.
        head_mask: [H] float, multiplied to each head's probabilities.
        cache: `keys`, `values` [B, T, H, K], when decoding; `cross_keys`, `cross_values`
            [B, S, H, K], where there are encoder states.
    """

    params: dict
    key: Array | None = None
    head_mask: Array | None = None
    cache: KVCache = dataclasses.field(default_factory=dict)


@flax.struct.dataclass
class Context:
    """What all layers share.

    Attributes:
        visible: bool, [B, 1, T] or [B, L, T]: which keys a query sees; None: all.
        fused: the kernel that computes attention; None: einsum and softmax.
        segments: [B, L] int, `visible` as splash wants it.
        encoder_visible: bool, [B, 1, S] or [B, L, S]: which encoder states a query sees.
        index: [] int32, the column of the cache where new keys go.
        keep_attentions: whether to return probabilities.
    """

    visible: Array | None = None
    segments: Array | None = None
    encoder_visible: Array | None = None
    index: Array | None = None
    fused: attention_kernels.Kernel | None = flax.struct.field(pytree_node=False, default=None)
    keep_attentions: bool = flax.struct.field(pytree_node=False, default=False)

    def narrowed(self, positions: Array) -> Context:
        """The same for queries at `positions` [B, M] alone."""

        def rows(visible: Array | None) -> Array | None:
            if visible is None or visible.shape[1] == 1:
                return visible
            return gather_positions(visible, positions)

        # Few queries: not worth a kernel that wants whole tiles of them.
        return self.replace(
            visible=rows(self.visible), encoder_visible=rows(self.encoder_visible), fused=None
        )


@flax.struct.dataclass
class Kept:
    """What a block leaves beside its stream: probabilities, and new columns for the cache."""

    attention: Array | None = None
    cross_attention: Array | None = None
    cache: KVCache | None = None


def embeddings(
    p: dict,
    config: RobertaPreLayerNormConfig,
    dtype: Any,
    words: Array,
    token_type_ids: Array | None,
    position_ids: Array,
    key: Array | None,
) -> Array:
    """Word + type + position, normed, dropped out: words [B, L, D] -> [B, L, D]."""
    types = constrain(p["token_type"], "YD")
    x = constrain(words, "BLD") + (types[0] if token_type_ids is None else types[token_type_ids])
    x = x + constrain(p["position"], "PD")[position_ids]
    x = layer_norm(p["norm"], x, config.layer_norm_eps).astype(dtype)
    return dropout(x, config.hidden_dropout_prob, key)


def keys_and_values(p: dict, x: Array) -> tuple[Array, Array]:
    """[B, L, D] -> two of [B, L, H, K]."""
    keys, values = (project(p[name], "bld,dhk->blhk", x) for name in ("key", "value"))
    return constrain(keys, "BLHK"), constrain(values, "BLHK")


def attention(
    p: dict,
    config: RobertaPreLayerNormConfig,
    queries: Array,
    keys: Array,
    values: Array,
    context: Context,
    key: Array | None = None,
    head_mask: Array | None = None,
) -> tuple[Array, Array | None]:
    """Multi-head attention of queries [B, M, D] over keys, values [B, T, H, K].

    Softmax in float32. A query that may see nothing attends evenly to everything: finite, and
    the same as transformers' torch and Flax classes give.

    Returns:
        [B, M, D], and the probabilities used [B, H, M, T]; None from a fused kernel.
    """
    q = constrain(project(p["query"], "bmd,dhk->bmhk", queries), "BMHK") * config.head_dim**-0.5
    probabilities = None
    if context.fused == "cudnn":
        mixed = attention_kernels.cudnn(q, keys, values, context.visible)
    elif context.fused == "splash":
        mixed = attention_kernels.splash(q, keys, values, context.segments, config.is_decoder)
    else:
        # Heads before positions: as a product of [M, K] by [L, K] and not of its transpose.
        q, keys, values = (x.swapaxes(1, 2) for x in (q, keys, values))
        scores = jnp.einsum("bhmk,bhlk->bhml", q, keys, preferred_element_type=jnp.float32)
        if context.visible is not None:
            # Added, not selected: XLA:CPU then makes one pass of mask and softmax.
            unseen = jnp.where(context.visible, 0.0, jnp.finfo(jnp.float32).min)
            scores = scores + unseen[:, None]
        probabilities = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
        probabilities = dropout(probabilities, config.attention_probs_dropout_prob, key)
        if head_mask is not None:
            probabilities = probabilities * head_mask[:, None, None].astype(queries.dtype)
        mixed = jnp.einsum("bhml,bhlk->bhmk", probabilities, values).swapaxes(1, 2)
    return project(p["output"], "bmhk,hkd->bmd", mixed), probabilities


def mlp(p: dict, config: RobertaPreLayerNormConfig, x: Array) -> Array:
    """[B, L, D] -> [B, L, F] -> [B, L, D]; no dropout in between."""
    wide = constrain(project(p["wi"], "bld,df->blf", x), "BLF")
    wide = ACTIVATIONS[config.hidden_act](wide)
    return project(p["wo"], "blf,fd->bld", wide)


def block(
    layer: Layer,
    config: RobertaPreLayerNormConfig,
    x: Array,
    context: Context,
    read_positions: Array | None = None,
) -> tuple[Array, Kept]:
    """One layer, norm-and-add: [B, L, D] -> [B, L, D], or [B, M, D] at `read_positions`.

    Args:
        read_positions: [B, M] or [1, M]. Queries, output and MLP are computed there alone: exact,
            because after its keys and values a block works on each position by itself.
    """
    p, key, cache = layer.params, layer.key, layer.cache
    k_scores, k_attention, k_mlp = (None,) * 3 if key is None else split_rngs(key, 3)
    eps, rate = config.layer_norm_eps, config.hidden_dropout_prob
    new = None

    queries = layer_norm(p["attention_norm"], x, eps)
    keys, values = keys_and_values(p["attention"], queries)
    if "keys" in cache:
        new = {"keys": keys, "values": values}
        keys = jax.lax.dynamic_update_slice_in_dim(cache["keys"], keys, context.index, 1)
        values = jax.lax.dynamic_update_slice_in_dim(cache["values"], values, context.index, 1)
    if read_positions is not None:
        queries, x = gather_positions(queries, read_positions), gather_positions(x, read_positions)
        context = context.narrowed(read_positions)
    mixed, probabilities = attention(
        p["attention"], config, queries, keys, values, context, k_scores, layer.head_mask
    )
    x = constrain(x + dropout(mixed, rate, k_attention), "BMD")

    cross = None
    if "cross_keys" in cache:
        x, cross = cross_attention(layer, config, x, context)

    normed = layer_norm(p["mlp_norm"], x, eps)
    x = constrain(x + dropout(mlp(p["mlp"], config, normed), rate, k_mlp), "BMD")
    if not context.keep_attentions:
        probabilities = cross = None
    return x, Kept(probabilities, cross, new)


def cross_attention(
    layer: Layer, config: RobertaPreLayerNormConfig, x: Array, context: Context
) -> tuple[Array, Array]:
    """Norm-and-add of attention over the encoder's states: queries are normed, states are not.

    Returns the stream [B, M, D] and the probabilities [B, H, M, S].
    """
    p, cache = layer.params["cross_attention"], layer.cache
    k_scores, k_output = None, None
    if layer.key is not None:
        # The block has split these keys in three: a fourth.
        k_scores, k_output = split_rngs(jax.vmap(lambda k: jax.random.fold_in(k, 3))(layer.key), 2)
    queries = layer_norm(layer.params["cross_attention_norm"], x, config.layer_norm_eps)
    keys, values = cache["cross_keys"], cache["cross_values"]
    seen = Context(visible=context.encoder_visible)
    mixed, probabilities = attention(
        p, config, queries, keys, values, seen, k_scores, layer.head_mask
    )
    return x + dropout(mixed, config.hidden_dropout_prob, k_output), probabilities


def project_encoder_states(layers: dict | tuple, states: Array, mask: Array | None = None) -> KVCache:
    """What a cache holds of encoder states [B, S, D], by all layers, and of their mask [B, S]."""
    if isinstance(layers, tuple):
        read = [keys_and_values(layer["cross_attention"], states) for layer in layers]
        keys, values = (jnp.stack(leaves) for leaves in zip(*read, strict=True))
    else:
        keys, values = jax.vmap(keys_and_values, (0, None))(layers["cross_attention"], states)
    valid = jnp.ones(states.shape[:2], bool) if mask is None else mask != 0
    return {"cross_keys": keys, "cross_values": values, "cross_valid": valid}


def at(stacked: Any, n: int | Array) -> Any:
    """The n-th of what is stacked on a leading axis."""
    return jax.tree.map(lambda leaf: leaf[n], stacked)


@jax.custom_jvp
def last(stacked: Array) -> Array:
    """stacked[-1], whose gradient XLA adds to another of `stacked` in one pass: that of an index
    is padded with zeros first, in memory as large as `stacked`."""
    return stacked[-1]


@last.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (stacked,), (moved,) = primals, tangents
    here = jax.lax.broadcasted_iota(jnp.int32, stacked.shape, 0) == stacked.shape[0] - 1
    return last(stacked), jnp.where(here, moved, 0).sum(0)


def each_layer(layers: Layer, N: int) -> list[Layer]:
    """Every layer by itself; parameters that stand apart already (`params.unstack_layers`) are taken as
    they are.

    By `lax.split`, whose gradient is one concatenation: that of N indexings is a sum of N arrays
    as large as all layers together.
    """
    if isinstance(layers.params, tuple):
        rest = each_layer(layers.replace(params={}), N)
        return [layer.replace(params=p) for layer, p in zip(rest, layers.params, strict=True)]
    leaves, structure = jax.tree.flatten(layers)
    cut = [jax.lax.split(leaf, (1,) * N) for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[n][0] for part in cut]) for n in range(N)]


def run_layers(
    layers: Layer,
    config: RobertaPreLayerNormConfig,
    execution: Execution,
    x: Array,
    context: Context,
    read_positions: Array | None,
    keep_residuals: bool,
) -> tuple[Array, list[Array], list[Kept]]:
    """All N blocks over the stacked tree, scanned or unrolled, to the same numbers.

    Returns the last block's output and, of every block, the stream after it, if kept, and Kept.
    """
    N = config.num_hidden_layers

    def step(layer: Layer, x: Array, read_positions: Array | None = None) -> tuple[Array, Kept]:
        return block(layer, config, x, context, read_positions)

    if execution.remat != "none":
        # Under a scan nothing can undo the recomputation, so the barrier against it is left out.
        step = jax.checkpoint(step, policy=STORED[execution.remat], prevent_cse=not execution.uses_scan)

    # The last block stands outside the loop: it alone may be narrowed to the read positions.
    residuals, kept = [], []
    if execution.uses_scan and N > 1:
        if isinstance(layers.params, tuple):
            raise InputError("layers that stand apart (params.unstack_layers) cannot be scanned")

        # Each turn cuts its layer out of all of them, and the backward pass cuts it again: N - 1 of
        # N as the loop's input would be a copy of nearly all.
        def scanned(x: Array, n: Array) -> tuple[Array, tuple[Array | None, Kept]]:
            x, kept = block(at(layers, n), config, x, context)
            return x, (x if keep_residuals else None, kept)

        scanned = jax.checkpoint(scanned, policy=STORED[execution.remat], prevent_cse=False)
        x, (streams, stacked) = jax.lax.scan(scanned, x, jnp.arange(N - 1))
        residuals = list(streams) if keep_residuals else []
        kept = [at(stacked, n) for n in range(N - 1)]
        tail = jax.tree.map(last, layers)
    else:
        *body, tail = each_layer(layers, N)
        for layer in body:
            x, found = step(layer, x)
            residuals.append(x)
            kept.append(found)
    x, found = step(tail, x, read_positions)
    return x, [*residuals, x] if keep_residuals else [], [*kept, found]


def encode(
    p: dict,
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
    key: Array | None = None,
    keep_residuals: bool = False,
    keep_attentions: bool = False,
) -> EncoderOutput:
    """The encoder as a pure function of the parameter tree; `Encoder.__call__` says the shapes."""
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("give input_ids or inputs_embeds: one of the two, and not both")
    if encoder_hidden_states is not None and not config.add_cross_attention:
        raise InputError("encoder_hidden_states: this model has no cross-attention to read them")
    B, L = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
    if input_ids is None:
        # Vectors tell no pads: every column counts.
        words, counted = inputs_embeds, jnp.full((B, L), config.pad_token_id + 1)
    else:
        words, counted = constrain(p["embeddings"]["word"], "VD")[input_ids], input_ids
    if position_ids is None:
        before = 0 if cache is None else cache["count"][:, None]
        position_ids = default_position_ids(counted, config.pad_token_id, before)
    if cache is None:
        memory = {}
        visible = visibility_mask(attention_mask, segment_ids, L if config.is_decoder else None)
    else:
        masks = [m for m in (attention_mask, encoder_attention_mask) if m is not None]
        if segment_ids is not None or any(mask.ndim == 3 for mask in masks):
            raise InputError("a cache takes masks [B, L] and [B, S] alone, and no segment_ids")
        real = counted != config.pad_token_id
        memory, visible = caches.announce(cache, attention_mask, real)
    if encoder_hidden_states is not None and "cross_keys" not in memory:
        states = encoder_hidden_states.astype(execution.dtype)
        memory |= project_encoder_states(p["encoder"]["layers"], states, encoder_attention_mask)
    asked = {
        "head_mask": head_mask is not None,
        "attention probabilities": keep_attentions,
        "a cache": cache is not None,
    }
    fused = attention_kernels.choose_kernel(
        execution.attention, config, execution.dtype, L, attention_mask, key is not None, asked
    )
    segments = None
    if fused == "splash":
        segments = attention_kernels.to_segment_ids(attention_mask, segment_ids, (B, L))

    k_embeddings, k_layers = (None, None) if key is None else split_rngs(per_row_rngs(key, B), 2)
    x = embeddings(
        p["embeddings"], config, execution.dtype, words, token_type_ids, position_ids, k_embeddings
    )
    N = config.num_hidden_layers
    if head_mask is not None:
        head_mask = jnp.broadcast_to(head_mask, (N, config.num_attention_heads))
    layers = Layer(
        params=p["encoder"]["layers"],
        key=None if key is None else split_rngs(k_layers, N),
        head_mask=head_mask,
        cache={name: memory[name] for name in caches.PER_LAYER_KEYS if name in memory},
    )
    context = Context(
        visible=visible,
        fused=fused,
        segments=segments,
        encoder_visible=visibility_mask(memory.get("cross_valid")),
        index=memory.get("index"),
        keep_attentions=keep_attentions,
    )
    last, residuals, kept = run_layers(
        layers, config, execution, x, context, read_positions, keep_residuals
    )
    crossed = keep_attentions and kept[0].cross_attention is not None
    return EncoderOutput(
        last_hidden_state=layer_norm(p["encoder"]["final_norm"], last, config.layer_norm_eps),
        residuals=(x, *residuals) if keep_residuals else None,
        attentions=tuple(k.attention for k in kept) if keep_attentions else None,
        cross_attentions=tuple(k.cross_attention for k in kept) if crossed else None,
        cache=None if cache is None else caches.fill(memory, [k.cache for k in kept], L),
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

        def fetch(part: str) -> dict:
            found = self.get_variable("params", part)
            if isinstance(found, Mapping) and isinstance(found.get("layers"), tuple):
                return found  # `params.unstack_layers`, which Linen would measure by the stacked shapes
            return self.param(part, lambda key: parameters.init(self.config, key, model)[part])

        return {part: fetch(part) for part in sorted(parts)}

    def encode(self, p: dict, *inputs: Any, **named: Any) -> EncoderOutput:
        """`encode` with this module's config and execution."""
        return encode(p, self.config, self.execution, *inputs, **named)

    def keys(self, count: int, deterministic: bool, named: dict[str, Any]) -> Array | list[None]:
        """Dropout keys for `count` places: [count, B] of `dropout_rngs`, which leaves `named`, or
        [count] of Linen's stream; Nones without dropout."""
        given = named.pop("dropout_rngs", None)
        if given is None and deterministic:
            return [None] * count
        return split_rngs(as_typed_rngs(self.make_rng("dropout") if given is None else given), count)


class Encoder(TableModule):
    """The encoder alone."""

    @nn.compact
    def __call__(self, *inputs: Any, deterministic: bool = True, **named: Any) -> EncoderOutput:
        """Encodes a batch.

        Args:
            input_ids: [B, L] int, each in [0, V).
            attention_mask: [B, L] or [B, L, L], nonzero where a key may be seen; None: all.
            token_type_ids: [B, L] int in [0, T); None: all 0.
            position_ids: [B, L] int in [0, P); None: `default_position_ids`.
            segment_ids: [B, L] int, for packed rows: attention stays within a segment.
            read_positions: [B, M] or [1, M] int: compute the last block and norm there alone.
            inputs_embeds: [B, L, D], by keyword as all below; in place of the vectors of
                input_ids. Positions then count every column.
            head_mask: [H] or [N, H] float, multiplied to the probabilities after dropout.
            encoder_hidden_states: [B, S, D], for cross-attention.
            encoder_attention_mask: [B, S] or [B, L, S], nonzero where a state may be seen.
            cache: from `cache.init_cache`; the L columns are appended and see what came before.
                attention_mask is then [B, L], the validity of the new columns.
            deterministic: no dropout. Otherwise `apply` needs `rngs={"dropout": key}`.
            dropout_rngs: [B], each row's own, in place of the two: dropout is on, and a row's bits
                depend on its key alone, not on its place in the batch.
            keep_residuals: return the residual stream around every block, too.
            keep_attentions: return the attention probabilities, too.

        Ids out of range give NaN under jit, without an error: check them on the host.

        Raises:
            InputError: inputs that exclude each other, or an attention kernel that cannot serve.
        """
        [key] = self.keys(1, deterministic, named)
        return self.encode(self.tree("encoder"), *inputs, key=key, **named)

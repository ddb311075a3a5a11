"""RoBERTa-PreLayerNorm's encoder in PyTorch: Embeddings -> Attention -> Layer -> Encoder -> Model.

Computes what `prelnroberta/model/encoder.py` does, which the tests hold it to; module names are those of
transformers' `modeling_roberta_prelayernorm.py`, so state dicts go either way.

    B batch  L length  D hidden  H heads  K head dim  F mlp  N layers  V vocab
    T keys, cached ones too  S encoder states  M queries: L, or 1 where only the first is read
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bridges.pytorch.kv_cache import Cache, Past
from bridges.pytorch.pretrained import PreTrained, values_can_be_read
from bridges.pytorch.unpadding import Packing
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.pretrained.outputs import BaseModelOutput

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class Context(NamedTuple):
    """What all layers share.

    Attributes:
        bias: [B or 1, 1, L or 1, T], added to scores: 0, or the lowest number where a key is not
            seen. None: every key is seen.
        states: [B, S, D], for cross-attention; states_bias: [B, 1, L or 1, S].
        lengths: of the rows that follow each other in a packed batch [1, T]; None: not packed.
        causal: whether packed rows are; other batches have it in `bias`.
        explicit: whether probabilities are wanted, which fused attention never has.
        keep_past: whether layers return their keys and values.
    """

    bias: Tensor | None = None
    states: Tensor | None = None
    states_bias: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    causal: bool = False
    explicit: bool = False
    keep_past: bool = False


class Kept(NamedTuple):
    """What a layer leaves beside its stream: probabilities, and what it adds to the cache."""

    attention: Tensor | None = None
    cross_attention: Tensor | None = None
    past: Past | None = None


def default_position_ids(real: Tensor, pad_token_id: int, before: Tensor | int = 0) -> Tensor:
    """Positions by counting `real` [B, L] tokens: pad + 1, pad + 2, ...; others get pad.

    Args:
        before: [B, 1], how many real tokens came before, in a cache.
    """
    return (real.long().cumsum(-1) + before) * real + pad_token_id


def bias_of(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Visibility [B or 1, L or 1, T] as what is added to scores, an axis for heads put in.

    A lowest finite number, not -inf: a query that sees nothing then attends evenly to all, as in
    Flax, and is never NaN. bfloat16's, which autocast can round to, where it is the higher one.
    None, the faster attention, where everything is visible.
    """
    if visible is None or hides_nothing(visible):
        return None
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill(~visible, lowest)[:, None]


def hides_nothing(visible: Tensor) -> bool:
    if not values_can_be_read():
        return False
    try:
        return bool(visible.all())
    except RuntimeError:  # under torch.func.vmap
        return False


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def keys_seen(mask: Tensor | None) -> Tensor | None:
    """A mask [B, T] or [B, L, T] as visibility [B, L or 1, T]."""
    if mask is None:
        return None
    return (mask != 0) if mask.ndim == 3 else (mask != 0)[:, None]


class Embeddings(nn.Module):
    """Word + type + position, normed, dropped out: ids [B, L] -> [B, L, D].

    Pad rows learn, as in Flax; transformers stops their gradient.
    """

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        D = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.LayerNorm = nn.LayerNorm(D, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, words: Tensor, token_type_ids: Tensor | None, positions: Tensor) -> Tensor:
        if token_type_ids is None:
            x = words + self.token_type_embeddings.weight[0]
        else:
            x = words + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(positions)))


class Attention(nn.Module):
    """Multi-head attention over a layer's own tokens or encoder states, and the norm before it."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        D = config.hidden_size
        self.head_dim = config.head_dim
        self.rate = config.attention_probs_dropout_prob
        self.LayerNorm = nn.LayerNorm(D, config.layer_norm_eps)
        self.self = nn.ModuleDict({name: nn.Linear(D, D) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(D, D)})

    def heads(self, name: str, x: Tensor) -> Tensor:
        """[B, L, D], projected -> [B, H, L, K]."""
        return self.self[name](x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads("key", x), self.heads("value", x)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        context: Context,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries [B, M, D] over keys, values [B, H, T, K].

        Returns [B, M, D], and the probabilities used [B, H, M, T] if they were wanted.
        """
        q, probabilities = self.heads("query", queries), None
        rate = self.rate if self.training else 0.0
        if context.lengths is not None:
            mixed = self.by_row(q, keys, values, context, rate)
        elif context.explicit or head_mask is not None:
            scores = at_least_float32(q * self.head_dim**-0.5 @ keys.mT)
            scores = scores if bias is None else scores + bias
            probabilities = F.dropout(scores.softmax(-1).to(q.dtype), rate, self.training)
            if head_mask is not None:
                probabilities = probabilities * head_mask[:, None, None].to(q.dtype)
            mixed = probabilities @ values
        else:
            mixed = F.scaled_dot_product_attention(q, keys, values, bias, rate)
        return self.output["dense"](mixed.transpose(1, 2).flatten(-2)), probabilities

    def by_row(
        self, q: Tensor, keys: Tensor, values: Tensor, context: Context, rate: float
    ) -> Tensor:
        """Attention of a packed batch [1, H, T, K], row by row; of one query a row if narrowed.

        On CPU this takes half the time of padding rows for one call, and a tenth of nested tensors.
        """
        lengths = context.lengths
        narrowed = q.shape[2] != keys.shape[2]
        rows = zip(
            q.split(1 if narrowed else lengths, 2),
            keys.split(lengths, 2),
            values.split(lengths, 2),
            strict=True,
        )
        causal = context.causal
        return torch.cat(
            [F.scaled_dot_product_attention(*row, None, rate, causal) for row in rows], 2
        )


class Layer(nn.Module):
    """Norm-and-add of attention, of cross-attention if the model has it, and of the MLP."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        D, wide = config.hidden_size, config.intermediate_size
        self.attention = Attention(config)
        if config.add_cross_attention:
            self.crossattention = Attention(config)
        self.intermediate = nn.ModuleDict(
            {"LayerNorm": nn.LayerNorm(D, config.layer_norm_eps), "dense": nn.Linear(D, wide)}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(wide, D)})
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        x: Tensor,
        context: Context,
        past: Past,
        head_mask: Tensor | None = None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, Kept]:
        """[B, L, D] -> [B, L, D], or [B, M, D] at the columns `read` [M] alone.

        The latter is exact: after its keys and values a layer works on each position by itself.
        """
        queries, bias = self.attention.LayerNorm(x), context.bias
        keys, values = self.attention.keys_and_values(queries)
        if past.keys is not None:
            keys = torch.cat([past.keys, keys], 2)
            values = torch.cat([past.values, values], 2)
        if read is not None:
            queries, x = queries.index_select(1, read), x.index_select(1, read)
            bias = bias if bias is None or bias.shape[2] == 1 else bias.index_select(2, read)
        mixed, attention = self.attention(queries, keys, values, bias, context, head_mask)
        x = x + self.dropout(mixed)

        cross_attention, crossed = None, (past.cross_keys, past.cross_values)
        if context.states is not None and crossed[0] is None:
            crossed = self.crossattention.keys_and_values(context.states)
        if crossed[0] is not None:
            queries = self.crossattention.LayerNorm(x)
            mixed, cross_attention = self.crossattention(
                queries, *crossed, context.states_bias, context, head_mask
            )
            x = x + self.dropout(mixed)

        wide = self.activation(self.intermediate["dense"](self.intermediate["LayerNorm"](x)))
        x = x + self.dropout(self.output["dense"](wide))
        past = Past(keys, values, *crossed) if context.keep_past else None
        return x, Kept(attention, cross_attention, past)


class Encoder(nn.Module):
    """All layers, one after the other."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        context: Context,
        pasts: tuple[Past, ...] | None = None,
        head_mask: Tensor | None = None,
        read: Tensor | None = None,
        keep_streams: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Kept]]:
        """The last layer's [B, L, D]; the N + 1 streams around layers; and what layers kept."""
        streams, kept, last = [x], [], len(self.layer) - 1
        for n, layer in enumerate(self.layer):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False)
            x, found = layer(
                x,
                context,
                Past() if pasts is None else pasts[n],
                head_mask[n] if head_mask is not None and head_mask.ndim == 2 else head_mask,
                read if n == last else None,
            )
            streams = [*streams, x] if keep_streams else []
            kept.append(found)
        return x, streams, kept


class RobertaPreLayerNormModel(PreTrained):
    """The encoder (or decoder) and, unless add_pooling_layer is False, its pooler."""

    options = frozenset({"add_pooling_layer"})

    def __init__(self, config: RobertaPreLayerNormConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.model = "base" if add_pooling_layer else "encoder"
        D = config.hidden_size
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.LayerNorm = nn.LayerNorm(D, config.layer_norm_eps)
        self.pooler = nn.ModuleDict({"dense": nn.Linear(D, D)}) if add_pooling_layer else None
        self.apply(self.initial_values)
        for table in (self.embeddings.word_embeddings, self.embeddings.position_embeddings):
            nn.init.zeros_(table.weight.detach()[config.pad_token_id])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_padding: bool = False,
        first_only: bool = False,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Runs the model. All arguments but input_ids are optional, and of tensors.

        Args:
            input_ids: [B, L] int, each in [0, V).
            attention_mask: [B, L] or [B, L, L], nonzero where a key may be seen; None: all. With
                a cache of T columns, [B, L] of the new columns or [B, T + L] of all.
            token_type_ids: [B, L] int; None: all 0.
            position_ids: [B, L] int; None: counts real tokens, in a cache as well.
            inputs_embeds: [B, L, D] in place of input_ids; positions count every column.
            encoder_hidden_states: [B, S, D], for cross-attention; a cache keeps what it needs.
            encoder_attention_mask: [B, S] or, without a cache, [B, L, S].
            past_key_values: what an earlier call returned.
            use_cache: whether a decoder returns it; None: as the config says, with masks of two
                axes and neither skip_padding nor gradient checkpointing.
            head_mask: [H] or [N, H] float, multiplied to the probabilities after dropout.
            output_attentions, output_hidden_states, return_dict: None: as the config says.
            skip_padding: compute only where attention_mask [B, L] is nonzero: faster on ragged
                batches, the same there, and zero elsewhere.
            first_only: return last_hidden_state [B, 1, D], of the first column, and compute no
                other in the last layer, unless hidden states or attentions are wanted.

        Returns:
            `prelnroberta.pretrained.outputs.BaseModelOutput` of tensors, or a tuple without return_dict.

        Raises:
            InputError: for whatever does not fit, before anything is computed. Values are looked
                at on CPU, shapes always, neither under torch.compile and torch.export.
        """
        config, cache = self.config, past_key_values
        keep_attentions = self.setting(output_attentions, "output_attentions")
        keep_streams = self.setting(output_hidden_states, "output_hidden_states")
        two_axes = all(m is None or m.ndim == 2 for m in (attention_mask, encoder_attention_mask))
        if use_cache is None:
            checkpointing = self.encoder.gradient_checkpointing and self.training
            use_cache = config.use_cache and two_axes and not (skip_padding or checkpointing)
        use_cache = use_cache and config.is_decoder
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "head_mask": head_mask,
        }
        self.check(inputs, cache, use_cache or cache is not None)
        packing = None
        if skip_padding:
            unserved = {
                "a cache": use_cache or cache is not None,
                "encoder_hidden_states": encoder_hidden_states is not None,
                "attentions": keep_attentions,
                "head_mask": head_mask is not None,
            }
            reads_first = first_only or self.pooler is not None
            packing = self.packing(attention_mask, reads_first, unserved)

        if inputs_embeds is None:
            real = input_ids != config.pad_token_id
        else:
            real = torch.ones_like(inputs_embeds[..., 0], dtype=torch.bool)
        if position_ids is None:
            before = 0 if cache is None else cache.count[:, None]
            position_ids = default_position_ids(real, config.pad_token_id, before)
        if cache is None and use_cache:
            cache = Cache.empty(config.num_hidden_layers, real)
        if cache is not None:
            cache = cache.announce(attention_mask, real, encoder_attention_mask)

        x = self.embed(packing, input_ids, inputs_embeds, token_type_ids, position_ids)
        context = self.context(
            x.dtype, real, attention_mask, encoder_attention_mask, cache, packing
        )._replace(
            states=None if encoder_hidden_states is None else encoder_hidden_states.to(x.dtype),
            explicit=keep_attentions,
            keep_past=use_cache,
        )
        narrow, read = first_only and not (keep_streams or keep_attentions), None
        if narrow:
            read = real.new_zeros(1, dtype=torch.long) if packing is None else packing.starts
        x, streams, kept = self.encoder(
            x, context, None if cache is None else cache.layers, head_mask, read, keep_streams
        )
        x = self.LayerNorm(x)
        if packing is not None:
            x = x.transpose(0, 1) if narrow else packing.put(x)
            streams = list(map(packing.put, streams))
        if keep_streams and config.tie_last_hidden_states:
            streams[-1] = x
        crossed = keep_attentions and kept[0].cross_attention is not None
        output = BaseModelOutput(
            last_hidden_state=x,
            pooler_output=None if self.pooler is None else self.pooler["dense"](x[:, 0]).tanh(),
            past_key_values=cache.fill(tuple(k.past for k in kept)) if use_cache else None,
            hidden_states=tuple(streams) if keep_streams else None,
            attentions=tuple(k.attention for k in kept) if keep_attentions else None,
            cross_attentions=tuple(k.cross_attention for k in kept) if crossed else None,
        )
        return output if self.setting(return_dict, "return_dict") else output.to_tuple()

    def embed(
        self,
        packing: Packing | None,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
    ) -> Tensor:
        """[B, L, D], or [1, T, D] of what packing takes."""
        given = (input_ids, inputs_embeds, token_type_ids, position_ids)
        if packing is not None:
            given = map(packing.take, given)
        input_ids, words, token_type_ids, position_ids = given
        table = self.embeddings.word_embeddings
        words = table(input_ids) if words is None else words.to(table.weight.dtype)
        return self.embeddings(words, token_type_ids, position_ids)

    def context(
        self,
        dtype: torch.dtype,
        real: Tensor,
        attention_mask: Tensor | None,
        encoder_attention_mask: Tensor | None,
        cache: Cache | None,
        packing: Packing | None,
    ) -> Context:
        """Who sees whom."""
        if packing is not None:
            return Context(lengths=packing.lengths, causal=self.config.is_decoder)
        if cache is not None:
            visible, encoder_attention_mask = cache.visible(real.shape[1]), cache.cross_valid
        else:
            visible = keys_seen(attention_mask)
            if self.config.is_decoder:
                place = torch.arange(real.shape[1], device=real.device)
                causal = (place <= place[:, None])[None]
                visible = causal if visible is None else visible & causal
        states_bias = bias_of(keys_seen(encoder_attention_mask), dtype)
        return Context(bias_of(visible, dtype), states_bias=states_bias)

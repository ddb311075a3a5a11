"""The encoder in PyTorch: Embeddings -> Attention -> Block -> Encoder.

Computes the same function as `prelnroberta/model/encoder.py`. Attributes have the names of
transformers' `modeling_roberta_prelayernorm.py`, so state dicts are interchangeable.

Shape letters are those of `prelnroberta/params.py`. M is L, or the number of `read_positions`;
T is L plus the columns of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bridges.pytorch.input_checks import is_tracing
from bridges.pytorch.kv_cache import LayerKV
from prelnroberta.config import RobertaPreLayerNormConfig

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


class AttentionContext(NamedTuple):
    """Arguments that all layers share.

    Attributes:
        bias: [B or 1, 1, L or 1, T], added to attention scores: 0, or the lowest number where a
            key is masked. None: every key is visible.
        encoder_hidden_states: [B, S, D], for cross-attention.
        encoder_bias: [B, 1, L or 1, S], as `bias`.
        row_lengths: lengths of the rows in an unpadded batch [1, U]; None: a padded batch.
        causal: whether rows of an unpadded batch are causal; a padded batch has it in `bias`.
        output_attentions: whether to return probabilities, which fused attention does not compute.
        use_cache: whether layers return their keys and values.
    """

    bias: Tensor | None = None
    encoder_hidden_states: Tensor | None = None
    encoder_bias: Tensor | None = None
    row_lengths: tuple[int, ...] | None = None
    causal: bool = False
    output_attentions: bool = False
    use_cache: bool = False


class BlockAux(NamedTuple):
    """What a block returns in addition to its hidden states."""

    attention: Tensor | None = None
    cross_attention: Tensor | None = None
    cache: LayerKV | None = None


def default_position_ids(
    is_token: Tensor, pad_token_id: int, past_count: Tensor | int = 0
) -> Tensor:
    """Positions that count `is_token` [B, L] tokens from pad_token_id + 1; pads get pad_token_id.

    Args:
        past_count: [B, 1], number of non-pad tokens in the cache.
    """
    return (is_token.long().cumsum(-1) + past_count) * is_token + pad_token_id


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def visibility_mask(mask: Tensor | None) -> Tensor | None:
    """A mask [B, T] or [B, L, T] as bool [B, L or 1, T]."""
    if mask is None:
        return None
    return (mask != 0) if mask.ndim == 3 else (mask != 0)[:, None]


def attention_bias(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias [B or 1, 1, L or 1, T] of visible keys, bool [B or 1, L or 1, T].

    Masked keys get the lowest finite number, not -inf: a query without visible keys then attends
    evenly to all, as in Flax, and is never NaN. If bfloat16's lowest number is higher than that of
    `dtype`, it is used, because autocast may round to bfloat16.

    Returns None, which selects a faster attention kernel, if every key is visible.
    """
    if visible is None or _all_visible(visible):
        return None
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill(~visible, lowest)[:, None]


def _all_visible(visible: Tensor) -> bool:
    if is_tracing():
        return False
    try:
        return bool(visible.all())
    except RuntimeError:  # under torch.func.vmap
        return False


class Embeddings(nn.Module):
    """Word + type + position embeddings, LayerNorm, dropout: words [B, L, D] -> [B, L, D].

    The pad rows of the tables are trained, as in Flax; transformers stops their gradient.
    """

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        D = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.LayerNorm = nn.LayerNorm(D, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, words: Tensor, token_type_ids: Tensor | None, position_ids: Tensor) -> Tensor:
        if token_type_ids is None:
            x = words + self.token_type_embeddings.weight[0]
        else:
            x = words + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(position_ids)))


class Attention(nn.Module):
    """Multi-head attention over the block's own tokens or encoder states, and its LayerNorm."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        D = config.hidden_size
        self.head_dim = config.head_dim
        self.dropout_rate = config.attention_probs_dropout_prob
        self.LayerNorm = nn.LayerNorm(D, config.layer_norm_eps)
        self.self = nn.ModuleDict({name: nn.Linear(D, D) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(D, D)})

    def project_heads(self, name: str, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, H, L, K]."""
        return self.self[name](x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.project_heads("key", x), self.project_heads("value", x)

    def forward(
        self,
        normed: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        context: AttentionContext,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of normed [B, M, D] over keys and values [B, H, T, K].

        Returns [B, M, D], and the probabilities [B, H, M, T] if they were computed.
        """
        queries, probabilities = self.project_heads("query", normed), None
        dropout_rate = self.dropout_rate if self.training else 0.0
        if context.row_lengths is not None:
            attended = attend_by_row(
                queries, keys, values, context.row_lengths, dropout_rate, context.causal
            )
        elif context.output_attentions or head_mask is not None:
            scores = at_least_float32(queries * self.head_dim**-0.5 @ keys.mT)
            scores = scores if bias is None else scores + bias
            probabilities = F.dropout(
                scores.softmax(-1).to(queries.dtype), dropout_rate, self.training
            )
            if head_mask is not None:
                probabilities = probabilities * head_mask[:, None, None].to(queries.dtype)
            attended = probabilities @ values
        else:
            attended = F.scaled_dot_product_attention(queries, keys, values, bias, dropout_rate)
        return self.output["dense"](attended.transpose(1, 2).flatten(-2)), probabilities


def attend_by_row(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    row_lengths: tuple[int, ...],
    dropout_rate: float,
    causal: bool,
) -> Tensor:
    """Attention within each row of an unpadded batch, keys and values [1, H, U, K].

    Queries are [1, H, U, K], or [1, H, R, K] for one position of each of the R rows. On CPU a loop
    over rows takes half the time of one call with padding, and a tenth of nested tensors.
    """
    one_query_each = queries.shape[2] != keys.shape[2]
    rows = zip(
        queries.split(1 if one_query_each else row_lengths, 2),
        keys.split(row_lengths, 2),
        values.split(row_lengths, 2),
        strict=True,
    )
    return torch.cat(
        [F.scaled_dot_product_attention(*row, None, dropout_rate, causal) for row in rows], 2
    )


class Block(nn.Module):
    """One pre-LayerNorm layer: self-attention, cross-attention if the model has it, and MLP."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        D, mlp_size = config.hidden_size, config.intermediate_size
        self.attention = Attention(config)
        if config.add_cross_attention:
            self.crossattention = Attention(config)
        self.intermediate = nn.ModuleDict(
            {"LayerNorm": nn.LayerNorm(D, config.layer_norm_eps), "dense": nn.Linear(D, mlp_size)}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp_size, D)})
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        x: Tensor,
        context: AttentionContext,
        past: LayerKV,
        head_mask: Tensor | None = None,
        read_positions: Tensor | None = None,
    ) -> tuple[Tensor, BlockAux]:
        """[B, L, D] -> [B, L, D], or [B, M, D] at `read_positions` [M] alone.

        The latter is exact: only keys and values mix positions.
        """
        normed, bias = self.attention.LayerNorm(x), context.bias
        keys, values = self.attention.keys_and_values(normed)
        if past.keys is not None:
            keys = torch.cat([past.keys, keys], 2)
            values = torch.cat([past.values, values], 2)
        if read_positions is not None:
            normed, x = normed.index_select(1, read_positions), x.index_select(1, read_positions)
            if bias is not None and bias.shape[2] != 1:
                bias = bias.index_select(2, read_positions)
        attended, probabilities = self.attention(normed, keys, values, bias, context, head_mask)
        x = x + self.dropout(attended)

        cross_probabilities, cross_kv = None, self.cross_keys_and_values(context, past)
        if cross_kv[0] is not None:
            normed = self.crossattention.LayerNorm(x)
            attended, cross_probabilities = self.crossattention(
                normed, *cross_kv, context.encoder_bias, context, head_mask
            )
            x = x + self.dropout(attended)

        x = x + self.dropout(self.mlp(x))
        cache = LayerKV(keys, values, *cross_kv) if context.use_cache else None
        return x, BlockAux(probabilities, cross_probabilities, cache)

    def cross_keys_and_values(
        self, context: AttentionContext, past: LayerKV
    ) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of the encoder states: cached, projected, or (None, None) without any."""
        if context.encoder_hidden_states is not None and past.cross_keys is None:
            return self.crossattention.keys_and_values(context.encoder_hidden_states)
        return past.cross_keys, past.cross_values

    def mlp(self, x: Tensor) -> Tensor:
        normed = self.intermediate["LayerNorm"](x)
        return self.output["dense"](self.activation(self.intermediate["dense"](normed)))


class Encoder(nn.Module):
    """All blocks, one after the other."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        self.layer = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        context: AttentionContext,
        past: tuple[LayerKV, ...] | None = None,
        head_mask: Tensor | None = None,
        read_positions: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[BlockAux]]:
        """Runs the blocks, the last one at `read_positions` alone.

        Returns the last block's output [B, L, D], the N + 1 hidden states before and after blocks
        if requested, and what each block returns in addition.
        """
        hidden_states, auxes, last = [x], [], len(self.layer) - 1
        for n, block in enumerate(self.layer):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            x, aux = block(
                x,
                context,
                LayerKV() if past is None else past[n],
                head_mask[n] if head_mask is not None and head_mask.ndim == 2 else head_mask,
                read_positions if n == last else None,
            )
            hidden_states = [*hidden_states, x] if output_hidden_states else []
            auxes.append(aux)
        return x, hidden_states, auxes

"""`RobertaPreLayerNormModel`: embeddings, encoder, final LayerNorm and pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bridges.pytorch.encoder import (
    AttentionContext,
    BlockAux,
    Embeddings,
    Encoder,
    attention_bias,
    default_position_ids,
    visibility_mask,
)
from bridges.pytorch.input_checks import check_inputs
from bridges.pytorch.kv_cache import KVCache
from bridges.pytorch.pretrained import PreTrainedModel
from bridges.pytorch.unpadding import Unpadding
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.pretrained.outputs import BaseModelOutput


class RobertaPreLayerNormModel(PreTrainedModel):
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
        self.apply(self.init_weights)
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
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_padding: bool = False,
        first_only: bool = False,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Runs the model. Either input_ids or inputs_embeds is required.

        Args:
            input_ids: [B, L] int, each in [0, V).
            attention_mask: [B, L] or [B, L, L], nonzero where a key is visible; None: all. With
                a cache of T columns, [B, L] of the new columns or [B, T + L] of all.
            token_type_ids: [B, L] int; None: all 0.
            position_ids: [B, L] int; None: counts non-pad tokens, cached ones included.
            inputs_embeds: [B, L, D] in place of input_ids; positions count every column.
            encoder_hidden_states: [B, S, D], for cross-attention; a cache keeps what it needs.
            encoder_attention_mask: [B, S] or, without a cache, [B, L, S].
            past_key_values: returned by an earlier call.
            use_cache: whether a decoder returns a cache; None: the config's value, but False for
                masks of three axes, skip_padding and gradient checkpointing.
            head_mask: [H] or [N, H] float, multiplies the probabilities after dropout.
            output_attentions, output_hidden_states, return_dict: None: the config's values.
            skip_padding: compute only where attention_mask [B, L] is nonzero. Faster for ragged
                batches; the same results there, and 0 at padded positions.
            first_only: return last_hidden_state [B, 1, D] of the first column, and compute only
                this column in the last layer, unless hidden states or attentions are requested.

        Returns:
            `prelnroberta.pretrained.outputs.BaseModelOutput` of tensors, or a tuple if return_dict
            is False.

        Raises:
            InputError: invalid inputs, before anything is computed. Shapes are always checked,
                values on CPU only; neither under torch.compile and torch.export.
        """
        output_attentions = self._or_config(output_attentions, "output_attentions")
        output_hidden_states = self._or_config(output_hidden_states, "output_hidden_states")
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
        use_cache = self._resolve_use_cache(use_cache, inputs, skip_padding)
        with_cache = use_cache or past_key_values is not None
        check_inputs(self.config, inputs, past_key_values, with_cache)
        unpadding = None
        if skip_padding:
            unpadding = self._find_unpadding(inputs, with_cache, output_attentions, first_only)

        is_token = self._is_token(input_ids, inputs_embeds)
        position_ids = self._position_ids(position_ids, is_token, past_key_values)
        cache = past_key_values
        if cache is None and use_cache:
            cache = KVCache.empty(self.config.num_hidden_layers, is_token)
        if cache is not None:
            cache = cache.append_mask(attention_mask, is_token, encoder_attention_mask)

        x = self._embed(unpadding, input_ids, inputs_embeds, token_type_ids, position_ids)
        context = self._attention_context(inputs, x.dtype, is_token, cache, unpadding)
        context = context._replace(output_attentions=output_attentions, use_cache=use_cache)
        read_positions = None
        if first_only and not (output_hidden_states or output_attentions):
            first = is_token.new_zeros(1, dtype=torch.long)
            read_positions = first if unpadding is None else unpadding.row_starts
        x, hidden_states, auxes = self.encoder(
            x,
            context,
            None if cache is None else cache.layers,
            head_mask,
            read_positions,
            output_hidden_states,
        )
        x = self.LayerNorm(x)
        if unpadding is not None:
            x = unpadding.pad(x) if read_positions is None else x.transpose(0, 1)
            hidden_states = list(map(unpadding.pad, hidden_states))
        if output_hidden_states and self.config.tie_last_hidden_states:
            hidden_states[-1] = x
        output = self._make_output(x, hidden_states, auxes, cache, context)
        if self._or_config(return_dict, "return_dict"):
            return output
        return output.to_tuple()

    def _resolve_use_cache(
        self, use_cache: bool | None, inputs: Mapping[str, Tensor | None], skip_padding: bool
    ) -> bool:
        """Whether to return a cache; only a decoder does."""
        if use_cache is None:
            masks = (inputs["attention_mask"], inputs["encoder_attention_mask"])
            two_axes = all(mask is None or mask.ndim == 2 for mask in masks)
            checkpointing = self.encoder.gradient_checkpointing and self.training
            use_cache = self.config.use_cache and two_axes and not (skip_padding or checkpointing)
        return use_cache and self.config.is_decoder

    def _find_unpadding(
        self,
        inputs: Mapping[str, Tensor | None],
        with_cache: bool,
        output_attentions: bool,
        first_only: bool,
    ) -> Unpadding | None:
        """Where the tokens are; None if there is no padding to skip.

        Raises:
            InputError: options that skip_padding does not support, a mask of three axes, or a row
                that starts with padding in a model that reads its first position.
        """
        unsupported = {
            "a cache": with_cache,
            "encoder_hidden_states": inputs["encoder_hidden_states"] is not None,
            "attentions": output_attentions,
            "head_mask": inputs["head_mask"] is not None,
        }
        requested = [name for name, is_requested in unsupported.items() if is_requested]
        if requested:
            raise InputError(f"skip_padding: does not go with {', '.join(requested)}")
        mask = inputs["attention_mask"]
        if mask is None or bool(mask.all()):
            return None
        if mask.ndim != 2:
            raise InputError(f"skip_padding: attention_mask has {mask.ndim} axes, expected [B, L]")
        if (first_only or self.pooler is not None) and not bool(mask[:, 0].all()):
            raise InputError(
                "skip_padding: a row begins with padding, where this model reads the row: pad on "
                "the right"
            )
        return Unpadding.from_mask(mask)

    def _is_token(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """[B, L] bool, tokens that count for positions; embeddings have no pads."""
        if inputs_embeds is None:
            return input_ids != self.config.pad_token_id
        return torch.ones_like(inputs_embeds[..., 0], dtype=torch.bool)

    def _position_ids(
        self, position_ids: Tensor | None, is_token: Tensor, past: KVCache | None
    ) -> Tensor:
        if position_ids is not None:
            return position_ids
        past_count = 0 if past is None else past.count[:, None]
        return default_position_ids(is_token, self.config.pad_token_id, past_count)

    def _embed(
        self,
        unpadding: Unpadding | None,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
    ) -> Tensor:
        """[B, L, D], or [1, U, D] without padding."""
        inputs = (input_ids, inputs_embeds, token_type_ids, position_ids)
        if unpadding is not None:
            inputs = map(unpadding.unpad, inputs)
        input_ids, words, token_type_ids, position_ids = inputs
        table = self.embeddings.word_embeddings
        words = table(input_ids) if words is None else words.to(table.weight.dtype)
        return self.embeddings(words, token_type_ids, position_ids)

    def _attention_context(
        self,
        inputs: Mapping[str, Tensor | None],
        dtype: torch.dtype,
        is_token: Tensor,
        cache: KVCache | None,
        unpadding: Unpadding | None,
    ) -> AttentionContext:
        """Which keys and encoder states each query sees, as biases in `dtype`."""
        if unpadding is not None:
            return AttentionContext(row_lengths=unpadding.lengths, causal=self.config.is_decoder)
        L = is_token.shape[1]
        if cache is not None:
            visible, encoder_mask = cache.visible(L), cache.cross_valid
        else:
            visible = visibility_mask(inputs["attention_mask"])
            encoder_mask = inputs["encoder_attention_mask"]
            if self.config.is_decoder:
                position = torch.arange(L, device=is_token.device)
                causal = (position <= position[:, None])[None]
                visible = causal if visible is None else visible & causal
        encoder_bias = attention_bias(visibility_mask(encoder_mask), dtype)
        states = inputs["encoder_hidden_states"]
        return AttentionContext(
            bias=attention_bias(visible, dtype),
            encoder_hidden_states=None if states is None else states.to(dtype),
            encoder_bias=encoder_bias,
        )

    def _make_output(
        self,
        x: Tensor,
        hidden_states: list[Tensor],
        auxes: list[BlockAux],
        cache: KVCache | None,
        context: AttentionContext,
    ) -> BaseModelOutput:
        has_cross = context.output_attentions and auxes[0].cross_attention is not None
        layer_kvs = tuple(aux.cache for aux in auxes)
        probabilities = tuple(aux.attention for aux in auxes)
        cross_probabilities = tuple(aux.cross_attention for aux in auxes)
        return BaseModelOutput(
            last_hidden_state=x,
            pooler_output=None if self.pooler is None else self.pooler["dense"](x[:, 0]).tanh(),
            past_key_values=cache.write_kv(layer_kvs) if context.use_cache else None,
            hidden_states=tuple(hidden_states) or None,
            attentions=probabilities if context.output_attentions else None,
            cross_attentions=cross_probabilities if has_cross else None,
        )

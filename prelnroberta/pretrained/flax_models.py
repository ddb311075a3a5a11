"""The seven Flax* classes: each holds `params` and calls a pure module of `model/heads.py`.

Names, arguments and outputs are those of the Flax classes of transformers 4.57
(`modeling_flax_roberta_prelayernorm.py`). In addition, every class takes `labels` and
`inputs_embeds` and checks its inputs on the host. All computation is in `module`, which also works
alone under jit, grad, vmap and pmap. The base class is in `base.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.inference.generation import GenerationOutput, generate
from prelnroberta.inference.generation_config import GenerationConfig
from prelnroberta.model import heads, losses
from prelnroberta.model.encoder import (
    Encoder,
    EncoderOutput,
    TableModule,
    project_encoder_states,
)
from prelnroberta.model.kv_cache import KVCache
from prelnroberta.params import Tree
from prelnroberta.pretrained import outputs
from prelnroberta.pretrained.base import FlaxRobertaPreLayerNormPreTrainedModel
from prelnroberta.pretrained.input_checks import check_prng_key, check_span_positions

Array = jax.Array


class FlaxRobertaPreLayerNormModel(FlaxRobertaPreLayerNormPreTrainedModel):
    """The encoder (or decoder) and, unless add_pooling_layer is False, its pooler. No labels."""

    options = FlaxRobertaPreLayerNormPreTrainedModel.options | {"add_pooling_layer"}
    supports_cache = True

    def __init__(
        self,
        config: RobertaPreLayerNormConfig,
        *args: Any,
        add_pooling_layer: bool = True,
        **kwargs: Any,
    ):
        self.model = "base" if add_pooling_layer else "encoder"
        self.module_class = heads.Base if add_pooling_layer else Encoder
        super().__init__(config, *args, **kwargs)

    def _make_output(
        self, pooled: Array | None, encoded: EncoderOutput, targets: Mapping[str, Any]
    ) -> outputs.BaseModelOutput:
        return outputs.BaseModelOutput(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=pooled,
            past_key_values=encoded.cache,
            cross_attentions=encoded.cross_attentions,
            **self._hidden_fields(encoded),
        )


class FlaxRobertaPreLayerNormForMaskedLM(FlaxRobertaPreLayerNormPreTrainedModel):
    """logits [B, L, V] of the token at each position; labels [B, L] int."""

    model = "masked_lm"
    module_class = heads.MaskedLM


@dataclasses.dataclass(frozen=True)
class _DecodeFn:
    """A decoding step as a `generation.DecodeFn`. Equal for equal modules, so it compiles once."""

    module: TableModule

    def __call__(
        self, params: Tree, input_ids: Array, attention_mask: Array, cache: KVCache
    ) -> tuple[Array, KVCache]:
        output: Any
        logits, output = self.module.apply(
            {"params": params}, input_ids, attention_mask=attention_mask, cache=cache
        )
        return logits, output.cache


class FlaxRobertaPreLayerNormForCausalLM(FlaxRobertaPreLayerNormPreTrainedModel):
    """logits [B, L, V] of the token after each position; labels [B, L] int, shifted inside.

    The config must have is_decoder=True, otherwise each token sees the token it predicts.
    """

    model = "causal_lm"
    module_class = heads.CausalLM
    supports_cache = True

    def __init__(self, config: RobertaPreLayerNormConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if not config.is_decoder:
            raise InputError(
                f"{type(self).__name__}: config has is_decoder=False, expected True "
                "(from_pretrained(..., is_decoder=True) sets it)"
            )

    def _make_output(
        self, logits: Array, encoded: EncoderOutput, targets: Mapping[str, Any]
    ) -> outputs.CausalLMOutput:
        return outputs.CausalLMOutput(
            loss=self.loss(logits, targets["labels"]) if targets else None,
            logits=logits,
            past_key_values=encoded.cache,
            cross_attentions=encoded.cross_attentions,
            **self._hidden_fields(encoded),
        )

    def loss(self, logits: Array, labels: Array) -> Array:
        return losses.causal_lm_scores(logits, jnp.asarray(labels)).mean

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        prng_key: Array | None = None,
        params: Tree | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        **options: Any,
    ) -> GenerationOutput:
        """Continues prompts [B, L]; each row may have pads anywhere.

        Args:
            attention_mask: [B, L]; None: every token but the pad id.
            prng_key: a jax PRNG key, required for sampling.
            encoder_hidden_states, encoder_attention_mask: [B, S, D] and [B, S].
            options: fields of `generation_config.GenerationConfig`; eos_token_id and pad_token_id
                default to the config's.

        Raises:
            InputError: for prompts or options that are invalid, or rows that would exceed the
                model's positions.
        """
        params = self.params if params is None else self._checked_params(params)
        params = self._params_for_inference(params)
        if prng_key is not None:
            check_prng_key("prng_key", prng_key)
        inputs = self._checked_inputs(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        if np.ndim(encoder_attention_mask) == 3:
            raise InputError("encoder_attention_mask: generate takes one of shape [B, S]")
        ids = inputs["input_ids"]
        generation_config = GenerationConfig(
            **{
                "eos_token_id": self.config.eos_token_id,
                "pad_token_id": self.config.pad_token_id,
                **options,
            }
        )
        _, max_new_tokens = generation_config.new_token_bounds(ids.shape[1])
        return generate(
            _DecodeFn(self.module),
            params,
            self._generation_cache(params, inputs, max_new_tokens),
            ids,
            inputs.get("attention_mask", ids != self.config.pad_token_id),
            generation_config,
            prng_key,
        )

    def _generation_cache(
        self, params: Tree, inputs: Mapping[str, Any], max_new_tokens: int
    ) -> KVCache:
        """A cache for prompts and their continuations, with the encoder states if there are any.

        Raises:
            InputError: if a row would exceed the model's positions.
        """
        ids = inputs["input_ids"]
        B, L = ids.shape
        if not isinstance(ids, jax.core.Tracer):
            longest = int((np.asarray(ids) != self.config.pad_token_id).sum(-1).max())
            self.config.check_length(longest + max_new_tokens - 1, "a prompt and its continuation")
        cache = self.init_cache(B, L + max_new_tokens - 1)
        if "encoder_hidden_states" in inputs:
            states = jnp.asarray(inputs["encoder_hidden_states"], self.dtype)
            cache |= project_encoder_states(
                params["encoder"]["layers"], states, inputs.get("encoder_attention_mask")
            )
        return cache


class FlaxRobertaPreLayerNormForSequenceClassification(FlaxRobertaPreLayerNormPreTrainedModel):
    """logits [B, C]; labels [B] int, [B, C] float (multi-label), or [B] or [B, C] (regression).

    config.problem_type selects one of the three. If it is None: regression for num_labels=1,
    otherwise by the dtype of the labels.
    """

    model = "sequence_classification"
    module_class = heads.SequenceClassification

    def loss(self, logits: Array, labels: Array) -> Array:
        return losses.sequence_scores(self.config, logits, jnp.asarray(labels)).mean


class FlaxRobertaPreLayerNormForMultipleChoice(FlaxRobertaPreLayerNormPreTrainedModel):
    """logits [B, A] for inputs [B, A, L] (inputs_embeds [B, A, L, D]); labels [B] int."""

    model = "multiple_choice"
    module_class = heads.MultipleChoice


class FlaxRobertaPreLayerNormForTokenClassification(FlaxRobertaPreLayerNormPreTrainedModel):
    """logits [B, L, C]; labels [B, L] int."""

    model = "token_classification"
    module_class = heads.TokenClassification


class FlaxRobertaPreLayerNormForQuestionAnswering(FlaxRobertaPreLayerNormPreTrainedModel):
    """start_logits and end_logits [B, L]; start_positions and end_positions [B] int."""

    model = "question_answering"
    module_class = heads.QuestionAnswering

    def _check_targets(self, targets: Mapping[str, Any], input_shape: tuple[int, ...]) -> None:
        for name, positions in targets.items():
            check_span_positions(name, positions, input_shape[0])

    def _make_output(
        self, logits: Array, encoded: EncoderOutput, targets: Mapping[str, Any]
    ) -> outputs.QuestionAnsweringOutput:
        loss = None
        if targets:
            start, end = (jnp.asarray(targets[f"{side}_positions"]) for side in ("start", "end"))
            starts, ends = losses.span_scores(logits, start, end)
            loss = (starts.mean + ends.mean) / 2
        return outputs.QuestionAnsweringOutput(
            loss=loss,
            start_logits=logits[..., 0],
            end_logits=logits[..., 1],
            **self._hidden_fields(encoded),
        )

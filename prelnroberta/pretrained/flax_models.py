"""The seven Flax* classes: owners of `params` around the pure modules of `heads.py`.

Names, arguments and outputs are those of transformers 4.57's Flax classes
(`modeling_flax_roberta_prelayernorm.py`), and more: every class takes `labels` and
`inputs_embeds` and checks its input on the host. All that is computed is in `module`, which can be
used alone under jit, grad, vmap and pmap. What the classes share is in `pretrained_base.py`.
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
from prelnroberta.model import heads, losses
from prelnroberta.model.encoder import Encoder, EncoderOutput, project_encoder_states
from prelnroberta.model.kv_cache import KVCache
from prelnroberta.params import Tree
from prelnroberta.pretrained import outputs
from prelnroberta.pretrained.base import FlaxRobertaPreLayerNormPreTrainedModel
from prelnroberta.pretrained.input_checks import as_array, check_inputs, check_key, check_span

Array = jax.Array


class FlaxRobertaPreLayerNormModel(FlaxRobertaPreLayerNormPreTrainedModel):
    """The encoder (or decoder) and, unless add_pooling_layer is False, its pooler: no labels."""

    options = FlaxRobertaPreLayerNormPreTrainedModel.options | {"add_pooling_layer"}
    decodes = True

    def __init__(
        self,
        config: RobertaPreLayerNormConfig,
        *args: Any,
        add_pooling_layer: bool = True,
        **named: Any,
    ):
        self.model = "base" if add_pooling_layer else "encoder"
        self.module_class = heads.Base if add_pooling_layer else Encoder
        super().__init__(config, *args, **named)

    def _output(
        self, pooled: Array | None, encoded: EncoderOutput, targets: Mapping[str, Any]
    ) -> outputs.BaseModelOutput:
        return outputs.BaseModelOutput(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=pooled,
            past_key_values=encoded.cache,
            cross_attentions=encoded.cross_attentions,
            **self._hidden(encoded),
        )


class FlaxRobertaPreLayerNormForMaskedLM(FlaxRobertaPreLayerNormPreTrainedModel):
    """logits [B, L, V] of the token at each position; labels [B, L] int."""

    model = "masked_lm"
    module_class = heads.MaskedLM


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """One decoding step as `generation.Decode`: equal for equal modules, so it compiles once."""

    module: heads.CausalLM

    def __call__(
        self, params: Tree, input_ids: Array, attention_mask: Array, cache: KVCache
    ) -> tuple[Array, KVCache]:
        named = {"attention_mask": attention_mask, "cache": cache}
        logits, output = self.module.apply({"params": params}, input_ids, **named)
        return logits, output.cache


class FlaxRobertaPreLayerNormForCausalLM(FlaxRobertaPreLayerNormPreTrainedModel):
    """logits [B, L, V] of the token after each position; labels [B, L] int, shifted inside.

    The config must have is_decoder, or every token sees what it predicts.
    """

    model = "causal_lm"
    module_class = heads.CausalLM
    decodes = True

    def __init__(self, config: RobertaPreLayerNormConfig, *args: Any, **named: Any):
        super().__init__(config, *args, **named)
        if not config.is_decoder:
            raise InputError(
                f"{type(self).__name__}: config has is_decoder=False, expected True "
                "(from_pretrained(..., is_decoder=True) changes it)"
            )

    def _output(
        self, logits: Array, encoded: EncoderOutput, targets: Mapping[str, Any]
    ) -> outputs.CausalLMOutput:
        return outputs.CausalLMOutput(
            loss=self.loss(logits, targets["labels"]) if targets else None,
            logits=logits,
            past_key_values=encoded.cache,
            cross_attentions=encoded.cross_attentions,
            **self._hidden(encoded),
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
        **settings: Any,
    ) -> Any:
        """Continues prompts [B, L], padded on either side or amid.

        Args:
            attention_mask: [B, L]; None: whatever is not the pad id.
            prng_key: to sample.
            encoder_hidden_states, encoder_attention_mask: [B, S, D] and [B, S].
            settings: fields of `generation_settings.Generation`.

        Returns:
            `generation.GenerationOutput`.

        Raises:
            InputError: prompts or settings that don't fit, or rows that would outgrow the
                model's positions.
        """
        from prelnroberta.inference.generation import generate
        from prelnroberta.inference.generation_config import GenerationConfig

        tree = self._prepared(self.params if params is None else self._checked(params))
        if prng_key is not None:
            check_key("prng_key", prng_key)
        input_ids = as_array("input_ids", input_ids)
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        given = {
            "input_ids": input_ids,
            "attention_mask": as_array("attention_mask", attention_mask),
            "encoder_hidden_states": as_array("encoder_hidden_states", encoder_hidden_states),
            "encoder_attention_mask": as_array("encoder_attention_mask", encoder_attention_mask),
        }
        check_inputs(self.config, given)
        if np.ndim(encoder_attention_mask) == 3:
            raise InputError("encoder_attention_mask: generate takes one of shape [B, S]")
        ends = {"eos_token_id": self.config.eos_token_id, "pad_token_id": self.config.pad_token_id}
        wanted = GenerationConfig(**{**ends, **settings})
        B, L = input_ids.shape
        _, most = wanted.new_token_bounds(L)
        if not isinstance(input_ids, jax.core.Tracer):
            longest = int((np.asarray(input_ids) != self.config.pad_token_id).sum(-1).max())
            self.config.check_length(longest + most - 1, "a prompt and its continuation")
        cache = self.init_cache(B, L + most - 1)
        if encoder_hidden_states is not None:
            states = jnp.asarray(given["encoder_hidden_states"], self.dtype)
            cache |= project_encoder_states(
                tree["encoder"]["layers"], states, given["encoder_attention_mask"]
            )
        return generate(
            _Decoder(self.module), tree, cache, input_ids, given["attention_mask"], wanted, prng_key
        )


class FlaxRobertaPreLayerNormForSequenceClassification(FlaxRobertaPreLayerNormPreTrainedModel):
    """logits [B, C]; labels [B] int, or [B, C] float of several labels, or [B(, C)] to regress on.

    Which of the three is config.problem_type or, if None: regression for num_labels=1, else by the
    labels' dtype.
    """

    model = "sequence_classification"
    module_class = heads.SequenceClassification

    def loss(self, logits: Array, labels: Array) -> Array:
        return losses.sequence_scores(self.config, logits, jnp.asarray(labels)).mean


class FlaxRobertaPreLayerNormForMultipleChoice(FlaxRobertaPreLayerNormPreTrainedModel):
    """logits [B, C] of inputs with an axis of choices, [B, C, L] (inputs_embeds [B, C, L, D]);
    labels [B] int.
    """

    model = "multiple_choice"
    module_class = heads.MultipleChoice


class FlaxRobertaPreLayerNormForTokenClassification(FlaxRobertaPreLayerNormPreTrainedModel):
    """logits [B, L, C]; labels [B, L] int."""

    model = "token_classification"
    module_class = heads.TokenClassification


class FlaxRobertaPreLayerNormForQuestionAnswering(FlaxRobertaPreLayerNormPreTrainedModel):
    """start_logits and end_logits [B, L]; start_positions and end_positions [B] int for labels."""

    model = "question_answering"
    module_class = heads.QuestionAnswering

    def _check_targets(self, targets: Mapping[str, Any], logits: jax.ShapeDtypeStruct) -> None:
        for name, positions in targets.items():
            check_span(name, positions, logits.shape[0])

    def _output(
        self, logits: Array, encoded: EncoderOutput, targets: Mapping[str, Any]
    ) -> outputs.QuestionAnsweringOutput:
        loss = None
        if targets:
            positions = (jnp.asarray(targets[f"{side}_positions"]) for side in ("start", "end"))
            starts, ends = losses.span_scores(logits, *positions)
            loss = (starts.mean + ends.mean) / 2
        return outputs.QuestionAnsweringOutput(
            loss=loss,
            start_logits=logits[..., 0],
            end_logits=logits[..., 1],
            **self._hidden(encoded),
        )

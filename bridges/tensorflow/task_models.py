"""The seven TF* classes: their heads, losses and metrics, and generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bridges.tensorflow import generation, heads, losses
from bridges.tensorflow.encoder import (
    Dropout,
    EncoderOutput,
    Projection,
    project_encoder_states,
)
from bridges.tensorflow.generation import GenerationOutput
from bridges.tensorflow.input_checks import to_tensor
from bridges.tensorflow.kv_cache import KVCache
from bridges.tensorflow.losses import Scores
from bridges.tensorflow.outputs import ModelOutput, make_output
from bridges.tensorflow.pretrained import (
    DECODER_ARGUMENTS,
    PER_TOKEN_ARGUMENTS,
    TFRobertaPreLayerNormPreTrainedModel,
    weigh_labels,
)
from bridges.tensorflow.shapes import shape_list
from prelnroberta.config import SINGLE_LABEL, RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.inference.generation_config import GenerationConfig
from prelnroberta.pretrained.input_checks import as_array, check_inputs, check_span_positions

Tensor = tf.Tensor
_registered = keras.saving.register_keras_serializable(package="prelnroberta")


@_registered
class TFRobertaPreLayerNormModel(TFRobertaPreLayerNormPreTrainedModel):
    """The encoder (or decoder) and, unless add_pooling_layer is False, its pooler."""

    target_names = ()
    options = TFRobertaPreLayerNormPreTrainedModel.options | {"add_pooling_layer"}

    def __init__(
        self, config: RobertaPreLayerNormConfig, *, add_pooling_layer: bool = True, **options: Any
    ):
        self.model = self.resolve_model({"add_pooling_layer": add_pooling_layer})
        super().__init__(config, **options)

    @classmethod
    def resolve_model(cls, options: Mapping[str, Any]) -> str:
        return "base" if options.get("add_pooling_layer", True) else "encoder"

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "add_pooling_layer": self.model == "base"}

    @property
    def argument_names(self) -> tuple[str, ...]:
        return (*super().argument_names, *DECODER_ARGUMENTS)

    def make_head(self) -> None:
        if self.model == "base":
            self.pooler = heads.Pooler(self.config)

    def compute_head(
        self, encoded: EncoderOutput, dropout: Dropout, input_shape: list[Any]
    ) -> ModelOutput:
        hidden = encoded.last_hidden_state
        pooled = self.pooler(hidden) if self.model == "base" else None
        return make_output(last_hidden_state=hidden, pooler_output=pooled)


@_registered
class TFRobertaPreLayerNormForMaskedLM(TFRobertaPreLayerNormPreTrainedModel):
    """Logits [B, L, V]; labels [B, L]."""

    model = "masked_lm"

    def make_head(self) -> None:
        self.lm_head = heads.LanguageModelHead(self.config)

    def compute_head(
        self, encoded: EncoderOutput, dropout: Dropout, input_shape: list[Any]
    ) -> ModelOutput:
        word_table = self.embeddings.word.value
        return make_output(logits=self.lm_head(encoded.last_hidden_state, word_table))


@_registered
class TFRobertaPreLayerNormForCausalLM(TFRobertaPreLayerNormForMaskedLM):
    """Logits [B, L, V] at t predict the token at t + 1; labels [B, L] are shifted inside.

    The config must have is_decoder=True: otherwise each token would see the one it predicts.
    """

    model = "causal_lm"

    def __init__(self, config: RobertaPreLayerNormConfig, **options: Any):
        if isinstance(config, RobertaPreLayerNormConfig) and not config.is_decoder:
            raise InputError(
                f"{type(self).__name__}: config has is_decoder=False, expected True "
                "(from_pretrained(..., is_decoder=True) changes it)"
            )
        super().__init__(config, **options)

    @property
    def argument_names(self) -> tuple[str, ...]:
        return (*super().argument_names, *DECODER_ARGUMENTS)

    def scores(self, output: ModelOutput, targets: Mapping[str, Tensor]) -> Scores:
        return losses.causal_lm_scores(output["logits"], to_tensor(targets["labels"]))

    def metric_inputs(
        self, output: ModelOutput, targets: Mapping[str, Tensor]
    ) -> tuple[Any, Any, Any]:
        return weigh_labels(to_tensor(targets["labels"])[:, 1:], output["logits"][:, :-1])

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        seed: int = 0,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        **settings: Any,
    ) -> GenerationOutput:
        """Continues prompts [B, L], padded anywhere.

        Args:
            attention_mask: [B, L]; None: everything but the pad id is visible.
            seed: for sampling.
            encoder_hidden_states, encoder_attention_mask: [B, S, D] and [B, S].
            settings: fields of `prelnroberta.inference.generation_config.GenerationConfig`.

        Raises:
            InputError: invalid prompts or settings, or rows that would exceed the model's
                positions.
        """
        input_ids = np.asarray(as_array("input_ids", input_ids))
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        inputs = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
        defaults = {
            "eos_token_id": self.config.eos_token_id,
            "pad_token_id": self.config.pad_token_id,
        }
        check_inputs(self.config, inputs)
        self._check_prompts(input_ids, inputs["attention_mask"] != 0)
        generation_config = GenerationConfig(**{**defaults, **settings})
        self._check_generation(generation_config, input_ids)
        tensors = {name: to_tensor(value) for name, value in inputs.items()}
        specs = tuple((name, tf.TensorSpec.from_tensor(x)) for name, x in tensors.items())
        compiled = self._compile_generate(generation_config, specs)
        return compiled(tensors, tf.constant([seed, 0], tf.int32))

    def _check_prompts(self, input_ids: np.ndarray, mask: np.ndarray) -> None:
        if mask.shape != input_ids.shape or not mask.any(axis=1).all():
            raise InputError(
                f"generate: attention_mask {list(mask.shape)}, expected {list(input_ids.shape)} "
                "with a token in every row"
            )

    def _check_generation(self, settings: GenerationConfig, input_ids: np.ndarray) -> None:
        V = self.config.vocab_size
        for token in (*settings.eos_token_ids, settings.pad_token_id):
            if token >= V:
                raise InputError(f"generation: eos or pad id {token}, expected one in [0, V={V})")
        _, max_new = settings.new_token_bounds(input_ids.shape[1])
        longest = int((input_ids != self.config.pad_token_id).sum(-1).max())
        self.config.check_length(longest + max_new - 1, "a prompt and its continuation")

    @functools.cached_property
    def _compile_generate(self) -> Callable[..., Callable[..., GenerationOutput]]:
        """(settings, input specs) -> generation as one graph, traced once for each of them."""

        def decode(input_ids: Tensor, mask: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
            output = self(input_ids, mask, past_key_values=cache, return_dict=True)
            return output["logits"], output["past_key_values"]

        @functools.cache
        def compile_generate(
            settings: GenerationConfig, specs: tuple[tuple[str, tf.TensorSpec], ...]
        ) -> Callable[[dict[str, Tensor], Tensor], GenerationOutput]:
            def run(inputs: dict[str, Tensor], seed: Tensor) -> GenerationOutput:
                input_ids = inputs["input_ids"]
                B, L = input_ids.shape
                _, max_new = settings.new_token_bounds(L)
                cache = self.init_cache(B, L + max_new - 1)
                if "encoder_hidden_states" in inputs:
                    states = tf.cast(inputs["encoder_hidden_states"], self.compute_dtype)
                    encoder_mask = inputs.get("encoder_attention_mask")
                    cache |= project_encoder_states(self.encoder, states, encoder_mask)
                mask = tf.cast(inputs["attention_mask"] != 0, tf.int32)
                return generation.generate(decode, settings, cache, input_ids, mask, seed)

            traced = tf.function(run, autograph=False)
            return traced.get_concrete_function(dict(specs), tf.TensorSpec([2], tf.int32))

        return compile_generate


@_registered
class TFRobertaPreLayerNormForSequenceClassification(TFRobertaPreLayerNormPreTrainedModel):
    """Logits [B, C]; labels [B] int, [B, C] float, or in regression [B(, C)] float."""

    model = "sequence_classification"
    reads_first_position = True

    def make_head(self) -> None:
        self.classifier = heads.ClassificationHead(self.config)

    def compute_head(
        self, encoded: EncoderOutput, dropout: Dropout, input_shape: list[Any]
    ) -> ModelOutput:
        return make_output(logits=self.classifier(encoded.last_hidden_state[:, 0], dropout=dropout))

    def scores(self, output: ModelOutput, targets: Mapping[str, Tensor]) -> Scores:
        return losses.sequence_scores(self.config, output["logits"], to_tensor(targets["labels"]))

    def metric_inputs(
        self, output: ModelOutput, targets: Mapping[str, Tensor]
    ) -> tuple[Any, Any, Any]:
        labels = to_tensor(targets["labels"])
        if losses.infer_problem_type(self.config, labels) == SINGLE_LABEL:
            return weigh_labels(labels, output["logits"])
        return labels, output["logits"], None


@_registered
class TFRobertaPreLayerNormForMultipleChoice(TFRobertaPreLayerNormPreTrainedModel):
    """Logits [B, A]; inputs have an axis of choices, [B, A, L] or [B, A, L, D]; labels [B]."""

    model = "multiple_choice"
    reads_first_position = True

    def make_head(self) -> None:
        self.pooler = heads.Pooler(self.config)
        self.classifier = Projection("classifier", (self.config.hidden_size,), (1,))

    def flatten_choices(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: tf.reshape(x, [-1, *shape_list(x)[2:]]) if name in PER_TOKEN_ARGUMENTS else x
            for name, x in inputs.items()
        }

    def compute_head(
        self, encoded: EncoderOutput, dropout: Dropout, input_shape: list[Any]
    ) -> ModelOutput:
        pooled = dropout(self.pooler(encoded.last_hidden_state), self.config.hidden_dropout_prob)
        return make_output(logits=tf.reshape(self.classifier(pooled), input_shape[:2]))


@_registered
class TFRobertaPreLayerNormForTokenClassification(TFRobertaPreLayerNormPreTrainedModel):
    """Logits [B, L, C]; labels [B, L]."""

    model = "token_classification"

    def make_head(self) -> None:
        D, C = self.config.hidden_size, self.config.num_labels
        self.classifier = Projection("classifier", (D,), (C,))

    def compute_head(
        self, encoded: EncoderOutput, dropout: Dropout, input_shape: list[Any]
    ) -> ModelOutput:
        rate = heads.classifier_dropout_rate(self.config)
        return make_output(logits=self.classifier(dropout(encoded.last_hidden_state, rate)))


@_registered
class TFRobertaPreLayerNormForQuestionAnswering(TFRobertaPreLayerNormPreTrainedModel):
    """start_logits, end_logits [B, L]; start_positions, end_positions [B] in place of labels."""

    model = "question_answering"
    target_names = ("start_positions", "end_positions")

    def make_head(self) -> None:
        self.span = Projection("span", (self.config.hidden_size,), (2,))

    def compute_head(
        self, encoded: EncoderOutput, dropout: Dropout, input_shape: list[Any]
    ) -> ModelOutput:
        logits = self.span(encoded.last_hidden_state)
        return make_output(start_logits=logits[..., 0], end_logits=logits[..., 1])

    def check_targets(
        self, targets: Mapping[str, np.ndarray], input_shape: tuple[int, ...]
    ) -> None:
        for name, positions in targets.items():
            check_span_positions(name, positions, input_shape[0])

    def scores(self, output: ModelOutput, targets: Mapping[str, Tensor]) -> Scores:
        """The mean of both sides' means, as in transformers."""
        starts, ends = (losses.label_scores(*pair) for pair in self._sides(output, targets))
        weight = (starts.weight + ends.weight) / 2
        return Scores((starts.mean + ends.mean) / 2 * weight, weight)

    def metric_inputs(
        self, output: ModelOutput, targets: Mapping[str, Tensor]
    ) -> tuple[Any, Any, Any]:
        sides = [weigh_labels(labels, logits) for logits, labels in self._sides(output, targets)]
        columns = zip(*sides, strict=True)
        return tuple(dict(zip(("start_logits", "end_logits"), c, strict=True)) for c in columns)

    def _sides(
        self, output: ModelOutput, targets: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """(logits, labels) of the start and of the end."""
        sides = []
        for name in ("start", "end"):
            logits = output[f"{name}_logits"]
            positions = to_tensor(targets[f"{name}_positions"])
            sides.append((logits, losses.span_labels(positions, shape_list(logits)[1])))
        return sides

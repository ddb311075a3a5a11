"""The seven TF* classes: what stands on the encoder, and which loss it has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bridges.tensorflow import generation, heads
from bridges.tensorflow.encoder import Dropout, Encoded, Projection, read_encoder
from bridges.tensorflow.generation import GenerationOutput
from bridges.tensorflow.heads import Scores
from bridges.tensorflow.kv_cache import Cache
from bridges.tensorflow.kv_cache import sizes as sizes_of
from bridges.tensorflow.outputs import Output, output
from bridges.tensorflow.pretrained import (
    DECODER_ARGUMENTS,
    ROW_ARGUMENTS,
    TFRobertaPreLayerNormPreTrainedModel,
    counted,
    standardized,
)
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.inference.generation_config import Generation
from prelnroberta.pretrained.input_checks import as_array, check_inputs, check_integers

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
        self.model = self.model_of({"add_pooling_layer": add_pooling_layer})
        super().__init__(config, **options)

    @classmethod
    def model_of(cls, options: Mapping[str, Any]) -> str:
        return "base" if options.get("add_pooling_layer", True) else "encoder"

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "add_pooling_layer": self.model == "base"}

    @property
    def argument_names(self) -> tuple[str, ...]:
        return (*super().argument_names, *DECODER_ARGUMENTS)

    def make_head(self) -> None:
        if self.model == "base":
            self.pooler = heads.Pooler(self.config)

    def head(self, encoded: Encoded, drop: Dropout, sizes: list[Any]) -> Output:
        hidden = encoded.last_hidden_state
        pooled = self.pooler(hidden) if self.model == "base" else None
        return output(last_hidden_state=hidden, pooler_output=pooled)


@_registered
class TFRobertaPreLayerNormForMaskedLM(TFRobertaPreLayerNormPreTrainedModel):
    """Logits [B, L, V]; labels [B, L]."""

    model = "masked_lm"

    def make_head(self) -> None:
        self.lm_head = heads.LanguageModelHead(self.config)

    def head(self, encoded: Encoded, drop: Dropout, sizes: list[Any]) -> Output:
        word = self.embeddings.word.value
        return output(logits=self.lm_head(encoded.last_hidden_state, word))


@_registered
class TFRobertaPreLayerNormForCausalLM(TFRobertaPreLayerNormForMaskedLM):
    """The decoder; its config must have is_decoder, or every token sees what it predicts.

    Logits [B, L, V] at t predict the token at t + 1; labels [B, L] are shifted inside.
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

    def scores(self, output: Output, targets: Mapping[str, Tensor]) -> Scores:
        return heads.causal_lm_scores(output["logits"], standardized(targets["labels"]))

    def metric_arguments(
        self, output: Output, targets: Mapping[str, Tensor]
    ) -> tuple[Any, Any, Any]:
        return counted(standardized(targets["labels"])[:, 1:], output["logits"][:, :-1])

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
        """Continues prompts [B, L], padded on either side or amid.

        Args:
            attention_mask: [B, L]; None: whatever is not the pad id.
            seed: to sample.
            encoder_hidden_states, encoder_attention_mask: [B, S, D] and [B, S].
            settings: fields of `prelnroberta.inference.generation_config.Generation`.

        Raises:
            InputError: prompts or settings that don't fit, or rows that would outgrow the
                model's positions.
        """
        prompts = np.asarray(as_array("input_ids", input_ids))
        if attention_mask is None:
            attention_mask = prompts != self.config.pad_token_id
        given = {
            "input_ids": prompts,
            "attention_mask": np.asarray(attention_mask),
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        given = {name: np.asarray(value) for name, value in given.items() if value is not None}
        check_inputs(self.config, given)
        mask = given["attention_mask"] != 0
        if mask.shape != prompts.shape or not mask.any(axis=1).all():
            raise InputError(
                f"generate: attention_mask {list(mask.shape)}, expected {list(prompts.shape)} "
                "with a token in every row"
            )
        ends = {"eos_token_id": self.config.eos_token_id, "pad_token_id": self.config.pad_token_id}
        wanted = Generation(**{**ends, **settings})
        V = self.config.vocab_size
        for token in (*wanted.eos_ids, wanted.pad_token_id):
            if token >= V:
                raise InputError(f"generation: eos or pad id {token}, expected one in [0, V={V})")
        _, most = wanted.new_tokens(prompts.shape[1])
        longest = int((prompts != self.config.pad_token_id).sum(-1).max())
        self.config.check_length(longest + most - 1, "a prompt and its continuation")
        tensors = {name: standardized(value) for name, value in given.items()}
        specs = tuple((n, tf.TensorSpec.from_tensor(x)) for n, x in tensors.items())
        return self._search(wanted, most, specs)(tensors, tf.constant([seed, 0], tf.int32))

    @functools.cached_property
    def _search(self) -> Callable[..., Callable[..., GenerationOutput]]:
        """(settings, most, shapes of the inputs) -> the whole search as one graph, kept."""

        def decode(ids: Tensor, mask: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
            found = self(ids, mask, past_key_values=cache, return_dict=True)
            return found["logits"], found["past_key_values"]

        @functools.cache
        def graph(
            settings: Generation, most: int, specs: tuple[tuple[str, tf.TensorSpec], ...]
        ) -> Callable[[dict[str, Tensor], Tensor], GenerationOutput]:
            def run(given: dict[str, Tensor], seed: Tensor) -> GenerationOutput:
                ids = given["input_ids"]
                least, _ = settings.new_tokens(ids.shape[1])
                cache = self.init_cache(ids.shape[0], ids.shape[1] + most - 1)
                if "encoder_hidden_states" in given:
                    states = tf.cast(given["encoder_hidden_states"], self.compute_dtype)
                    valid = given.get("encoder_attention_mask")
                    cache |= read_encoder(self.encoder, states, valid)
                mask = tf.cast(given["attention_mask"] != 0, tf.int32)
                return generation.search(decode, settings, least, most, cache, ids, mask, seed)

            traced = tf.function(run, autograph=False)
            return traced.get_concrete_function(dict(specs), tf.TensorSpec([2], tf.int32))

        return graph


@_registered
class TFRobertaPreLayerNormForSequenceClassification(TFRobertaPreLayerNormPreTrainedModel):
    """Logits [B, C]; labels [B] int, [B, C] float, or in regression [B(, C)] float."""

    model = "sequence_classification"
    reads_first_position = True

    def make_head(self) -> None:
        self.classifier = heads.ClassificationHead(self.config)

    def head(self, encoded: Encoded, drop: Dropout, sizes: list[Any]) -> Output:
        return output(logits=self.classifier(encoded.last_hidden_state[:, 0], drop=drop))

    def scores(self, output: Output, targets: Mapping[str, Tensor]) -> Scores:
        return heads.sequence_scores(self.config, output["logits"], standardized(targets["labels"]))

    def metric_arguments(
        self, output: Output, targets: Mapping[str, Tensor]
    ) -> tuple[Any, Any, Any]:
        labels = standardized(targets["labels"])
        if heads.problem_type(self.config, labels) == "single_label_classification":
            return counted(labels, output["logits"])
        return labels, output["logits"], None


@_registered
class TFRobertaPreLayerNormForMultipleChoice(TFRobertaPreLayerNormPreTrainedModel):
    """Inputs have an axis of choices, [B, C, L], inputs_embeds [B, C, L, D]; logits [B, C]."""

    model = "multiple_choice"
    reads_first_position = True

    def make_head(self) -> None:
        self.pooler = heads.Pooler(self.config)
        self.classifier = Projection("classifier", (self.config.hidden_size,), (1,))

    def as_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: tf.reshape(x, [-1, *sizes_of(x)[2:]]) if name in ROW_ARGUMENTS else x
            for name, x in inputs.items()
        }

    def head(self, encoded: Encoded, drop: Dropout, sizes: list[Any]) -> Output:
        pooled = drop(self.pooler(encoded.last_hidden_state), self.config.hidden_dropout_prob)
        return output(logits=tf.reshape(self.classifier(pooled), sizes[:2]))


@_registered
class TFRobertaPreLayerNormForTokenClassification(TFRobertaPreLayerNormPreTrainedModel):
    """Logits [B, L, C]; labels [B, L]."""

    model = "token_classification"

    def make_head(self) -> None:
        D, C = self.config.hidden_size, self.config.num_labels
        self.classifier = Projection("classifier", (D,), (C,))

    def head(self, encoded: Encoded, drop: Dropout, sizes: list[Any]) -> Output:
        hidden = drop(encoded.last_hidden_state, heads.classifier_dropout(self.config))
        return output(logits=self.classifier(hidden))


@_registered
class TFRobertaPreLayerNormForQuestionAnswering(TFRobertaPreLayerNormPreTrainedModel):
    """start_logits, end_logits [B, L]; start_positions, end_positions [B] in place of labels."""

    model = "question_answering"
    target_names = ("start_positions", "end_positions")

    def make_head(self) -> None:
        self.span = Projection("span", (self.config.hidden_size,), (2,))

    def head(self, encoded: Encoded, drop: Dropout, sizes: list[Any]) -> Output:
        logits = self.span(encoded.last_hidden_state)
        return output(start_logits=logits[..., 0], end_logits=logits[..., 1])

    def check_targets(self, targets: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> None:
        for name, value in targets.items():
            if value.shape != tuple(shape[:1]):
                raise InputError(f"{name} has shape {list(value.shape)}, expected [{shape[0]}]")
            check_integers(name, np.abs(value), None, None)

    def scores(self, output: Output, targets: Mapping[str, Tensor]) -> Scores:
        """The mean of both sides' means, as in transformers."""
        starts, ends = (heads.label_scores(*pair) for pair in self._sides(output, targets))
        weight = (starts.weight + ends.weight) / 2
        return Scores((starts.mean + ends.mean) / 2 * weight, weight)

    def metric_arguments(
        self, output: Output, targets: Mapping[str, Tensor]
    ) -> tuple[Any, Any, Any]:
        sides = [counted(labels, logits) for logits, labels in self._sides(output, targets)]
        columns = zip(*sides, strict=True)
        return tuple(dict(zip(("start_logits", "end_logits"), c, strict=True)) for c in columns)

    def _sides(self, output: Output, targets: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(logits, labels) of the start and of the end."""
        sides = []
        for name in ("start", "end"):
            logits = output[f"{name}_logits"]
            positions = standardized(targets[f"{name}_positions"])
            sides.append((logits, heads.span_labels(positions, sizes_of(logits)[1])))
        return sides

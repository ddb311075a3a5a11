"""The seven TF* classes: what stands on the encoder, and which loss it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bridges.tensorflow import heads
from bridges.tensorflow.cache import sizes as sizes_of
from bridges.tensorflow.heads import Scores
from bridges.tensorflow.modeling import Dropout, Encoded, Projection
from bridges.tensorflow.outputs import Output, output
from bridges.tensorflow.pretrained import (
    DECODER_ARGUMENTS,
    ROW_ARGUMENTS,
    TFRobertaPreLayerNormPreTrainedModel,
    counted,
    integers,
)
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.inputs import check_integers

Tensor = tf.Tensor
_registered = keras.saving.register_keras_serializable(package="prelnroberta")


@_registered
class TFRobertaPreLayerNormModel(TFRobertaPreLayerNormPreTrainedModel):
    """The encoder (or decoder) and, unless add_pooling_layer is False, its pooler."""

    target_names = ()

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
        return heads.causal_lm_scores(output["logits"], integers(targets["labels"]))

    def metric_arguments(
        self, output: Output, targets: Mapping[str, Tensor]
    ) -> tuple[Any, Any, Any]:
        return counted(integers(targets["labels"])[:, 1:], output["logits"][:, :-1])


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
        return heads.sequence_scores(self.config, output["logits"], integers(targets["labels"]))

    def metric_arguments(
        self, output: Output, targets: Mapping[str, Tensor]
    ) -> tuple[Any, Any, Any]:
        labels = integers(targets["labels"])
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
            positions = integers(targets[f"{name}_positions"])
            sides.append((logits, heads.span_labels(positions, sizes_of(logits)[1])))
        return sides

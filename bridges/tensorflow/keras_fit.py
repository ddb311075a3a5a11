"""Keras' fit, evaluate and predict for models that compute their loss themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from bridges.tensorflow.losses import Scores
from bridges.tensorflow.outputs import ModelOutput
from prelnroberta.errors import InputError

Tensor = tf.Tensor


class InternalLossMixin:
    """Training steps of a keras.Model with `target_names`, `scores` and `metric_inputs`.

    Features are a dict, or input_ids alone. Targets are among the features or given as y. The loss
    that fit and evaluate report is the mean over all targets that count, not the mean of the
    batches' means. Metrics compare labels with logits where labels count.
    """

    target_names: tuple[str, ...]

    def scores(self, output: ModelOutput, targets: Mapping[str, Tensor]) -> Scores:
        raise NotImplementedError

    def metric_inputs(
        self, output: ModelOutput, targets: Mapping[str, Tensor]
    ) -> tuple[Any, Any, Any]:
        """(y, y_pred, sample_weight) for Keras' metrics."""
        raise NotImplementedError

    def compile(self, optimizer: Any = "adamw", *, metrics: Any = None, **settings: Any) -> None:
        """As keras.Model.compile, but without a loss, and with all metrics weighted.

        Keras computes its unweighted metrics over all labels, including -100.

        Raises:
            InputError: a loss is given, or both metrics and weighted_metrics.
        """
        if settings.pop("loss", None) is not None:
            raise InputError("compile: loss given, expected none: the model has its own")
        weighted = settings.pop("weighted_metrics", None)
        if metrics is not None and weighted is not None:
            raise InputError("compile: give metrics alone, all are weighted")
        weighted = metrics if weighted is None else weighted
        super().compile(optimizer=optimizer, weighted_metrics=weighted, **settings)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles by the settings of a `.keras` file; Keras' version calls its own `compile`."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def train_step(self, data: Any) -> dict[str, Tensor]:
        inputs, targets = self._split_targets(data)
        with tf.GradientTape() as tape:
            output = self(inputs, training=True, return_dict=True)
            scores = self.scores(output, targets)
            loss = self.optimizer.scale_loss(scores.mean)
        variables = self.trainable_weights
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return self._update_metrics(scores, output, targets)

    def test_step(self, data: Any) -> dict[str, Tensor]:
        inputs, targets = self._split_targets(data)
        output = self(inputs, training=False, return_dict=True)
        return self._update_metrics(self.scores(output, targets), output, targets)

    def predict_step(self, data: Any) -> ModelOutput:
        inputs, *_ = self._unpack(data)
        return self(inputs, training=False)

    def _update_metrics(
        self, scores: Scores, output: ModelOutput, targets: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        # Keras has no public way to weight its running loss by anything but rows.
        self._loss_tracker.update_state(scores.mean, sample_weight=scores.weight)
        y, y_pred, weights = self.metric_inputs(output, targets)
        return self.compute_metrics(None, y, y_pred, sample_weight=weights)

    def _unpack(self, data: Any) -> tuple[dict[str, Any], dict[str, Any], Any, Any]:
        """Inputs, the targets among them, y and the sample weights of `data`."""
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        inputs = dict(x) if isinstance(x, Mapping) else {"input_ids": x}
        targets = {name: inputs.pop(name) for name in self.target_names if name in inputs}
        return inputs, targets, y, weights

    def _split_targets(self, data: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Inputs and targets of a step."""
        inputs, targets, y, weights = self._unpack(data)
        if weights is not None:
            raise InputError(
                "sample_weight is not supported: label with -100 what should not count"
            )
        if isinstance(y, Mapping):
            targets |= y
        elif y is not None:
            y = y if isinstance(y, (tuple, list)) else (y,)
            targets |= dict(zip(self.target_names, y, strict=len(self.target_names) == len(y)))
        missing = [name for name in self.target_names if name not in targets]
        unknown = [name for name in targets if name not in self.target_names]
        if missing or unknown or not self.target_names:
            expected = ", ".join(self.target_names) or "a class with a head: this one has no loss"
            raise InputError(f"targets {sorted(targets)}, expected {expected}")
        return inputs, {name: tf.convert_to_tensor(value) for name, value in targets.items()}

"""Keras' fit, evaluate and predict with the model's own loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from bridges.tensorflow.heads import Scores
from bridges.tensorflow.outputs import Output
from prelnroberta.errors import InputError

Tensor = tf.Tensor


class OwnLoss:
    """Steps for a keras.Model with `target_names`, `scores` and `metric_arguments`.

    Features are a dict or ids alone; targets are among them or come as y. What fit and evaluate
    report as the loss is the mean over all targets that count, not a mean of the batches' means;
    metrics compare labels with logits where labels count.
    """

    target_names: tuple[str, ...]

    def scores(self, output: Output, targets: Mapping[str, Tensor]) -> Scores:
        raise NotImplementedError

    def metric_arguments(
        self, output: Output, targets: Mapping[str, Tensor]
    ) -> tuple[Any, Any, Any]:
        """(y, y_pred, sample_weight) for Keras' metrics."""
        raise NotImplementedError

    def compile(self, optimizer: Any = "adamw", *, metrics: Any = None, **settings: Any) -> None:
        """As keras.Model.compile, but without a loss, and with all metrics weighted.

        Keras leaves the weights, and with them the label -100, out of what it calls metrics.

        Raises:
            InputError: given a loss, or weighted_metrics beside metrics.
        """
        if settings.pop("loss", None) is not None:
            raise InputError("compile: loss given, expected none: the model has its own")
        weighted = settings.pop("weighted_metrics", None)
        if metrics is not None and weighted is not None:
            raise InputError("compile: give metrics alone, all are weighted")
        weighted = metrics if weighted is None else weighted
        super().compile(optimizer=optimizer, weighted_metrics=weighted, **settings)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as a `.keras` file says; Keras does so itself for its own `compile` alone."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def train_step(self, data: Any) -> dict[str, Tensor]:
        inputs, targets = self._split(data)
        with tf.GradientTape() as tape:
            output = self(inputs, training=True, return_dict=True)
            scores = self.scores(output, targets)
            loss = self.optimizer.scale_loss(scores.mean)
        variables = self.trainable_weights
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return self._report(scores, output, targets)

    def test_step(self, data: Any) -> dict[str, Tensor]:
        inputs, targets = self._split(data)
        output = self(inputs, training=False, return_dict=True)
        return self._report(self.scores(output, targets), output, targets)

    def predict_step(self, data: Any) -> Output:
        inputs, _ = self._features(data)
        return self(inputs, training=False)

    def _report(
        self, scores: Scores, output: Output, targets: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        # Keras has no public way to weigh its running loss by anything but rows.
        self._loss_tracker.update_state(scores.mean, sample_weight=scores.weight)
        y, y_pred, weights = self.metric_arguments(output, targets)
        return self.compute_metrics(None, y, y_pred, sample_weight=weights)

    def _features(self, data: Any) -> tuple[dict[str, Any], Any]:
        """The model's inputs without targets, and everything else that `data` holds."""
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        inputs = dict(x) if isinstance(x, Mapping) else {"input_ids": x}
        targets = {name: inputs.pop(name) for name in self.target_names if name in inputs}
        return inputs, (targets, y, weights)

    def _split(self, data: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Inputs and targets of a step."""
        inputs, (targets, y, weights) = self._features(data)
        if weights is not None:
            raise InputError("sample_weight: not taken; label with -100 what should not count")
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

"""transformers 4.57.6's TensorFlow classes, as tf.functions with and without XLA; and our twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from experiments.benchmark.cases import Case, checked
from experiments.benchmark.work import Work

Batch = dict[str, np.ndarray]


def prepare(weights: Path, case: Case) -> None:
    """Writes tf_model.h5, so that no contender imports torch to read its weights."""
    import transformers

    model = getattr(transformers, "TF" + case.architecture).from_pretrained(weights, from_pt=True)
    model.save_weights(str(weights / "tf_model.h5"))


def build(weights: Path, case: Case, batch: Batch, modes: list[str]) -> dict[str, Work]:
    """modes: graph, xla; or the same of our twin: twin graph, twin xla."""
    if "twin" in modes[0]:
        import bridges.tensorflow

        model = getattr(bridges.tensorflow, "TF" + case.architecture).from_pretrained(weights)
    else:
        import transformers

        config = transformers.AutoConfig.from_pretrained(weights)
        model = getattr(transformers, "TF" + case.architecture)(config)
        model.build_in_name_scope()
        model.load_weights(str(weights / "tf_model.h5"))
    make = {"train": _train, "forward": _forward, "generate": _generate}[case.work]
    return {mode: make(model, case, batch, mode) for mode in modes}


def _tensors(batch: Batch) -> dict[str, tf.Tensor]:
    return {name: tf.constant(rows) for name, rows in batch.items()}


def _forward(model: Any, case: Case, batch: Batch, mode: str) -> Work:
    tensors = _tensors(batch)
    real = batch["attention_mask"] == 1

    @tf.function(jit_compile="xla" in mode)
    def forward(inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        return model(**inputs, training=False)[0]

    def run() -> np.ndarray:
        return forward(tensors).numpy()

    return Work(lambda: run()[real], run)


def _generate(model: Any, case: Case, batch: Batch, mode: str) -> Work:
    prompts = tf.constant(batch["input_ids"])

    def generate() -> np.ndarray:
        output = model.generate(prompts, max_new_tokens=case.new_tokens)
        return np.asarray(getattr(output, "sequences", output))

    return Work(generate, generate)


def _train(model: Any, case: Case, batch: Batch, mode: str) -> Work:
    import tf_keras

    optimizer = tf_keras.optimizers.AdamW(
        1e-4, weight_decay=0.01, beta_1=0.9, beta_2=0.98, epsilon=1e-6
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "LayerNorm"])
    optimizer.build(model.trainable_variables)
    parts = [
        _tensors({name: rows[at : at + case.B] for name, rows in batch.items()})
        for at in range(0, len(batch["input_ids"]), case.B)
    ]
    first = _tensors(checked(case, batch))

    @tf.function(jit_compile="xla" in mode)
    def step(part: dict[str, tf.Tensor]) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(**part, training=True).loss)
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        # The pooler of a model without a use for it has none.
        pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        optimizer.apply_gradients(pairs)

    def check() -> float:
        return float(tf.reduce_mean(model(**first, training=False).loss))

    def run() -> None:
        for part in parts:
            step(part)
        model.trainable_variables[0].numpy()

    return Work(check, run)

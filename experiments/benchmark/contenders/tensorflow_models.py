"""The TensorFlow classes of transformers 4.57.6 and of this project, with and without XLA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from experiments.benchmark.cases import Case, comparison_batch, split_batches
from experiments.benchmark.workload import Workload

Batch = dict[str, np.ndarray]


def convert_weights(weights: Path, case: Case) -> None:
    """Writes tf_model.h5, so that the timed process need not import torch."""
    import transformers

    model = getattr(transformers, "TF" + case.architecture).from_pretrained(weights, from_pt=True)
    model.save_weights(str(weights / "tf_model.h5"))


def make_workloads(
    weights: Path, case: Case, batch: Batch, variants: list[str]
) -> dict[str, Workload]:
    """A workload for each variant: graph, xla; or of this project: twin graph, twin xla."""
    if "twin" in variants[0]:
        import bridges.tensorflow

        model = getattr(bridges.tensorflow, "TF" + case.architecture).from_pretrained(weights)
    else:
        import transformers

        config = transformers.AutoConfig.from_pretrained(weights)
        model = getattr(transformers, "TF" + case.architecture)(config)
        model.build_in_name_scope()
        model.load_weights(str(weights / "tf_model.h5"))
    make = {"train": _train, "forward": _forward, "generate": _generate}[case.operation]
    return {variant: make(model, case, batch, variant) for variant in variants}


def _tensors(batch: Batch) -> dict[str, tf.Tensor]:
    return {name: tf.constant(rows) for name, rows in batch.items()}


def _forward(model: Any, case: Case, batch: Batch, variant: str) -> Workload:
    tensors = _tensors(batch)
    real = batch["attention_mask"] == 1

    @tf.function(jit_compile="xla" in variant)
    def forward(inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        return model(**inputs, training=False)[0]

    def run() -> np.ndarray:
        return forward(tensors).numpy()

    return Workload(lambda: run()[real], run)


def _generate(model: Any, case: Case, batch: Batch, variant: str) -> Workload:
    prompts = tf.constant(batch["input_ids"])

    def generate() -> np.ndarray:
        output = model.generate(prompts, max_new_tokens=case.new_tokens)
        return np.asarray(getattr(output, "sequences", output))

    return Workload(generate, generate)


def _train(model: Any, case: Case, batch: Batch, variant: str) -> Workload:
    import tf_keras

    optimizer = tf_keras.optimizers.AdamW(
        1e-4, weight_decay=0.01, beta_1=0.9, beta_2=0.98, epsilon=1e-6
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "LayerNorm"])
    optimizer.build(model.trainable_variables)
    batches = [_tensors(batch) for batch in split_batches(case, batch)]
    first = _tensors(comparison_batch(case, batch))

    @tf.function(jit_compile="xla" in variant)
    def step(batch: dict[str, tf.Tensor]) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(**batch, training=True).loss)
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        # A pooler that the loss does not use has no gradient.
        pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        optimizer.apply_gradients(pairs)

    def outputs() -> float:
        return float(tf.reduce_mean(model(**first, training=False).loss))

    def run() -> None:
        for batch in batches:
            step(batch)
        model.trainable_variables[0].numpy()

    return Workload(outputs, run)

"""Keras features of the TensorFlow twins: fit, evaluate, predict, metrics, dropout and files."""

import functools

import jax
import keras
import numpy as np
import optax
import pytest
import tensorflow as tf

from bridges.tensorflow import variable_mapping
from bridges.tensorflow.outputs import ModelOutput
from prelnroberta import InputError
from prelnroberta import params as parameters
from prelnroberta.training.optimizer import OptimizerConfig, adamw
from tests.helpers.small_models import IDS, MODELS, SMALL, TINY, ragged_batch, random_params
from tests.helpers.tensorflow_models import tf_and_flax, tf_model

pytestmark = pytest.mark.tensorflow

CONFIG = SMALL.replace(num_labels=3)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QUIET = SMALL.replace(**NO_DROPOUT)
EASY = TINY.replace(num_labels=3, **NO_DROPOUT)


@pytest.fixture(autouse=True)
def seeded():
    """fit's shuffles and the weights a class begins with are the same in every run."""
    keras.utils.set_random_seed(0)


@functools.cache
def easy_rows():
    """Rows whose second token tells the label."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 40, (64, 8))
    return ids, ids[:, 1] % 3


def test_fit_lowers_loss_from_dicts_and_datasets():
    ids, labels = easy_rows()
    model = tf_model("sequence_classification", EASY)
    model.compile(keras.optimizers.AdamW(3e-3), metrics=["accuracy"])
    features = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}
    history = model.fit(features, batch_size=16, epochs=18, verbose=0).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    rows = tf.data.Dataset.from_tensor_slices(({"input_ids": ids}, labels)).batch(32)
    found = model.evaluate(rows, verbose=0, return_dict=True)
    output = model(ids, labels=labels)
    assert found["accuracy"] == np.mean(output.logits.numpy().argmax(-1) == labels) > 0.8
    np.testing.assert_allclose(found["loss"], output.loss, rtol=1e-5)
    predicted = model.predict(features, batch_size=10, verbose=0)
    assert type(predicted) is ModelOutput and list(predicted) == ["logits"]
    np.testing.assert_allclose(predicted.logits, output.logits, rtol=1e-4, atol=1e-5)


def test_loss_and_metrics_are_weighted_by_tokens():
    """Batches with one counted label and with many: the mean is that of all labels."""
    model = tf_model("token_classification", CONFIG, random_params(CONFIG, "token_classification"))
    model.compile(metrics=["accuracy"], run_eagerly=True)
    ids = np.random.default_rng(0).integers(4, 60, (4, 7))
    labels = np.full((4, 7), -100)
    labels[0, 0], labels[2:] = 1, ids[2:] % 3
    found = model.evaluate({"input_ids": ids}, labels, batch_size=2, verbose=0, return_dict=True)
    output = model(ids, labels=labels)
    right = (output.logits.numpy().argmax(-1) == labels)[labels != -100]
    np.testing.assert_allclose(found["accuracy"], right.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["loss"], output.loss, rtol=1e-5)


@pytest.mark.parametrize("model", [m for m in MODELS if m != "base"])
def test_fit_with_every_head(model):
    config = QUIET.replace(is_decoder=model == "causal_lm")
    ours = tf_model(model, config)
    metrics = ["accuracy"]
    if model == "question_answering":
        metrics = {"start_logits": "accuracy", "end_logits": "accuracy"}
    ours.compile(keras.optimizers.AdamW(1e-3), metrics=metrics, run_eagerly=True)
    features = {"input_ids": IDS}
    if model == "multiple_choice":
        features = {"input_ids": np.stack([IDS, IDS[:, ::-1]], 1)}
    if model == "question_answering":
        features |= {"start_positions": np.array([1, 2]), "end_positions": np.array([3, 9])}
    else:
        whole = model in ("masked_lm", "causal_lm")
        token = model == "token_classification"
        features["labels"] = IDS if whole else IDS % 2 if token else np.array([1, 0])
    expected = ours(**features).loss
    first = ours.evaluate(features, verbose=0, return_dict=True)
    np.testing.assert_allclose(first["loss"], expected, rtol=1e-5)
    assert sum("accuracy" in name for name in first) == len(metrics)
    history = ours.fit(features, epochs=4, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_invalid_fit_arguments_raise():
    model = tf_model("token_classification", CONFIG)
    model.compile(run_eagerly=True)
    ones = np.ones_like(IDS)
    for arguments, complaint in (
        ({"x": {"input_ids": IDS}}, r"targets \[\], expected labels"),
        ({"x": IDS, "y": ones, "sample_weight": np.ones(2)}, "label with -100"),
        ({"x": {"input_ids": IDS, "label": ones}, "y": ones}, "label .nearest: labels"),
    ):
        with pytest.raises(InputError, match=complaint):
            model.fit(**arguments, verbose=0)
    with pytest.raises(InputError, match="loss given, expected none"):
        model.compile(loss="mse")
    with pytest.raises(InputError, match="give metrics alone"):
        model.compile(metrics=["accuracy"], weighted_metrics=["accuracy"])
    base = tf_model("base", SMALL)
    base.compile(run_eagerly=True)
    with pytest.raises(InputError, match="this one has no loss"):
        base.fit(IDS, verbose=0)


def test_twenty_adamw_steps_match_flax():
    """Same batch, no dropout, biases and norms without decay: the same losses, to 1e-4.

    Keras adds epsilon before it corrects the second moment's bias, optax and torch after: in the
    first steps its epsilon is larger, here by up to 7. With 1e-8 losses agree to 2e-5 all the
    same; with 1e-6 they are 2e-3 apart.
    """
    config = EASY.replace(num_hidden_layers=2)
    ours, flax = tf_and_flax("masked_lm", config)
    start = parameters.init(config, jax.random.key(1))
    ours.assign_params(start)
    batch = ragged_batch(config, L=9)
    settings = OptimizerConfig(
        steps=20, learning_rate=3e-3, schedule="constant", weight_decay=0.1, adam_epsilon=1e-8
    )
    optimizer = adamw(settings, config)

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(lambda p: flax(**batch, params=p).loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state, expected = start, optimizer.init(start), []
    for _ in range(20):
        params, state, loss = step(params, state)
        expected.append(float(loss))

    twin = keras.optimizers.AdamW(3e-3, weight_decay=0.1, beta_1=0.9, beta_2=0.98, epsilon=1e-8)
    kinds = {path: row.kind for path, row in parameters.table(config).items()}
    paths = variable_mapping.variable_paths(config, "masked_lm")
    twin.exclude_from_weight_decay(
        var_list=[
            variable
            for path, variable in ours.variables_by_path().items()
            if kinds[paths[path][0]] in ("bias", "norm")
        ]
    )
    ours.compile(twin, jit_compile=False)
    found = ours.fit(batch, batch_size=5, epochs=20, shuffle=False, verbose=0).history["loss"]
    assert found[0] - found[-1] > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_fit_in_mixed_precision(policy):
    ids, labels = easy_rows()
    model = tf_model("sequence_classification", EASY, dtype=policy)
    model.compile(keras.optimizers.AdamW(3e-3), run_eagerly=True)
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    history = model.fit(ids, labels, epochs=8, batch_size=16, verbose=0).history["loss"]
    assert history[-1] < 0.8 * history[0]
    assert {v.dtype for v in model.weights} == {"float32"}


def test_dropout_depends_on_seed_head_and_row():
    config = TINY.replace(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.3)
    params = random_params(config)
    ids = np.full((2, 60), 7)

    def run(seed, calls=1):
        model = tf_model("masked_lm", config, params, seed=seed)
        asked = {"output_hidden_states": True, "output_attentions": True}
        return [model(ids, training=True, **asked) for _ in range(calls)][-1]

    first, same, other, later = run(0), run(0), run(1), run(0, calls=2)
    np.testing.assert_array_equal(first.logits, same.logits)
    assert np.abs(first.logits - other.logits).max() > 0.1 < np.abs(first[0] - later[0]).max()
    model = tf_model("masked_lm", config, params)
    np.testing.assert_array_equal(model(ids).logits, model(ids).logits)
    embedded, clean = first.hidden_states[0].numpy(), model(ids, output_hidden_states=True)
    kept = embedded != 0
    assert abs(kept.mean() - 0.9) < 0.02
    np.testing.assert_allclose(
        embedded[kept], clean.hidden_states[0].numpy()[kept] / 0.9, rtol=1e-5, atol=1e-6
    )
    zeros = first.attentions[0].numpy() == 0  # [B, H, L, L]
    assert abs(zeros.mean() - 0.3) < 0.02
    assert (zeros[:, 0] != zeros[:, 1]).mean() > 0.3 and (zeros[0] != zeros[1]).mean() > 0.3


# Keras' files.


@pytest.mark.parametrize("kind", ["encoder", "sequence_classification"])
def test_keras_save_and_load_round_trip(kind, tmp_path):
    config = QUIET.replace(pad_token_id=3, num_labels=3)
    ours = tf_model(kind, config, random_params(config, kind), dtype="mixed_bfloat16", seed=4)
    ours.compile(keras.optimizers.AdamW(1e-3), metrics=["accuracy"], jit_compile=False)
    if kind != "encoder":
        ours.fit(IDS, np.array([0, 2]), verbose=0)
    expected = ours(IDS)[0]
    ours.save(tmp_path / "whole.keras")
    again = keras.saving.load_model(tmp_path / "whole.keras")
    assert type(again) is type(ours) and again.config == config and again.seed == 4
    assert again.dtype_policy.name == "mixed_bfloat16" and again.model == ours.model
    np.testing.assert_array_equal(again(IDS)[0], expected)
    if kind != "encoder":
        assert int(again.optimizer.iterations) == 1
        both = [m.fit(IDS, np.array([0, 2]), verbose=0).history for m in (ours, again)]
        assert both[0] == both[1]
    ours.save_weights(tmp_path / "of.weights.h5")
    fresh = tf_model(kind, config)
    fresh.load_weights(tmp_path / "of.weights.h5")
    jax.tree.map(np.testing.assert_array_equal, fresh.to_params(), ours.to_params())


def test_use_in_functional_model_with_frozen_layers():
    ours = tf_model("base", SMALL)
    ids = keras.Input([None], dtype="int32")
    pooled = ours(ids).pooler_output
    whole = keras.Model(ids, keras.layers.Dense(2)(pooled))
    assert whole(IDS).shape == (2, 2)
    whole.compile(loss="mse", jit_compile=False)
    before = ours.to_params()
    ours.encoder.trainable = False
    whole.fit(IDS, np.ones((2, 2)), verbose=0)
    after = ours.to_params()
    jax.tree.map(np.testing.assert_array_equal, after["encoder"], before["encoder"])
    assert np.any(after["pooler"]["kernel"] != before["pooler"]["kernel"])

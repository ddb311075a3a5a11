"""Every TF class against its Flax twin, every parameter random, in odd configurations, padded on
every side: outputs, streams, attentions, losses, gradients; eagerly, as a graph and by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import torch

from bridges.tensorflow import variable_mapping
from prelnroberta import InputError, RobertaPreLayerNormConfig
from prelnroberta import params as parameters
from prelnroberta.pretrained.hf_checkpoint import to_state_dict
from tests.helpers.model_cases import MODEL_CASES, case_batch
from tests.helpers.small_models import IDS, MODELS, ODD, SMALL, ragged_batch, random_params
from tests.helpers.tensorflow_models import tf_and_flax, tf_model
from tests.helpers.tolerances import assert_close, rms_relative
from tests.helpers.torch_reference import transformers_model

pytestmark = [pytest.mark.tensorflow, pytest.mark.torch, pytest.mark.oracle]

# Both sides are float32: the bounds are twice what each may be off by itself.
BOTH = {"rms": 4e-6, "largest": 4e-5}


def leaves(output):
    """(name, array) of an output's parts, tuples taken apart."""
    for name, value in output.items():
        for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
            yield f"{name} {i}", np.asarray(part)


def assert_same_output(found, expected, **bounds):
    found, expected = dict(leaves(found)), dict(leaves(expected))
    assert list(found) == list(expected)
    for name, value in expected.items():
        if value.ndim == 0:
            np.testing.assert_allclose(found[name], value, rtol=4e-6, err_msg=name)
        else:
            assert_close(found[name], value, name, **(bounds or BOTH))


@pytest.mark.parametrize("kind", MODEL_CASES)
def test_outputs_and_gradients_match_flax(kind):
    """Outputs with Flax's; outputs and every gradient with torch's in float64."""
    model, config = MODEL_CASES[kind]
    ours, flax = tf_and_flax(model, config)
    batch = case_batch(model, config, kind)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with tf.GradientTape() as tape:
        found = ours(batch, **asked)
        target = found.loss if found.loss is not None else tf.reduce_mean(found[0] ** 2)
        if kind == "base":
            target += tf.reduce_mean(found.pooler_output)
    assert_same_output(found, flax(**batch, **asked))

    theirs = transformers_model(model, config, flax.params)
    inputs = {k: torch.from_numpy(v) for k, v in batch.items()}
    inputs = {k: v.double() if v.dtype == torch.float32 else v for k, v in inputs.items()}
    exact = theirs(**inputs, use_cache=False)
    wanted = exact.loss if "loss" in exact else (exact[0] ** 2).mean()
    if kind == "base":
        wanted = wanted + exact.pooler_output.mean()
    wanted.backward()
    np.testing.assert_allclose(float(target), wanted.item(), rtol=2e-6)
    real = batch["attention_mask"] == 1 if config.is_decoder else slice(None)
    for name, value in exact.items():
        if name != "loss":
            a, b = found[name].numpy()[real], value.detach().numpy()[real]
            assert_close(a, b, name, 3e-6, 3e-5)

    variables = ours.variables_by_path()
    taken = tape.gradient(target, [v.value for v in variables.values()])
    of_path = {
        path: np.zeros(variable.shape, np.float32)
        if gradient is None
        else tf.convert_to_tensor(gradient).numpy()
        for (path, variable), gradient in zip(variables.items(), taken, strict=True)
    }
    gradients = to_state_dict(
        variable_mapping.from_variables(of_path, config, ours.model), config, model
    )
    ladder = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    scale = max(np.abs(g).max() for g in ladder.values())
    moved = {name for name in gradients if np.abs(gradients[name]).max() > 1e-6 * scale}
    # Untied, transformers 5 computes with decoder.bias and keeps a dead lm_head.bias beside it.
    assert moved - {"lm_head.bias"} <= set(ladder)
    for name, gradient in ladder.items():
        if name.endswith("self.key.bias"):
            assert np.abs(gradients[name]).max() < 2e-6 * scale, name
        elif name in gradients and np.abs(gradient).max() > 1e-9 * scale:
            value = gradients[name]
            if "word_emb" in name or "position_emb" in name:
                # torch stops the gradient of the lookup at the pad row.
                value, gradient = (np.delete(g, config.pad_token_id, 0) for g in (value, gradient))
            assert_close(value, gradient, f"gradient of {name}", 1e-5, 2e-4)


@pytest.mark.parametrize("kind", ["cross", "multiple_choice", "span"])
def test_graph_xla_and_predict_match_eager(kind):
    model, config = MODEL_CASES[kind]
    ours, _ = tf_and_flax(model, config)
    batch = {k: tf.constant(v) for k, v in case_batch(model, config, kind).items()}
    eager = ours(batch, output_hidden_states=True, output_attentions=True)
    for compiled in (False, True):

        @functools.partial(tf.function, jit_compile=compiled)
        def run(batch):
            return ours(batch, output_hidden_states=True, output_attentions=True)

        found = run(batch)
        assert type(found) is type(eager)
        np.testing.assert_array_equal(found[0], found[next(iter(eager))])  # numbers keep order
        assert_same_output({name: found[name] for name in eager}, eager)
    ours.compile()
    predicted = ours.predict(batch, batch_size=2, verbose=0)
    assert set(predicted) == set(eager) - {"loss", "hidden_states", "attentions"} - (
        {"cross_attentions"}
    )
    for name, value in predicted.items():
        assert_close(value, eager[name].numpy(), name, **BOTH)


def test_call_argument_forms():
    ours, flax = tf_and_flax("masked_lm", SMALL)
    mask = (IDS != 1).astype(np.int64)
    expected = flax(IDS, mask).logits
    for found in (
        ours(IDS, mask),
        ours(input_ids=IDS.tolist(), attention_mask=mask.tolist()),
        ours({"input_ids": tf.constant(IDS), "attention_mask": mask}),
        ours({"input_ids": IDS}, attention_mask=mask == 1),
        ours(jnp.asarray(IDS), mask.astype(np.float32)),
        ours.call({"input_ids": IDS, "attention_mask": mask}),
    ):
        assert_close(found.logits, expected, "logits", **BOTH)
    assert_close(ours(IDS)[0], flax(IDS)[0], "ids alone", **BOTH)
    as_tuple = ours(IDS, return_dict=False, output_hidden_states=True)
    assert isinstance(as_tuple, tuple) and len(as_tuple[1]) == 3
    output = ours(IDS, output_attentions=True, labels=IDS)
    assert output[0] is output.loss is output["loss"] and output[1:] == output.to_tuple()[1:]
    assert output.hidden_states is None and "hidden_states" not in output
    with pytest.raises(KeyError):
        output["hidden_states"]
    with pytest.raises(AttributeError, match="no field 'logit'"):
        _ = output.logit


@pytest.mark.parametrize(
    "change",
    [
        {"type_vocab_size": 1},
        {"hidden_act": "relu", "type_vocab_size": 2},
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-12},
        {"hidden_act": "quick_gelu", "pad_token_id": 0, "bos_token_id": 1},
        {"hidden_act": "tanh", "pad_token_id": 5},
        {"hidden_act": "swish", "tie_word_embeddings": False},
        {"tie_last_hidden_states": False, "num_hidden_layers": 1},
    ],
    ids=str,
)
def test_odd_configurations_match_flax(change):
    config = SMALL.replace(**change)
    ours, flax = tf_and_flax("masked_lm", config)
    batch = ragged_batch(config, L=9)
    batch["attention_mask"][2] = 0  # a row that sees nothing attends evenly: finite, as in Flax
    found, expected = (m(**batch, output_hidden_states=True) for m in (ours, flax))
    assert_same_output(found, expected)
    assert np.isfinite(found.logits).all()


def test_optional_inputs_match_flax():
    ours, flax = tf_and_flax("base", ODD)
    rng = np.random.default_rng(0)
    batch = ragged_batch(ODD, L=8)
    ids, H, N = batch["input_ids"], ODD.num_attention_heads, ODD.num_hidden_layers
    square = (rng.random((5, 8, 8)) < 0.6).astype(np.int32)
    segments = np.sort(rng.integers(0, 3, (5, 8)))
    for inputs in (
        {"input_ids": ids, "attention_mask": square},
        {"input_ids": ids, "segment_ids": segments, "attention_mask": batch["attention_mask"]},
        {"input_ids": ids, "head_mask": rng.random(H).astype(np.float32)},
        {"input_ids": ids, "head_mask": rng.random((N, H)).astype(np.float32)},
        {"input_ids": ids, "position_ids": rng.integers(0, 33, (5, 8))},
        {"inputs_embeds": rng.standard_normal((5, 8, 42))},
    ):
        found, expected = (m(**inputs, output_attentions=True) for m in (ours, flax))
        assert_same_output(found, expected)
    ours, flax = tf_and_flax("multiple_choice", ODD)
    vectors = rng.standard_normal((3, 2, 8, 42)).astype(np.float32)
    assert_same_output(*(m(inputs_embeds=vectors) for m in (ours, flax)))


def test_computing_only_first_position_is_exact():
    for model in ("sequence_classification", "multiple_choice"):
        ours, _ = tf_and_flax(model, SMALL)
        ids = np.stack([IDS, IDS[::-1]], 1) if model == "multiple_choice" else IDS
        mask = np.ones(ids.shape, np.int32)
        whole = ours(ids, mask, output_hidden_states=True)
        np.testing.assert_allclose(ours(ids, mask).logits, whole.logits, rtol=1e-5, atol=1e-5)
    square = np.tril(np.ones((2, 5, 5), np.int32))
    ours, _ = tf_and_flax("sequence_classification", SMALL)
    a, b = (ours(IDS, square, output_attentions=x).logits for x in (False, True))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_dtypes_and_errors(policy):
    """Weights stay float32; errors are those of the dtype; a masked row is finite."""
    bounds = {"mixed_bfloat16": 1e-2, "mixed_float16": 1.5e-3}  # measured: 7e-3, 9e-4
    params = random_params(ODD, "masked_lm", scale=0.1)
    half, full = (
        tf_model("masked_lm", ODD, params, dtype=policy),
        tf_model("masked_lm", ODD, params),
    )
    batch = ragged_batch(ODD)
    batch["attention_mask"][1] = 0
    found, expected = (m(**batch, output_hidden_states=True) for m in (half, full))
    assert {v.dtype for v in half.weights} == {"float32"}
    assert found.hidden_states[1].dtype == policy.removeprefix("mixed_")
    assert found.logits.dtype == found.loss.dtype == tf.float32
    assert rms_relative(found.logits, expected.logits) < bounds[policy]
    assert abs(found.loss / expected.loss - 1) < bounds[policy]
    xla = tf.function(half, jit_compile=True)({k: tf.constant(v) for k, v in batch.items()})
    assert rms_relative(xla.logits, expected.logits) < bounds[policy]


# The tree.


@pytest.mark.parametrize("kind", MODEL_CASES)
def test_variables_map_one_to_one_to_parameter_tree(kind):
    model, config = MODEL_CASES[kind]
    params = random_params(config, model)
    ours = tf_model(model, config, params)
    variables, shapes = ours.variables_by_path(), variable_mapping.variable_shapes(config, model)
    assert {path: tuple(v.shape) for path, v in variables.items()} == shapes
    assert len(variables) == len(ours.weights)
    pairs = variable_mapping.variable_paths(config, model)
    assert len(set(pairs.values())) == len(pairs)
    assert {leaf for leaf, _ in pairs.values()} == set(parameters.table(config, model))
    back = ours.to_params()
    jax.tree.map(np.testing.assert_array_equal, back, params)
    parameters.check(back, config, model)


def test_mismatched_variables_raise_with_nearest_names():
    params = parameters.flatten(random_params(SMALL))
    params["lm_head/biases"] = params.pop("lm_head/bias")
    params["embeddings/norm/scale"] = params["embeddings/norm/scale"].astype(np.float16)
    with pytest.raises(InputError) as error:
        tf_model("masked_lm", SMALL, parameters.unflatten(params))
    for part in (
        "missing lm_head/bias float32[60]",
        "unexpected lm_head/biases (nearest: lm_head/bias)",
        "embeddings/norm/scale is float16[16], expected float32[16]",
    ):
        assert part in str(error.value)
    values = {p: v.numpy() for p, v in tf_model("masked_lm", SMALL).variables_by_path().items()}
    values["encoder/layers/1/mlp/w0/bias"] = values.pop("encoder/layers/1/mlp/wo/bias")
    del values["lm_head/bias"]
    with pytest.raises(InputError) as error:
        variable_mapping.from_variables(values, SMALL, "masked_lm")
    for part in ("missing lm_head/bias", "w0/bias (nearest: encoder/layers/1/mlp/wo/bias)"):
        assert part in str(error.value)


@pytest.mark.parametrize("model", MODELS)
def test_initial_values_match_flax(model):
    config = SMALL.replace(is_decoder=model == "causal_lm")
    expected = parameters.init(config, jax.random.key(3), model)
    found = tf_model(model, config, seed=3).to_params()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# What is refused.


def test_bad_input_raises_in_eager_mode():
    base, masked, span = (tf_model(m, SMALL) for m in ("base", "masked_lm", "question_answering"))
    for call, complaint in (
        (lambda: base([[0, 60]]), r"input_ids\[0, 1\] is 60, expected 0 to vocab_size - 1"),
        (lambda: base(tf.constant([[0, -1]])), r"input_ids\[0, 1\] is -1"),
        (lambda: base([[0, 5], [0]]), "rows of different lengths"),
        (lambda: base(IDS, attention_mask=IDS[:1]), r"attention_mask has shape \[1, 5\]"),
        (lambda: base(IDS, token_type_ids=IDS), "token_type_ids.* expected 0 to type_vocab_size"),
        (lambda: base(), "input_ids or inputs_embeds"),
        (lambda: base(IDS, labels=IDS), "unexpected labels"),
        (lambda: base(IDS, atention_mask=IDS), "atention_mask .nearest: attention_mask"),
        (lambda: base(np.full((1, 65), 5)), "65 tokens is longer than the 64"),
        (lambda: base(IDS, encoder_hidden_states=np.ones((2, 3, 16))), "add_cross_attention"),
        (lambda: masked(IDS, labels=IDS[:, 1:]), r"labels has shape \[2, 4\]"),
        (lambda: masked(IDS, labels=np.full((2, 5), 60)), r"labels\[0, 0\] is 60"),
        (lambda: masked(IDS, past_key_values={}), "unexpected past_key_values"),
        (lambda: span(IDS, start_positions=[1, 2]), "give both of"),
        (lambda: tf_model("causal_lm", SMALL), "is_decoder=False"),
        (lambda: tf_model("base", SMALL, dtype="float16"), "keeps weights in float16"),
        (lambda: tf_model("base", {}), "config is a dict"),
        (lambda: tf_model("question_answering", SMALL.replace(num_labels=3)), "num_labels=3"),
    ):
        with pytest.raises(InputError, match=complaint) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="65 tokens is longer"):
        tf.function(base, autograph=False)(tf.constant(np.full((1, 65), 5)))


def test_loss_without_counted_labels_is_zero():
    masked, span = (tf_model(m, SMALL) for m in ("masked_lm", "question_answering"))
    assert float(masked(IDS, labels=np.full_like(IDS, -100)).loss) == 0.0
    assert float(span(IDS, start_positions=[-1, 9], end_positions=[5, 7]).loss) == 0.0


@pytest.mark.slow
def test_base_size_matches_flax():
    """The ladder of float32 at the published size, every parameter random."""
    config = RobertaPreLayerNormConfig.preset("roberta-base")
    ours, flax = tf_and_flax("masked_lm", config)
    batch = ragged_batch(config, B=5, L=64)
    params = random_params(config, scale=0.04)
    ours.assign_params(params)
    flax.params = params
    found = ours(**batch, output_hidden_states=True)
    expected = flax(**batch, output_hidden_states=True)
    assert_same_output(found, expected)

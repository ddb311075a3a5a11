"""Every TF class against transformers 4.57.6's own, which transformers 5 no longer has, in a
process of its own: outputs, losses, gradients, and the tf_model.h5 that it wrote."""

import json

import numpy as np
import pytest
import tensorflow as tf

import bridges.tensorflow
from prelnroberta import InputError
from prelnroberta.config import ARCHITECTURES
from prelnroberta.pretrained.hf_checkpoint import save_pretrained, to_state_dict
from tests.helpers.model_cases import case_batch
from tests.helpers.oracles import run_oracle
from tests.helpers.small_models import ODD, SMALL, TWO_TYPES, random_params, with_tokens
from tests.helpers.tolerances import assert_close

pytestmark = [pytest.mark.tensorflow, pytest.mark.oracle]

# transformers' TF classes count positions from 1 whatever the pad id, and always tie the output.
OURS = {"tie_last_hidden_states": False, "pad_token_id": 1, "bos_token_id": 0}
CASES = {
    "base": ("base", ODD.replace(**OURS)),
    "masked_lm": ("masked_lm", SMALL.replace(layer_norm_eps=1e-12, **OURS)),
    "causal_lm": ("causal_lm", ODD.replace(is_decoder=True, tie_word_embeddings=True, **OURS)),
    "cross": ("causal_lm", SMALL.replace(is_decoder=True, add_cross_attention=True, **OURS)),
    "single_label": ("sequence_classification", ODD.replace(num_labels=5, **OURS)),
    "regression": ("sequence_classification", TWO_TYPES.replace(num_labels=1, **OURS)),
    "multiple_choice": ("multiple_choice", TWO_TYPES.replace(**OURS)),
    "token": ("token_classification", ODD.replace(num_labels=4, hidden_act="silu", **OURS)),
    "span": ("question_answering", SMALL.replace(**OURS)),
}


def batch_of(kind):
    """Labels and places that transformers' TF losses, too, take as they are meant."""
    batch = with_tokens(case_batch(*CASES[kind], kind))
    if kind in ("single_label", "multiple_choice"):
        batch["labels"] = np.maximum(batch["labels"], 0)
    if kind == "span":
        batch["start_positions"], batch["end_positions"] = np.array([[3, 0, 10, 4, 1]] * 2)
    return batch


def tf_class(model):
    return getattr(bridges.tensorflow, "TF" + ARCHITECTURES[model])


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tf4")
    for kind, (model, config) in CASES.items():
        save_pretrained(root / kind, random_params(config, model), config, model)
        np.savez(root / kind / "batch.npz", **batch_of(kind))
        (root / kind / "architecture.txt").write_text(ARCHITECTURES[model])
    run_oracle("transformers4_tensorflow.py", root)
    return root


@pytest.mark.parametrize("kind", CASES)
def test_outputs_losses_and_gradients_match_transformers4(kind, answers):
    model, config = CASES[kind]
    batch, expected = batch_of(kind), dict(np.load(answers / kind / "tf.npz"))
    ours = tf_class(model).from_pretrained(answers / kind)
    with tf.GradientTape() as tape:
        found = ours(batch, output_hidden_states=True, output_attentions=True)
        target = found.loss if found.loss is not None else tf.reduce_mean(found[0] ** 2)
    variables = ours.variables_by_path()
    gradients = tape.gradient(target, [v.value for v in variables.values()])
    for variable, gradient in zip(variables.values(), gradients, strict=True):
        zero = gradient is None
        variable.assign(tf.zeros_like(variable) if zero else tf.convert_to_tensor(gradient))
    ladder = to_state_dict(ours.to_params(), config, model)

    compared = set()
    real = batch["attention_mask"] == 1 if config.is_decoder else slice(None)
    for name, b in expected.items():
        field, _, i = name.partition(".")
        if field in ("gradient", "past_key_values"):
            continue
        compared.add(field)
        a = found[field]
        a = np.asarray(a[int(i)] if isinstance(a, tuple) else a)
        if field == "loss":
            np.testing.assert_allclose(a, b.mean(), rtol=4e-6)
            continue
        if "attentions" in field:
            a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
        assert_close(a[real], b[real], name, 4e-6, 4e-5)
    # Its multiple choice loses states and attentions on the way.
    lost = {"hidden_states", "attentions"} if model == "multiple_choice" else set()
    assert compared == set(found) - lost

    theirs = {n.removeprefix("gradient."): g for n, g in expected.items() if n[:9] == "gradient."}
    if model == "base":
        theirs = {n.removeprefix("roberta_prelayernorm."): g for n, g in theirs.items()}
    scale = max(np.abs(g).max() for g in theirs.values())
    moved = {name for name, gradient in ladder.items() if np.abs(gradient).max() > 1e-6 * scale}
    assert moved <= set(theirs) <= set(ladder)
    for name, gradient in theirs.items():
        if "key.bias" in name or np.abs(gradient).max() < 1e-6 * scale:
            assert np.abs(ladder[name]).max() < 2e-6 * scale, name
        else:
            assert_close(ladder[name], gradient, f"gradient of {name}", 1e-5, 2e-4)


@pytest.mark.parametrize("kind", CASES)
def test_h5_weights_of_transformers4_are_read_exactly(kind, answers):
    model, _ = CASES[kind]
    directory = answers / kind / "h5"
    assert sorted(p.name for p in directory.iterdir() if p.suffix in (".h5", ".safetensors")) == [
        "tf_model.h5"
    ]
    read = tf_class(model).from_pretrained(directory, tie_last_hidden_states=False)
    assert not str(read.loading_info)
    ours = tf_class(model).from_pretrained(answers / kind)
    for path, variable in ours.variables_by_path().items():
        np.testing.assert_array_equal(read.variables_by_path()[path], variable, err_msg=path)


def test_corrupt_h5_raises_one_line(answers, tmp_path):
    whole = (answers / "span" / "h5" / "tf_model.h5").read_bytes()
    config = json.loads((answers / "span" / "h5" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    for content in (b"", whole[: len(whole) // 2], b"\xff" * 4000):
        (tmp_path / "tf_model.h5").write_bytes(content)
        with pytest.raises(InputError, match=r"tf_model.h5: (damaged|missing)") as error:
            tf_class("question_answering").from_pretrained(tmp_path)
        assert "\n" not in str(error.value)

"""Files of the TensorFlow twins: Hugging Face folders, SavedModel and TFLite; and their import."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow as tf
import transformers

import bridges.tensorflow
from bridges.tensorflow import export
from bridges.tensorflow.export import save_saved_model, save_tflite
from prelnroberta import InputError
from prelnroberta.config import ARCHITECTURES
from tests.helpers.programs import ROOT
from tests.helpers.small_models import MODELS, ODD, SMALL, flax_class, ragged_batch, random_params
from tests.helpers.tensorflow_models import tf_model
from tests.helpers.tolerances import assert_close, max_relative

pytestmark = [pytest.mark.tensorflow, pytest.mark.oracle]

DECODER = SMALL.replace(is_decoder=True)


def made(model, config=None):
    config = config or (DECODER if model == "causal_lm" else SMALL)
    return tf_model(model, config, random_params(config, model))


@pytest.mark.parametrize("model", MODELS)
def test_folders_load_in_flax_and_transformers5(model, tmp_path):
    ours = made(model)
    ours.save_pretrained(tmp_path / "ours", max_shard_bytes=4000 if model == "base" else 10**9)
    theirs, info = getattr(transformers, ARCHITECTURES[model]).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    theirs.save_pretrained(tmp_path / "theirs")
    params = ours.to_params()
    for read in (
        flax_class(model).from_pretrained(tmp_path / "ours").params,
        type(ours).from_pretrained(tmp_path / "ours").to_params(),
        type(ours).from_pretrained(tmp_path / "theirs").to_params(),
    ):
        jax.tree.map(np.testing.assert_array_equal, read, params)


def test_loading_into_other_head_reports_keys(tmp_path, caplog):
    made("base").save_pretrained(tmp_path)
    cls = bridges.tensorflow.TFRobertaPreLayerNormForSequenceClassification
    headed = cls.from_pretrained(tmp_path, num_labels=3, dtype="mixed_bfloat16", seed=2)
    assert headed.loading_info.missing_keys[0] == "classifier.dense.weight" in caplog.text
    assert headed.config.num_labels == 3 and headed.compute_dtype == "bfloat16"
    jax.tree.map(
        np.testing.assert_array_equal,
        headed.to_params()["encoder"],
        made("base").to_params()["encoder"],
    )
    bare = bridges.tensorflow.TFRobertaPreLayerNormModel
    assert "pooler" not in bare.from_pretrained(tmp_path, add_pooling_layer=False).to_params()
    for arguments, complaint in (
        ({"directory": tmp_path, "nonsense": 1}, "unknown argument nonsense"),
        ({"directory": tmp_path / "absent"}, "no such directory"),
        ({"directory": tmp_path, "num_hidden_layers": 1}, "unexpected .*layer.1"),
    ):
        with pytest.raises(InputError, match=complaint):
            cls.from_pretrained(**arguments)


# Files that need none of our code.


@pytest.mark.parametrize("model", ["masked_lm", "multiple_choice"])
def test_saved_model_runs_without_this_package(model, tmp_path):
    ours = made(model, ODD)
    save_saved_model(ours, tmp_path / "saved")
    batch = ragged_batch(ODD, B=5, L=17, seed=3)
    batch = {k: batch[k].astype(np.int32) for k in batch if k != "labels"}
    if model == "multiple_choice":
        batch = {k: np.stack([v, v[::-1], v], 1) for k, v in batch.items()}
    np.savez(tmp_path / "batch.npz", **batch)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [
            sys.executable,
            ROOT / "tests/programs/run_saved_model.py",
            tmp_path / "saved",
            tmp_path / "batch.npz",
            tmp_path,
        ],
        check=True,
        cwd="/",
        env=environment | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    asked = {"output_hidden_states": True, "output_attentions": True}
    for name, expected in (
        ("serving_default", ours(batch)),
        ("ids", ours(batch["input_ids"])),
        ("with_states", ours(batch, **asked)),
    ):
        found = dict(np.load(tmp_path / f"{name}.npz"))
        wanted = export.flatten_output(expected)
        assert found.keys() == wanted.keys()
        for field, value in wanted.items():
            assert max_relative(found[field], value.numpy()) < 1e-4, (name, field)
    with pytest.raises(InputError, match="exists already"):
        save_saved_model(ours, tmp_path / "saved")


@pytest.mark.parametrize("model", ["causal_lm", "sequence_classification"])
def test_tflite_matches_at_other_shapes(model, tmp_path):
    config = (DECODER if model == "causal_lm" else SMALL).replace(layer_norm_eps=1e-12)
    ours = made(model, config)
    save_tflite(ours, tmp_path / "model.tflite")
    runner = tf.lite.Interpreter(str(tmp_path / "model.tflite")).get_signature_runner()
    for B, L in ((5, 16), (2, 9)):
        batch = ragged_batch(config, B=5, L=L)
        batch = {k: batch[k][:B].astype(np.int32) for k in ("input_ids", "attention_mask")}
        found = runner(**batch)["logits"]
        real = batch["attention_mask"] == 1 if model == "causal_lm" else slice(None)
        assert_close(found[real], ours(batch).logits[real], "logits", 4e-6, 4e-5)


def test_exported_file_with_wrong_outputs_raises(tmp_path, monkeypatch):
    ours = made("token_classification")
    monkeypatch.setitem(export.TOLERANCE, "float32", -1.0)
    with pytest.raises(InputError, match=r"saved: signature \w+: logits differs .* expected"):
        save_saved_model(ours, tmp_path / "saved")
    with pytest.raises(InputError, match=r"model.tflite: logits differs"):
        save_tflite(ours, tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


def test_half_precision_saves_as_saved_model_and_raises_for_tflite(tmp_path):
    ours = tf_model("base", SMALL, random_params(SMALL, "base"), dtype="mixed_bfloat16")
    save_saved_model(ours, tmp_path / "saved")
    with pytest.raises(InputError, match=r"model.tflite: TFLite cannot hold this model"):
        save_tflite(ours, tmp_path / "model.tflite")


# The import.


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_import_loads_no_torch_and_is_quiet():
    code = "import sys, bridges.tensorflow; print({'torch', 'transformers'} & set(sys.modules))"
    done = python(code)
    assert done.stdout.strip() == "set()" and done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("how", ["environment", "keras imported before"])
def test_other_keras_backend_raises_at_import(how):
    code = "import bridges.tensorflow"
    if how == "environment":
        done = python(code, KERAS_BACKEND="jax")
    else:
        code = "import os, keras; del os.environ['KERAS_BACKEND']; " + code
        done = python(code, KERAS_BACKEND="jax")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "InputError: bridges.tensorflow needs Keras' TensorFlow backend, found 'jax'" in last

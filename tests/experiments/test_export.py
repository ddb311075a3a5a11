"""What is exported is the same function, in a process that has none of our code, at any shape."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from bridges import pytorch
from bridges.pytorch.export import save_onnx, save_state_dict
from bridges.verify.parity import MODELS
from experiments.export import batches, flax, largest_error
from prelnroberta.inference.stablehlo import PLATFORMS, PROGRAM_NAME, load_stablehlo, save_stablehlo
from prelnroberta.pretrained.hf_checkpoint import ARCHITECTURES, load_pretrained, save_pretrained
from tests.helpers.programs import call, finished_run
from tests.helpers.small_models import ODD, TINY, random_params
from tests.helpers.tolerances import max_relative

torch.set_num_threads(1)
SMALL = TINY.replace(vocab_size=60, hidden_size=16, intermediate_size=24, num_attention_heads=2)


def case(model):
    odd = model in ("masked_lm", "token_classification")
    config = (ODD if odd else SMALL).replace(is_decoder=model == "causal_lm")
    return random_params(config, model), config


@pytest.mark.parametrize("model", [*MODELS, "encoder"])
def test_stablehlo_of_every_class(model, tmp_path):
    params, config = case(model)
    save_stablehlo(params, config, model, tmp_path / "new" / "program")
    program = jax.export.deserialize(
        bytearray((tmp_path / "new/program" / PROGRAM_NAME).read_bytes())
    )
    assert program.platforms == PLATFORMS
    loaded = load_stablehlo(tmp_path / "new/program")

    def run(inputs):
        return {name: np.asarray(x) for name, x in loaded(*inputs.values()).items()}

    assert largest_error(run, params, config, model) < 2e-5


@pytest.mark.parametrize("model", ["base", "causal_lm", "multiple_choice", "question_answering"])
def test_onnx(model, tmp_path):
    import onnxruntime

    params, config = case(model)
    twin = getattr(pytorch, ARCHITECTURES[model]).from_params(params, config)
    save_onnx(twin, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    names = [x.name for x in session.get_outputs()]

    def run(inputs):
        found = session.run(names, {name: np.int64(x) for name, x in inputs.items()})
        return dict(zip(names, found, strict=True))

    assert largest_error(run, params, config, model) < 2e-5
    # Choices are as free as batch and length.
    assert all(not isinstance(axis, int) for x in session.get_inputs() for axis in x.shape)


def test_what_is_wrong_is_far_beyond_tolerance():
    params, config = case("question_answering")
    run = flax(params, config, "question_answering")
    assert largest_error(run, params, config, "question_answering") == 0
    for damage in (0.1, np.nan):

        def wrong(inputs, damage=damage):
            found = run(inputs)
            found["end_logits"] = found["end_logits"].copy()
            found["end_logits"][-1, -1] += damage
            return found

        assert largest_error(wrong, params, config, "question_answering") > 1e-2


@pytest.mark.parametrize("model", ["masked_lm", "question_answering"])
def test_state_dict_fits_transformers_strictly(model, tmp_path):
    import transformers
    from safetensors.torch import load_file

    params, config = case(model)
    twin = getattr(pytorch, ARCHITECTURES[model]).from_params(params, config)
    save_state_dict(twin, tmp_path / "state_dict.safetensors")
    values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    theirs = getattr(transformers, ARCHITECTURES[model])(
        transformers.RobertaPreLayerNormConfig(**values)
    )
    theirs.load_state_dict(load_file(tmp_path / "state_dict.safetensors"), strict=True)


STRANGER = """
import json, sys
for name in ("prelnroberta", "bridges", "experiments", "flax"):
    sys.modules[name] = None
import numpy as np
out, form = sys.argv[1:]
batch = dict(np.load(out + "/batch.npz"))
if form == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(out + "/exported/onnx/model.onnx")
    logits, = session.run(["logits"], {n: x.astype(np.int64) for n, x in batch.items()})
elif form == "tensorflow":
    sys.modules["keras"] = None
    import tensorflow as tf
    loaded = tf.saved_model.load(out + "/exported/tensorflow")
    serve = loaded.signatures["serving_default"]
    taken = serve.structured_input_signature[1]
    logits = serve(**{n: tf.constant(batch[n]) for n in taken})["logits"].numpy()
else:
    import jax.export
    from safetensors.numpy import load_file
    with open(out + "/exported/stablehlo/model.stablehlo", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    params = {}
    for path, leaf in load_file(out + "/exported/stablehlo/params.safetensors").items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    logits = np.asarray(program.call(params, *batch.values())["logits"])
np.save(out + "/" + form + ".npy", logits)
"""


@pytest.mark.slow
def test_program_exports_a_run_and_strangers_read_it(tmp_path):
    done = call("export", f"--model={finished_run()}", f"--output={tmp_path / 'exported'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("loaded back") == 5
    params, config = load_pretrained(finished_run() / "model")
    again, _ = load_pretrained(tmp_path / "exported")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))
    *_, batch = batches(config, "masked_lm")
    np.savez(tmp_path / "batch.npz", **batch)
    expected = flax(params, config, "masked_lm")(batch)["logits"]
    for form in ("onnx", "tensorflow", "stablehlo"):
        done = subprocess.run(
            [sys.executable, "-c", STRANGER, str(tmp_path), form],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert max_relative(np.load(tmp_path / f"{form}.npy"), expected) < 1e-4
    card = (tmp_path / "exported/README.md").read_text()
    corpus = json.loads((finished_run() / "corpus.json").read_text())
    assert corpus["train"]["text"]["sha256"] in card
    for part in ("pipeline_tag: fill-mask", "| perplexity |", "| tensorflow |", "| pytorch |"):
        assert part in card, part


def test_bad_input_is_one_line_and_nothing_is_made(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    params, config = case("question_answering")
    save_pretrained(tmp_path / "model", params, config, "question_answering")
    strange = shutil.copytree(tmp_path / "model", tmp_path / "strange")
    values = json.loads((strange / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (strange / "config.json").write_text(json.dumps(values))
    for model, output, said in (
        ("nowhere", "new", "nowhere: no config.json"),
        ("model", "full", "name a new or empty folder"),
        ("strange", "new", "architectures=['BertModel'], expected one of"),
    ):
        done = call("export", f"--model={tmp_path / model}", f"--output={tmp_path / output}")
        assert done.returncode == 2
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], done.stderr
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "full/file").read_text() == "mine"

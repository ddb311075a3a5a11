"""The program `export`: its files load without this package and compute the same at any shape."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from experiments.export import batches, flax
from prelnroberta.pretrained.hf_checkpoint import load_pretrained, save_pretrained
from tests.helpers.export_cases import export_case
from tests.helpers.programs import ROOT, call, finished_run
from tests.helpers.tolerances import max_relative

pytestmark = [pytest.mark.torch, pytest.mark.tensorflow]

torch.set_num_threads(1)


@pytest.mark.slow
def test_exported_run_loads_without_this_package(tmp_path):
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
            [sys.executable, ROOT / "tests/programs/run_exported.py", str(tmp_path), form],
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


def test_bad_input_prints_one_line_and_writes_nothing(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    params, config = export_case("question_answering")
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

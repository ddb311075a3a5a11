"""The parity report: passes where frameworks agree, and locates a changed weight elsewhere."""

import jax
import numpy as np
import pytest
import torch

from bridges.verify.parity import PARITY_MODELS, compare_frameworks, diagnose, make_batch, worst
from prelnroberta import params as parameters
from prelnroberta.pretrained.hf_checkpoint import load_pretrained, save_pretrained
from tests.helpers.programs import call, finished_run
from tests.helpers.small_models import ODD, TINY, random_params

pytestmark = [pytest.mark.torch, pytest.mark.tensorflow]

torch.set_num_threads(1)
SMALL = TINY.replace(vocab_size=60, hidden_size=16, intermediate_size=24, num_attention_heads=2)


def run(params, config, model, **options):
    batch = make_batch(config, model, 12, rows=[[0, 7, 8, 2], [0, 9, 2]])
    return list(compare_frameworks(params, config, model, batch, **options))


@pytest.mark.parametrize("model", PARITY_MODELS)
def test_every_class_matches_in_all_frameworks(model):
    config = (ODD if model in ("base", "token_classification") else SMALL).replace(
        is_decoder=model == "causal_lm", num_labels=2 if model == "question_answering" else 3
    )
    errors = run(random_params(config, model), config, model, dtypes=["float32"])
    assert not [e for e in errors if not e.passed]
    kinds = {"output", "hidden state", "gradient"} | ({"loss"} if model != "base" else set())
    for framework in ("flax", "pytorch", "tensorflow"):
        mine = [e for e in errors if e.framework == framework]
        assert {e.kind for e in mine} == kinds
        N = config.num_hidden_layers
        # Every leaf of the tree has its gradient compared, layer by layer.
        leaves = parameters.table(config, model).values()
        assert sum(e.kind == "gradient" for e in mine) == sum(
            N if row.is_stacked else 1 for row in leaves
        )
        # Compared at all: float32 is not float64.
        assert worst(mine, "output").rms > 1e-9


def test_bfloat16_meets_its_own_bound_but_not_that_of_float32():
    errors = run(random_params(SMALL), SMALL, "masked_lm", dtypes=["bfloat16"])
    assert not [e for e in errors if not e.passed]
    for framework in ("flax", "pytorch", "tensorflow"):
        state = worst([e for e in errors if e.framework == framework], "hidden state")
        assert state.rms > 1e-3


@pytest.mark.parametrize(
    ("path", "layer", "said"),
    [
        ("encoder/layers/mlp/wi/kernel", 1, "differs from layer 1 on"),
        ("encoder/layers/attention_norm/bias", 0, "differs from layer 0 on"),
        ("embeddings/norm/scale", None, "differs from the embeddings on"),
        ("lm_head/bias", None, "the encoder agrees; logits does not"),
    ],
)
def test_changed_weight_fails_and_is_located(path, layer, said):
    params = random_params(SMALL)
    leaves = {name: np.array(leaf) for name, leaf in parameters.flatten(params).items()}
    leaf = leaves[path] if layer is None else leaves[path][layer]
    leaf.reshape(-1)[3] += 1e-2
    damaged = parameters.unflatten(leaves)
    options = {"frameworks": ["pytorch"], "dtypes": ["float32"]}
    assert diagnose(run(params, SMALL, "masked_lm", **options)) == ""
    assert diagnose(run(params, SMALL, "masked_lm", tested_params=damaged, **options)) == said


def test_cancelling_gradient_is_measured_against_its_terms():
    """Two labels, in this batch as frequent as the head thinks: the gradient of the last norm's
    bias is what is left of a sum, and the rounding of its terms is 2e-5 of that."""
    config = SMALL.replace(num_labels=2)
    params = random_params(config, "token_classification", scale=0.02)
    batch = make_batch(config, "token_classification", 17, seed=63)
    errors = compare_frameworks(
        params, config, "token_classification", batch, ["pytorch"], ["float32"]
    )
    gradient = worst(errors, "gradient")
    assert gradient.passed and gradient.excess < 0.5


def test_nan_fails():
    from bridges.verify.parity import BOUNDS, Comparison

    error = Comparison(
        "m", "f", "float32", "output", "logits", np.nan, np.nan, BOUNDS["float32"][0]
    )
    assert not error.passed and error.excess == np.inf


@pytest.mark.slow
def test_program_passes_a_run_and_fails_a_changed_copy(tmp_path):
    model = finished_run() / "model"
    report = tmp_path / "parity.html"
    fast = ("--framework=pytorch", "--dtype=float32")
    done = call("parity", f"--checkpoint={finished_run()}", f"--html={report}", *fast)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 of 7 are within their bounds" in done.stdout
    page = report.read_text()
    assert page.count("<tr>") == 8 and "<svg" in page

    params, config = load_pretrained(model)
    params = jax.tree.map(np.array, params)
    params["encoder"]["layers"]["attention"]["output"]["kernel"][1, 0, 0, 0] += 0.5
    save_pretrained(tmp_path / "copy", params, config, "masked_lm")
    done = call("parity", f"--checkpoint={model}", f"--against={tmp_path / 'copy'}", *fast)
    assert done.returncode == 1 and "0 of 7" in done.stdout, done.stdout
    assert done.stdout.count("differs from layer 1 on") == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint=nowhere"], "nowhere: no config.json found"),
        (["--checkpoint={run}", "--against=nowhere"], "nowhere: no config.json found"),
        (["--checkpoint={run}", "--html=no/such/place.html"], "--html=no/such/place.html"),
        (["--checkpoint={run}", "--sequence_length=0"], "--sequence_length=0"),
        (["--checkpoint={run}", "--sequence_length=5000"], "5000"),
    ],
)
def test_bad_input_prints_one_line(arguments, said):
    done = call("parity", *(a.format(run=finished_run()) for a in arguments))
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], done.stderr

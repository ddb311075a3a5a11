"""Every class against transformers 4.57.6: its torch and its Flax class, outputs and gradients,
what they say of the files we write, and its `flax_model.msgpack`, which transformers 5 can no
longer read.

They need an older transformers than the environment has: `make test` installs it beside (no
dependency of ours changes) and it runs in one process of its own, on directories that we wrote.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prelnroberta import params as parameters
from prelnroberta.config import ARCHITECTURES
from prelnroberta.model import losses
from prelnroberta.pretrained.hf_checkpoint import save_pretrained
from tests.helpers.model_cases import case_batch, flax_loss_and_gradients, with_minimal_positions
from tests.helpers.oracles import run_oracle
from tests.helpers.small_models import ODD, SMALL, TWO_TYPES, flax_class, random_params
from tests.helpers.tolerances import assert_gradients_match, assert_outputs_match

pytestmark = pytest.mark.oracle

# Each class in another configuration than in MODEL_CASES.
CASES = with_minimal_positions(
    {
        "base": ("base", TWO_TYPES),
        "masked_lm": ("masked_lm", ODD),
        "masked_lm_tied": ("masked_lm", TWO_TYPES.replace(hidden_act="silu")),
        "causal_lm": ("causal_lm", SMALL.replace(is_decoder=True)),
        "cross": ("causal_lm", ODD.replace(is_decoder=True, add_cross_attention=True)),
        "single_label": ("sequence_classification", SMALL.replace(num_labels=3)),
        "regression": ("sequence_classification", ODD.replace(num_labels=1)),
        "multi_label": ("sequence_classification", TWO_TYPES.replace(num_labels=3)),
        "multiple_choice": ("multiple_choice", SMALL.replace(layer_norm_eps=1e-12)),
        "token": ("token_classification", SMALL.replace(num_labels=4, type_vocab_size=2)),
        "span": ("question_answering", ODD),
    },
    tie_last_hidden_states=False,
)
# What differs from another case in the loss only, which Flax classes never had.
TORCH_ALONE = ("regression", "multi_label")
FLAX = [kind for kind in CASES if kind not in TORCH_ALONE]


def weights_of_outputs(kind, batch, output, weight):
    """The gradient of our loss at the outputs: what a Flax class, which has no loss, is given.

    That the losses are right is for the torch classes to say.
    """
    model, config = CASES[kind]
    if model == "base":
        return {"last_hidden_state": weight, "pooler_output": weight[:, 0]}
    if model == "question_answering":

        def loss(logits):
            starts, ends = losses.span_scores(
                logits, batch["start_positions"], batch["end_positions"]
            )
            return (starts.mean + ends.mean) / 2

        gradient = jax.grad(loss)(jnp.stack([output.start_logits, output.end_logits], -1))
        return {"start_logits": gradient[..., 0], "end_logits": gradient[..., 1]}
    ours = flax_class(model)(config, _do_init=False)
    return {"logits": jax.grad(ours.loss)(output.logits, batch["labels"])}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The oracle's directory, and our own loss, output and gradients of each case."""
    root, ours = tmp_path_factory.mktemp("transformers4"), {}
    for kind, (model, config) in CASES.items():
        save_pretrained(root / kind, random_params(config, model), config, model)
        (root / kind / "architecture.txt").write_text(ARCHITECTURES[model])
        batch = case_batch(model, config, kind)
        *ours[kind], weight = flax_loss_and_gradients(kind, model, config)
        weights = weights_of_outputs(kind, batch, ours[kind][1], weight)
        np.savez(root / kind / "batch.npz", **batch, **{f"of.{k}": v for k, v in weights.items()})
        if kind in TORCH_ALONE:
            (root / kind / "torch_alone").touch()

    lacking = root / "lacking"
    save_pretrained(lacking, random_params(SMALL), SMALL)
    (lacking / "architecture.txt").write_text(ARCHITECTURES["masked_lm"])
    tensors = load_file(lacking / "model.safetensors")
    del tensors["lm_head.dense.bias"]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    run_oracle("transformers4_models.py", root)
    return root, ours


def read(path):
    """(outputs, gradients) of the oracle: {field: array or tuple of them}, {name: array}."""
    outputs, gradients = {}, {}
    for name, value in np.load(path).items():
        if name.startswith("d."):
            gradients[name.removeprefix("d.")] = value
        else:
            outputs.setdefault(name.partition(".")[0], []).append(value)
    by_layer = ("hidden_states", "attentions", "cross_attentions")
    arrays = {k: tuple(v) if k in by_layer else v[0] for k, v in outputs.items()}
    return arrays, gradients


@pytest.mark.parametrize("kind", CASES)
def test_outputs_and_gradients_match_torch_classes(kind, answers):
    root, ours = answers
    (model, config), (loss, found, gradients) = CASES[kind], ours[kind]
    expected, ladder = read(root / kind / "torch.npz")
    assert ("loss" in expected) == (model != "base")
    if model != "base":
        target = float(expected.pop("loss"))
        assert abs(float(loss) - target) < 3e-6 * max(1, abs(target))
    assert_outputs_match(config, case_batch(model, config, kind), found, expected)
    assert_gradients_match(config, gradients, ladder)


@pytest.mark.parametrize("kind", FLAX)
def test_outputs_and_gradients_match_flax_classes(kind, answers):
    """Both sides are float32 here: the bounds are twice what each may be off by itself."""
    root, ours = answers
    (model, config), (_, found, gradients) = CASES[kind], ours[kind]
    expected, ladder = read(root / kind / "flax.npz")
    assert_outputs_match(config, case_batch(model, config, kind), found, expected, 6e-6, 6e-5)
    assert_gradients_match(config, gradients, ladder, floor=1e-6, padding_idx=False)


@pytest.mark.parametrize("kind", FLAX)
def test_msgpack_files_of_transformers4_are_read(kind, answers):
    root, _ = answers
    model, config = CASES[kind]
    ours = flax_class(model).from_pretrained(root / kind / "msgpack")
    assert not str(ours.loading_info)
    expected = parameters.flatten(random_params(config, model))
    found = parameters.flatten(ours.params)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    fields = {"extra": {}, "tie_last_hidden_states": False}
    assert ours.config.replace(**fields) == config.replace(extra={})


@pytest.mark.parametrize("kind", CASES)
def test_transformers4_loads_our_files_without_warnings(kind, answers):
    assert (answers[0] / kind / "said.txt").read_text() == ""


def test_transformers4_reports_a_missing_tensor(answers):
    """Of a file that lacks a tensor it speaks twice: in its log and in what it returns."""
    said = (answers[0] / "lacking" / "said.txt").read_text().splitlines()
    assert len(said) >= 2
    assert all("lm_head.dense.bias" in line for line in (said[0], said[-1]))

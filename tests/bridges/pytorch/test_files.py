"""Parameters, state dicts and folders of the PyTorch twins: exact round trips, standard names."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from prelnroberta import InputError
from prelnroberta import params as parameters
from prelnroberta.config import ARCHITECTURES
from tests.helpers.model_cases import case_batch
from tests.helpers.oracles import run_oracle
from tests.helpers.programs import ROOT
from tests.helpers.pytorch_models import to_torch, twin, twin_class
from tests.helpers.small_models import ODD, SMALL, TWO_TYPES, random_params, with_tokens
from tests.helpers.tolerances import assert_close

pytestmark = [pytest.mark.torch, pytest.mark.oracle]

torch.set_num_threads(1)
CASES = {
    "base": ("base", ODD),
    "encoder": ("encoder", SMALL),
    "masked_lm": ("masked_lm", SMALL),
    "untied": ("masked_lm", SMALL.replace(tie_word_embeddings=False)),
    "cross": ("causal_lm", SMALL.replace(is_decoder=True, add_cross_attention=True)),
    "causal_lm": ("causal_lm", ODD.replace(is_decoder=True)),
    "single_label": ("sequence_classification", SMALL.replace(num_labels=5)),
    "multiple_choice": ("multiple_choice", TWO_TYPES),
    "token": ("token_classification", ODD.replace(num_labels=4, hidden_act="silu")),
    "span": ("question_answering", SMALL.replace(layer_norm_eps=1e-12)),
}

# transformers gives every base model that it reads a pooler.
READABLE = [kind for kind in CASES if kind != "encoder"]


def assert_same(a, b):
    a, b = parameters.flatten(a), parameters.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize("kind", CASES)
def test_params_round_trip(kind):
    model, config = CASES[kind]
    params = random_params(config, model)
    ours = twin(model, config, params)
    assert_same(ours.to_params(), params)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1.0)
    assert_same(params, random_params(config, model))  # the tree was copied


@pytest.mark.parametrize("kind", CASES)
def test_state_dict_matches_transformers(kind):
    """Name by name, strictly, in both directions."""
    model, config = CASES[kind]
    ours = twin(model, config)
    values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    options = {"add_pooling_layer": False} if model == "encoder" else {}
    theirs = getattr(transformers, ARCHITECTURES[model])(
        transformers.RobertaPreLayerNormConfig(**values), **options
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    other = twin_class(model)(config, **options)
    other.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(other.to_params(), ours.to_params())


@pytest.mark.parametrize("kind", ["masked_lm", "untied"])
def test_tied_weights_are_one_parameter(kind):
    """However the model was made, and after it was moved to another dtype."""
    model, config = CASES[kind]
    for ours in (twin(model, config), twin_class(model)(config), twin(model, config).bfloat16()):
        words = ours.roberta_prelayernorm.embeddings.word_embeddings.weight
        assert (ours.lm_head.decoder.weight is words) == config.tie_word_embeddings
        assert ours.lm_head.bias is ours.lm_head.decoder.bias


@pytest.mark.parametrize("kind", READABLE)
def test_round_trip_through_transformers5(kind, tmp_path, caplog):
    """We write, transformers reads without a word and computes the same, writes, and we read."""
    model, config = CASES[kind]
    ours = twin(model, config)
    ours.save_pretrained(tmp_path / "ours", max_shard_bytes=4000 if kind == "base" else 10**9)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (kind == "base")
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.INFO):
        theirs, info = getattr(transformers, ARCHITECTURES[model]).from_pretrained(
            tmp_path / "ours", output_loading_info=True
        )
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING], caplog.text
    assert not any(info.values()), info
    batch = to_torch(with_tokens(case_batch(model, config, kind)))
    with torch.no_grad():
        found, expected = ours(**batch), theirs.eval()(**batch)
    real = batch["attention_mask"] == 1 if config.is_decoder else slice(None)
    name = "start_logits" if model == "question_answering" else "logits"
    name = "last_hidden_state" if model == "base" else name
    assert_close(found[name][real], expected[name][real], name)

    theirs.save_pretrained(tmp_path / "theirs")
    again = twin_class(model).from_pretrained(tmp_path / "theirs")
    assert_same(again.to_params(), ours.to_params())
    assert not str(again.loading_info) and not again.training
    half = twin_class(model).from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    root = tmp_path_factory.mktemp("torch4")
    for kind in READABLE:
        model, config = CASES[kind]
        twin(model, config.replace(tie_last_hidden_states=False)).save_pretrained(root / kind)
        np.savez(root / kind / "batch.npz", **with_tokens(case_batch(model, config, kind)))
        (root / kind / "architecture.txt").write_text(ARCHITECTURES[model])
    run_oracle("transformers4_pytorch.py", root)
    return root


@pytest.mark.parametrize("kind", READABLE)
def test_transformers4_loads_and_matches_outputs(kind, answers):
    model, config = CASES[kind]
    assert (answers / kind / "said.txt").read_text() == ""
    batch = to_torch(with_tokens(case_batch(model, config, kind)))
    again = twin_class(model).from_pretrained(answers / kind / "written")
    assert not str(again.loading_info)
    assert_same(again.to_params(), random_params(config, model))
    again = twin_class(model).from_pretrained(
        answers / kind / "written", tie_last_hidden_states=False
    )
    with torch.no_grad():
        found = again(**batch, output_hidden_states=True, output_attentions=True)
    real = batch["attention_mask"] == 1 if config.is_decoder else slice(None)
    for name, b in np.load(answers / kind / "torch.npz").items():
        field, _, i = name.partition(".")
        a = found[field]
        a = (a[int(i)] if isinstance(a, tuple) else a).numpy()
        if a.ndim == 4:
            a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
        assert_close(a[real] if a.ndim else a, b[real] if b.ndim else b, name, 6e-6, 6e-5)


def test_loading_into_other_head_reports_keys(tmp_path, caplog):
    base = twin("base", SMALL)
    base.save_pretrained(tmp_path)
    headed = twin_class("sequence_classification").from_pretrained(tmp_path, num_labels=3)
    assert "classifier.out_proj.weight" in headed.loading_info.missing_keys
    assert all("pooler.dense" in name for name in headed.loading_info.unexpected_keys)
    assert "newly initialized: classifier.dense.weight" in caplog.text
    assert_same(headed.to_params()["encoder"], base.to_params()["encoder"])
    assert headed.classifier.out_proj.weight.std() > 0
    without = twin_class("base").from_pretrained(tmp_path, add_pooling_layer=False)
    assert without(torch.tensor([[5, 6]])).pooler_output is None


def test_unreadable_folders_raise_one_line(tmp_path):
    cls = twin_class("sequence_classification")
    with pytest.raises(InputError, match="no such directory"):
        cls.from_pretrained(tmp_path / "absent")
    twin("sequence_classification", SMALL).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="unknown argument num_label"):
        cls.from_pretrained(tmp_path, num_label=3)
    with pytest.raises(InputError, match=r"classifier.out_proj.weight is float32\[2, 16\]"):
        cls.from_pretrained(tmp_path, num_labels=4)
    again = cls.from_pretrained(tmp_path, num_labels=4, ignore_mismatched_sizes=True)
    assert again(torch.tensor([[0, 5]])).logits.shape == (1, 4)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="damaged or not a safetensors file"):
        cls.from_pretrained(tmp_path)


def test_non_finite_parameter_raises_with_its_name():
    ours = twin("base", SMALL)
    ours.pooler["dense"].bias.data[3] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinity in .*pooler\.dense\.bias"):
        ours.to_params()


def test_import_and_forward_load_no_other_framework():
    """jax is imported, for the parameter table, but not one of its devices is touched."""
    code = (
        "import sys, torch, bridges.pytorch as bridge\n"
        "config = bridge.RobertaPreLayerNormConfig.preset('tiny', is_decoder=True)\n"
        "model = bridge.RobertaPreLayerNormForCausalLM(config)\n"
        "model = model.from_params(model.to_params(), config)\n"
        "ids = torch.tensor([[5, 6]])\n"
        "model(ids, labels=ids), model.generate(ids, max_new_tokens=2)\n"
        "from jax._src import xla_bridge\n"
        "others = {'tensorflow', 'keras', 'transformers', 'bridges.tensorflow'}\n"
        "print(sorted(others & set(sys.modules)), xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[] False", done.stderr

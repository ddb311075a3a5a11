"""Folders of the Flax classes, read and written by transformers 5."""

import logging
import warnings

import pytest
import transformers
from safetensors.numpy import save_file

from prelnroberta.config import ARCHITECTURES
from prelnroberta.pretrained.hf_checkpoint import (
    read_weights,
)
from tests.helpers.small_models import MODELS, flax_class, small_config, small_flax_model
from tests.helpers.tolerances import assert_same_params

pytestmark = [pytest.mark.torch, pytest.mark.oracle]

UNTIED = ["masked_lm-untied", "causal_lm-untied"]


@pytest.mark.parametrize("name", [*MODELS, *UNTIED])
def test_round_trip_through_transformers5(name, tmp_path, caplog):
    """We write, transformers reads without a word and writes, we read the same bits."""
    model, _, untied = name.partition("-")
    ours = small_flax_model(model, small_config(model).replace(tie_word_embeddings=not untied))
    ours.save_pretrained(tmp_path / "ours", max_shard_bytes=4000 if model == "base" else 10**9)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (model == "base")
    theirs, said, info = read_by_transformers_5(model, tmp_path / "ours", caplog)
    assert not said and not info
    theirs.save_pretrained(tmp_path / "theirs")
    again = flax_class(model).from_pretrained(tmp_path / "theirs")
    assert_same_params(again.params, ours.params)
    assert not str(again.loading_info)
    assert_same_params(flax_class(model).from_pretrained(tmp_path / "ours").params, ours.params)


def read_by_transformers_5(model, directory, caplog):
    """Its torch model, what it said in its log or as a Python warning, and what it returned of
    tensors that did not fit."""
    transformers.logging.enable_propagation()
    cls = getattr(transformers, ARCHITECTURES[model])
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        theirs, info = cls.from_pretrained(directory, output_loading_info=True)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return theirs, said + [str(w.message) for w in warned], {k: v for k, v in info.items() if v}


def test_transformers5_reports_a_missing_tensor(tmp_path, caplog):
    """Or the test above could not fail."""
    small_flax_model("masked_lm").save_pretrained(tmp_path)
    tensors, _ = read_weights(tmp_path)
    del tensors["lm_head.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    _, said, info = read_by_transformers_5("masked_lm", tmp_path, caplog)
    assert any("lm_head.dense.bias" in line for line in said)
    assert info == {"missing_keys": {"lm_head.dense.bias"}}

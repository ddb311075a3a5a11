"""Folders and tensor names against transformers 5."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM

from prelnroberta import params as parameters
from prelnroberta.data.tokenizer import save_tokenizer, train_tokenizer
from prelnroberta.model.heads import MaskedLM
from prelnroberta.pretrained.hf_checkpoint import (
    hf_name,
    load_pretrained,
    save_pretrained,
    to_state_dict,
)
from tests.helpers.programs import ROOT
from tests.helpers.small_models import ODD, TINY, ragged_batch, random_params
from tests.helpers.tolerances import assert_close

pytestmark = [pytest.mark.torch, pytest.mark.oracle]

CONFIGS = {"tied": TINY, "untied": ODD}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tensor_names_match_torch_models(config):
    model = AutoModelForMaskedLM.from_config(_torch_config(config))
    torch_names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ours = {name: t.shape for name, t in to_state_dict(random_params(config), config).items()}
    assert ours == torch_names
    names = [hf_name(path) for path in parameters.table(config)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_files_saved_by_transformers_are_loaded(config, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(_torch_config(config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        if not config.tie_word_embeddings:  # transformers 5 reads the one, 4 the other
            model.lm_head.bias.copy_(model.lm_head.decoder.bias)
    model.save_pretrained(tmp_path)
    params, ours = load_pretrained(tmp_path)
    batch = ragged_batch(config)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        expected = model.double()(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits
    logits, _ = MaskedLM(ours).apply({"params": params}, **inputs)
    assert_close(logits, expected.numpy(), "logits")


def test_auto_classes_load_without_warnings_and_match(tmp_path):
    """Model and tokenizer in a fresh process: nothing on standard error, our ids, our logits."""
    tokenizer = train_tokenizer(["the cat sat on the mat, and that was that"] * 20, 300)
    config = TINY.replace(vocab_size=tokenizer.get_vocab_size())
    params = random_params(config)
    save_pretrained(tmp_path, params, config)
    save_tokenizer(tokenizer, tmp_path, config.max_length)
    text = "the cat <mask> on that"
    result = subprocess.run(
        [sys.executable, ROOT / "tests/programs/load_by_auto_classes.py", tmp_path, text],
        capture_output=True,
        text=True,
        check=True,
    )
    noise = [line for line in result.stderr.splitlines() if "Loading weights" not in line]
    assert not [line for line in noise if line.strip()], result.stderr
    ids, expected = json.loads(result.stdout)
    assert ids == [tokenizer.encode(text).ids]
    logits, _ = MaskedLM(config).apply({"params": params}, np.array(ids))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def _torch_config(config):
    from transformers import RobertaPreLayerNormConfig

    values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    return RobertaPreLayerNormConfig(**values)

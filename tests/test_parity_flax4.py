"""Parity with the last Flax classes of transformers (4.57.6), live, from a directory we wrote.

They need an older transformers than the torch oracle: `make test` installs it beside the
environment (no dependency of ours changes) and it runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import TINY, assert_close, ragged_batch, random_params
from test_parity_torch import jax_gradients

from prelnroberta.huggingface import save_pretrained, to_tensors

TRANSFORMERS_4 = Path(sys.prefix) / "transformers4"
CONFIGS = {
    "tiny": TINY,
    "two_types_relu": TINY.replace(type_vocab_size=2, hidden_act="relu", layer_norm_eps=1e-12),
    "untied": TINY.replace(tie_word_embeddings=False, num_hidden_layers=3),
}


def run_oracle(script: str, *args: Path) -> None:
    assert TRANSFORMERS_4.is_dir(), f"{TRANSFORMERS_4} is missing: run `make test`, which makes it"
    subprocess.run(
        [sys.executable, Path(__file__).parent / "oracle" / script, *args],
        check=True,
        timeout=600,
        env={
            **os.environ,
            "PYTHONPATH": str(TRANSFORMERS_4),
            "USE_TF": "0",
            "TRANSFORMERS_VERBOSITY": "error",
            "JAX_PLATFORMS": "cpu",
        },
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_masked_lm(name, tmp_path):
    config = CONFIGS[name]
    params, batch = random_params(config), ragged_batch(config)
    save_pretrained(tmp_path / "model", params, config)
    np.savez(tmp_path / "batch.npz", **batch)
    run_oracle(
        "transformers4_flax.py", tmp_path / "model", tmp_path / "batch.npz", tmp_path / "out.npz"
    )
    theirs = dict(np.load(tmp_path / "out.npz"))
    loss, logits, gradients = jax_gradients(config, params, batch)
    # Both sides are float32 here: the bound is twice what each may be off by itself.
    assert_close(logits, theirs.pop("logits"), "logits", 4e-6, 4e-5)
    assert abs(float(loss) / theirs.pop("loss") - 1) < 4e-6
    ours = to_tensors(gradients, config)
    scale = max(np.abs(g).max() for g in theirs.values())
    for tensor, gradient in theirs.items():
        if tensor.endswith("attention.self.key.bias"):
            assert np.abs(ours[tensor]).max() < 1e-6 * scale, tensor
        else:
            assert_close(ours[tensor], gradient, f"gradient of {tensor}", 1e-5, 2e-4)

"""Run by test_encoder.py: every module under pmap on eight virtual devices, against plain calls.

In a process of its own, because their number is fixed when jax starts; raises where they differ.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.model import heads

DEVICES = 8
CONFIG = RobertaPreLayerNormConfig.preset(
    "tiny", hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1
)


def main() -> None:
    assert jax.device_count() == DEVICES
    jax.config.update("jax_disable_most_optimizations", True)  # what is compiled runs once
    rng = np.random.default_rng(0)
    ids = rng.integers(4, CONFIG.vocab_size, (2 * DEVICES, 7))
    ids[1, 4:] = ids[9, :3] = CONFIG.pad_token_id
    for model, of_class in heads.MODULES.items():
        module = of_class(CONFIG.replace(is_decoder=model == "causal_lm"))
        rows = np.stack([ids, ids[::-1]], 1) if model == "multiple_choice" else ids
        rows = {"input_ids": rows, "attention_mask": (rows != CONFIG.pad_token_id).astype(np.int32)}
        params = parameters.init(module.config, jax.random.key(0), model)

        def run(params, rows, module=module):
            return module.apply({"params": params}, **rows)

        cut = {k: v.reshape(DEVICES, 2, *v.shape[1:]) for k, v in rows.items()}
        found, expected = jax.pmap(run, in_axes=(None, 0))(params, cut), jax.jit(run)(params, rows)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.reshape(a, b.shape), b, rtol=2e-5, atol=2e-5)
        if model != "masked_lm":
            continue

        def gradient(params, rows, run=run):
            return jax.grad(lambda p: (run(p, rows)[0] ** 3).sum())(params)

        def summed(params, rows, gradient=gradient):
            return jax.lax.psum(gradient(params, rows), "data")

        found = jax.pmap(summed, "data", in_axes=(None, 0))(params, cut)
        expected = jax.jit(gradient)(params, rows)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            bound = 1e-5 * np.abs(b).max() + 1e-6
            np.testing.assert_allclose(a, np.stack([b] * DEVICES), rtol=1e-4, atol=bound)


if __name__ == "__main__":
    main()

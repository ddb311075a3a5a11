"""Runs transformers 4.57.6's Flax class on a directory of ours, in a process of its own.

python transformers4_flax.py MODEL_DIR BATCH.npz OUT.npz
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from transformers import FlaxRobertaPreLayerNormForMaskedLM


def main(model_dir: str, batch_path: str, out_path: str) -> None:
    batch = dict(np.load(batch_path))
    model = FlaxRobertaPreLayerNormForMaskedLM.from_pretrained(model_dir, from_pt=True)

    def loss(params):
        logits = model(
            batch["input_ids"],
            batch["attention_mask"],
            batch["token_type_ids"],
            params=params,
        ).logits
        counted = batch["labels"] != -100
        labels = jnp.where(counted, batch["labels"], 0)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
        return -(picked * counted).sum() / counted.sum(), logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(model.params)
    results = {"loss": value, "logits": logits}
    for path, leaf in flatten_dict(gradients, sep=".").items():
        module, _, kind = path.rpartition(".")
        name = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(kind, kind)
        results[f"{module}.{name}"] = leaf.T if kind == "kernel" else leaf
    np.savez(out_path, **{k: np.asarray(v) for k, v in results.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])

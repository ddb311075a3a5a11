"""transformers 4.57.6's TensorFlow classes on directories of ours, all in one process.

python transformers4_tensorflow.py ROOT, which holds, for each case, CASE/config.json and weights,
CASE/batch.npz and CASE/architecture.txt. Writes CASE/tf.npz, outputs and the loss' gradients by
torch's names, and CASE/h5/, what its `save_pretrained` writes.
"""

import os
import re
import sys
from pathlib import Path

os.environ["USE_TF"] = "1"

import numpy as np
import tensorflow as tf
import transformers
from safetensors.numpy import load_file

PREFIX = "roberta_prelayernorm."
LEAVES = {"kernel": "weight", "gamma": "weight", "beta": "bias", "embeddings": "weight"}


def torch_name(variable):
    """Without the class, which the name begins with."""
    *modules, leaf = variable.name.removesuffix(":0").split("/")[1:]
    module = re.sub(r"layer_\._(\d+)", r"layer.\1", ".".join(modules))
    return f"{module}.{LEAVES.get(leaf, leaf)}"


def fill(model, tensors):
    """By hand: its own reader does not know today's safetensors."""
    for variable in model.trainable_variables:
        name = torch_name(variable)
        value = tensors.pop(name if name in tensors else name.removeprefix(PREFIX))
        variable.assign(value.T if variable.name.endswith("kernel:0") else value)
    assert not tensors, sorted(tensors)


def main(root: str) -> None:
    for case in sorted(Path(root).iterdir()):
        name = (case / "architecture.txt").read_text()
        config = transformers.RobertaPreLayerNormConfig.from_pretrained(case)
        model = getattr(transformers, "TF" + name)(config)
        model.build_in_name_scope()
        fill(model, load_file(case / "model.safetensors"))
        batch = {k: tf.constant(v) for k, v in np.load(case / "batch.npz").items()}
        with tf.GradientTape() as tape:
            output = model(batch, output_hidden_states=True, output_attentions=True)
            target = tf.reduce_mean(output.loss if "loss" in output else output[0] ** 2)
        arrays = {}
        for field, value in output.items():
            for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
                if tf.is_tensor(part):
                    arrays[f"{field}.{i}"] = np.asarray(part)
        for variable, gradient in zip(
            model.trainable_variables,
            tape.gradient(target, model.trainable_variables),
            strict=True,
        ):
            if gradient is not None:
                value = tf.convert_to_tensor(gradient).numpy()
                kernel = variable.name.endswith("kernel:0")
                arrays["gradient." + torch_name(variable)] = value.T if kernel else value
        np.savez(case / "tf.npz", **arrays)
        model.save_pretrained(case / "h5")


if __name__ == "__main__":
    main(*sys.argv[1:])

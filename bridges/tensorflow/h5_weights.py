"""The weights beside a config.json, those of transformers 4's TF classes included."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from prelnroberta import huggingface
from prelnroberta.errors import InputError

H5_NAME = "tf_model.h5"

_LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "embeddings": "weight",
}


def read_weights(directory: str | Path) -> tuple[dict[str, np.ndarray], str]:
    """As `huggingface.read_weights`; from tf_model.h5 where nothing else holds the weights.

    Raises:
        InputError: naming the file that is missing or damaged.
    """
    path = Path(directory) / H5_NAME
    others = (huggingface.WEIGHTS_NAME, huggingface.INDEX_NAME, huggingface.FLAX_NAME)
    if path.is_file() and not any((path.parent / name).is_file() for name in others):
        return read_h5(path), str(path)
    return huggingface.read_weights(directory)


def read_h5(path: str | Path) -> dict[str, np.ndarray]:
    """transformers 4's TF variables by its torch names, which `huggingface.NAMES` pairs with ours.

    A variable is called CLASS/.../layer_._0/output/dense/kernel:0 there; kernels lie as ours do.

    Raises:
        InputError: naming the file, where it is no HDF5 file.
    """
    import h5py

    tensors: dict[str, np.ndarray] = {}

    def take(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            name, value = _torch_form(item.name, item[()])
            tensors[name] = value

    try:
        with h5py.File(path, "r") as file:
            file.visititems(take)
    except (OSError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{path}: damaged or not an HDF5 file ({reason})") from None
    return tensors


def _torch_form(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """(torch's name, torch's layout) of a variable at /GROUP/CLASS/module/.../leaf:0."""
    parts = name.removesuffix(":0").strip("/").split("/")
    *modules, leaf = parts[2:]
    module = re.sub(r"layer_\._(\d+)", r"layer.\1", ".".join(modules))
    if leaf == "kernel":
        value = value.T
    return f"{module}.{_LEAVES.get(leaf, leaf)}", value

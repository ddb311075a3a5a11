"""Reads transformers 4's `tf_model.h5`: h5py and numpy, without TensorFlow."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from prelnroberta.errors import InputError

H5_NAME = "tf_model.h5"
H5_MAGIC = b"\x89HDF\r\n\x1a\n"

_LEAVES = {"kernel": "weight", "gamma": "weight", "beta": "bias", "embeddings": "weight"}


def read_h5(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the variables of a TF model under transformers' torch names, in torch's layout.

    The file calls a variable GROUP/CLASS/.../layer_._0/output/dense/kernel:0. CLASS ends in an
    instance counter and is ignored. A variable that two groups share is stored in both.

    Raises:
        InputError: the file is damaged, refers to other files, claims more data than its size, or
            holds two values of one variable; or h5py is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: reading h5 files needs h5py: pip install h5py") from None
    path = Path(path)
    tensors: dict[str, np.ndarray] = {}
    bytes_left = path.stat().st_size

    def add_variable(key: str, item: object) -> None:
        nonlocal bytes_left
        if not isinstance(item, h5py.Dataset):
            return
        if item.is_virtual or item.external or item.chunks or item.dtype.kind not in "fiu":
            raise InputError(
                f"{path}: {key} is stored elsewhere, compressed or not an array of numbers, which "
                "Keras never writes: refused"
            )
        bytes_left -= item.nbytes
        if bytes_left < 0:
            raise InputError(f"{path}: claims more than its size holds: truncated or forged")
        name, value = _to_torch(key, item[()])
        if not np.array_equal(tensors.setdefault(name, value), value):
            raise InputError(f"{path}: two different values of {name}")

    try:
        with h5py.File(path, "r") as file:
            file.visititems(add_variable)
    except InputError:
        raise
    except Exception as error:  # HDF5 raises many types on damaged bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path}: damaged or not an HDF5 file ({reason})") from None
    return tensors


def _to_torch(key: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Returns the torch name and array of a variable at GROUP/CLASS/module/.../leaf:0."""
    *modules, leaf = key.removesuffix(":0").split("/")[2:] or [key]
    module = re.sub(r"layer_\._(\d+)", r"layer.\1", ".".join(modules))
    name = f"{module}.{_LEAVES.get(leaf, leaf)}"
    return name, value.T if leaf == "kernel" else value

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
    """The variables of a TF model by transformers' torch names, in torch's layout.

    A variable is called GROUP/CLASS/.../layer_._0/output/dense/kernel:0 there. The class's name
    counts instances and says nothing; what two groups share, each of them holds.

    Raises:
        InputError: a file that is damaged, that refers to other files, that claims more than its
            size, or that holds two values of one variable; h5py is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: reading h5 files needs h5py: pip install h5py") from None
    path = Path(path)
    tensors: dict[str, np.ndarray] = {}
    left = path.stat().st_size

    def take(place: str, item: object) -> None:
        nonlocal left
        if not isinstance(item, h5py.Dataset):
            return
        if item.is_virtual or item.external or item.chunks or item.dtype.kind not in "fiu":
            raise InputError(
                f"{path}: {place} is stored elsewhere, compressed or no array of numbers, which "
                "Keras never writes: refused"
            )
        left -= item.nbytes
        if left < 0:
            raise InputError(f"{path}: claims more than its size holds: truncated or forged")
        name, value = _torch_form(place, item[()])
        if not np.array_equal(tensors.setdefault(name, value), value):
            raise InputError(f"{path}: two different values of {name}")

    try:
        with h5py.File(path, "r") as file:
            file.visititems(take)
    except InputError:
        raise
    except Exception as error:  # whatever HDF5 says of damaged bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path}: damaged or not an HDF5 file ({reason})") from None
    return tensors


def _torch_form(place: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """(torch's name, torch's layout) of a variable at GROUP/CLASS/module/.../leaf:0."""
    *modules, leaf = place.removesuffix(":0").split("/")[2:] or [place]
    module = re.sub(r"layer_\._(\d+)", r"layer.\1", ".".join(modules))
    name = f"{module}.{_LEAVES.get(leaf, leaf)}"
    return name, value.T if leaf == "kernel" else value

"""Weights of a Hugging Face directory, including those of transformers 4's TF classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bridges.formats.keras_h5 import H5_NAME, read_h5
from prelnroberta.pretrained import hf_checkpoint


def read_weights(directory: str | Path) -> tuple[dict[str, np.ndarray], str]:
    """As `hf_checkpoint.read_weights`, or from tf_model.h5 if it is the only weight file.

    Raises:
        InputError: naming the file that is missing or damaged.
    """
    path = Path(directory) / H5_NAME
    others = (hf_checkpoint.WEIGHTS_NAME, hf_checkpoint.INDEX_NAME, hf_checkpoint.FLAX_NAME)
    if path.is_file() and not any((path.parent / name).is_file() for name in others):
        return read_h5(path), str(path)
    return hf_checkpoint.read_weights(directory)

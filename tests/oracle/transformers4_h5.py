"""transformers 4.57.6's TF classes on directories of ours: what they give, and their h5 files.

python transformers4_h5.py ROOT, which holds CASE/config.json, weights, architecture.txt and
batch.npz. Writes CASE/tf/ (config.json, tf_model.h5) and CASE/tf.npy.
"""

import os
import sys
from pathlib import Path

os.environ["USE_TF"] = "1"

import numpy as np
import transformers


def main(root: str) -> None:
    for case in sorted(Path(root).iterdir()):
        name = (case / "architecture.txt").read_text()
        model = getattr(transformers, "TF" + name).from_pretrained(case, from_pt=True)
        output = model(**np.load(case / "batch.npz"))
        np.save(case / "tf.npy", output[0].numpy())
        model.save_pretrained(case / "tf", safe_serialization=False)


if __name__ == "__main__":
    main(*sys.argv[1:])

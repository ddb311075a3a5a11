"""Run by test_files.py of the TensorFlow bridge: every signature of a SavedModel.

python tests/programs/run_saved_model.py SAVED_MODEL BATCH OUTPUT
"""

import sys

import numpy as np
import tensorflow as tf

loaded = tf.saved_model.load(sys.argv[1])
batch = dict(np.load(sys.argv[2]))
for name, signature in loaded.signatures.items():
    taken = signature.structured_input_signature[1]
    found = signature(**{k: tf.constant(batch[k]) for k in taken})
    np.savez(f"{sys.argv[3]}/{name}.npz", **{k: v.numpy() for k, v in found.items()})
assert not {"prelnroberta", "bridges", "transformers"} & set(sys.modules)

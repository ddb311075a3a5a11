"""Run by test_export.py: runs an exported model in a process that cannot import this repository.

python tests/programs/run_exported.py FOLDER FORM reads FOLDER/batch.npz and writes FOLDER/FORM.npy.
"""

import sys

for name in ("prelnroberta", "bridges", "experiments", "flax"):
    sys.modules[name] = None
import numpy as np  # noqa: E402

out, form = sys.argv[1:]
batch = dict(np.load(out + "/batch.npz"))
if form == "onnx":
    import onnxruntime

    session = onnxruntime.InferenceSession(out + "/exported/onnx/model.onnx")
    (logits,) = session.run(["logits"], {n: x.astype(np.int64) for n, x in batch.items()})
elif form == "tensorflow":
    sys.modules["keras"] = None
    import tensorflow as tf

    loaded = tf.saved_model.load(out + "/exported/tensorflow")
    serve = loaded.signatures["serving_default"]
    taken = serve.structured_input_signature[1]
    logits = serve(**{n: tf.constant(batch[n]) for n in taken})["logits"].numpy()
else:
    import jax.export
    from safetensors.numpy import load_file

    with open(out + "/exported/stablehlo/model.stablehlo", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    params = {}
    for path, leaf in load_file(out + "/exported/stablehlo/params.safetensors").items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    logits = np.asarray(program.call(params, *batch.values())["logits"])
np.save(out + "/" + form + ".npy", logits)

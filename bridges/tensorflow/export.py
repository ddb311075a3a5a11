"""Export to SavedModel and TFLite files, which load without this package.

Each file is loaded and compared with the model before it is put in place.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from bridges.tensorflow.outputs import ModelOutput
from bridges.tensorflow.pretrained import TFRobertaPreLayerNormPreTrainedModel
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

Model = TFRobertaPreLayerNormPreTrainedModel

# Allowed rms difference between file and model, relative to the rms of the model's output, by the
# dtype of the computation. A graph rounds at other places than eager calls; a wrong kernel differs
# by 1 or gives NaN.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}


def serving_functions(model: Model) -> dict[str, Any]:
    """Signature name -> tf.function with a dynamic batch and length; outputs are named fields.

    `serving_default` takes input_ids, attention_mask and, if the model has more than one token
    type, token_type_ids, all int32. `ids` takes input_ids alone, and every token is visible.
    `with_states` is serving_default with the outputs hidden_states_0, ..., attentions_0, ...
    """
    axes = [None, None, None] if model.model == "multiple_choice" else [None, None]
    names = ["input_ids", "attention_mask"]
    names += ["token_type_ids"] if model.config.type_vocab_size > 1 else []

    def make_signature(names: list[str], with_states: bool) -> Any:
        def serve(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            return flatten_output(_run_model(model, inputs, with_states))

        specs = {name: tf.TensorSpec(axes, tf.int32, name=name) for name in names}
        return tf.function(serve, autograph=False).get_concrete_function(**specs)

    return {
        "serving_default": make_signature(names, False),
        "ids": make_signature(["input_ids"], False),
        "with_states": make_signature(names, True),
    }


def _run_model(model: Model, inputs: Any, with_states: bool) -> ModelOutput:
    return model(
        inputs,
        output_hidden_states=with_states,
        output_attentions=with_states,
        return_dict=True,
    )


def flatten_output(output: ModelOutput) -> dict[str, tf.Tensor]:
    """Name -> float32 tensor, with numbered tuples: signatures cannot be nested."""
    flat = {}
    for name, value in output.items():
        if isinstance(value, tuple):
            flat |= {f"{name}_{i}": tensor for i, tensor in enumerate(value)}
        else:
            flat[name] = value
    return {name: tf.cast(value, tf.float32) for name, value in flat.items()}


def _weights_module(model: Model) -> tf.Module:
    """A module with the weights alone, without optimizer slots, metrics or Python classes."""
    module = tf.Module()
    module.weights = [variable.value for variable in model.weights]
    return module


def save_saved_model(model: Model, directory: str | Path) -> None:
    """Writes a SavedModel with the signatures of `serving_functions`.

    `tf.saved_model.load(directory).signatures["serving_default"](input_ids=..., ...)` needs only
    TensorFlow, not Keras.

    Raises:
        InputError: the directory exists, or the file's outputs differ from the model's.
    """
    directory = Path(directory)
    if directory.exists():
        raise InputError(f"{directory}: exists already, expected a new directory for a SavedModel")
    directory.parent.mkdir(parents=True, exist_ok=True)
    weights = _weights_module(model)
    with atomic_write(directory) as partial:
        tf.saved_model.save(weights, str(partial), signatures=serving_functions(model))
        loaded = tf.saved_model.load(str(partial))
        for name, signature in loaded.signatures.items():
            input_names = list(signature.structured_input_signature[1])

            def run(inputs: dict[str, np.ndarray], signature: Any = signature) -> Any:
                return signature(**{n: tf.constant(v) for n, v in inputs.items()})

            _compare(model, run, input_names, f"{directory}: signature {name}")


def save_tflite(model: Model, path: str | Path) -> None:
    """Writes a TFLite (LiteRT) file of the signature `serving_default`.

    To run it on a batch of any [B, L], resize the inputs by `interpreter.resize_tensor_input`, or
    call `interpreter.get_signature_runner()`.

    Raises:
        InputError: TensorFlow's converter refuses the model, as it does in mixed precision, or
            the file's outputs differ from the model's. Nothing is written.
    """
    path = Path(path)
    weights = _weights_module(model)
    function = serving_functions(model)["serving_default"]
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], weights)
    try:
        content = converter.convert()
    except Exception as error:  # the converter's own class is private
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path}: TFLite cannot hold this model ({reason})") from None
    with warnings.catch_warnings():
        # A deprecation warning names another package, which TensorFlow 2.21 does not install.
        warnings.simplefilter("ignore")
        runner = tf.lite.Interpreter(model_content=content).get_signature_runner()

    def run(inputs: dict[str, np.ndarray]) -> Any:
        return runner(**inputs)

    _compare(model, run, list(runner.get_input_details()), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def _compare(model: Model, run: Any, names: list[str], source: str) -> None:
    """Compares `run` with the model at two shapes, with pads on the right.

    Raises:
        InputError: naming the output that differs by more than `TOLERANCE`.
    """
    rng = np.random.default_rng(0)
    config, tolerance = model.config, TOLERANCE[model.compute_dtype]
    for B, L in ((1, 3), (3, min(config.max_length, 12))):
        shape = (B, 2, L) if model.model == "multiple_choice" else (B, L)
        mask = np.ones(shape, np.int32)
        mask[..., -1, -L // 3 :] = 0
        ids = rng.integers(0, config.vocab_size, shape)
        inputs = {
            "input_ids": np.where(mask == 1, ids, config.pad_token_id).astype(np.int32),
            "attention_mask": mask,
            "token_type_ids": rng.integers(0, config.type_vocab_size, shape).astype(np.int32),
        }
        inputs = {name: inputs[name] for name in names}
        found = run(inputs)
        expected = flatten_output(_run_model(model, inputs, "hidden_states_0" in found))
        for name, value in expected.items():
            value = value.numpy()
            rms = np.sqrt(np.mean(np.square(value))) or 1.0
            error = np.sqrt(np.mean(np.square(np.asarray(found[name]) - value))) / rms
            if not error <= tolerance:
                raise InputError(
                    f"{source}: {name} differs from the model's by {error:.1e} of its rms at "
                    f"shape {list(shape)}, expected {tolerance:.0e} or less"
                )

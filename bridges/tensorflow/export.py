"""SavedModel and TFLite files that need none of our code, each compared with the model it is of."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from bridges.tensorflow.outputs import Output
from bridges.tensorflow.pretrained import TFRobertaPreLayerNormPreTrainedModel
from prelnroberta.errors import InputError
from prelnroberta.files import written_whole

Model = TFRobertaPreLayerNormPreTrainedModel

# Rms difference from the model that a file may show, over the rms of the model's output, by the
# dtype of the computation: a graph rounds at other places than eager calls do. A wrong kernel is
# off by 1 or gives NaN.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}


def serving_functions(model: Model) -> dict[str, Any]:
    """Signature name -> tf.function with a dynamic batch and length; outputs are named fields.

    `serving_default` takes input_ids, attention_mask and, where the model tells types apart,
    token_type_ids, all int32; `ids` takes input_ids alone and sees every token; `with_states`
    is serving_default with hidden_states_0, ..., attentions_0, ... among the outputs.
    """
    axes = [None, None, None] if model.model == "multiple_choice" else [None, None]
    names = ["input_ids", "attention_mask"]
    names += ["token_type_ids"] if model.config.type_vocab_size > 1 else []

    def serving(names: list[str], states: bool) -> Any:
        def serve(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            found = model(
                inputs, output_hidden_states=states, output_attentions=states, return_dict=True
            )
            return flat_fields(found)

        specs = {name: tf.TensorSpec(axes, tf.int32, name=name) for name in names}
        return tf.function(serve, autograph=False).get_concrete_function(**specs)

    return {
        "serving_default": serving(names, False),
        "ids": serving(["input_ids"], False),
        "with_states": serving(names, True),
    }


def flat_fields(found: Output) -> dict[str, tf.Tensor]:
    """Name -> tensor, tuples numbered: signatures have no nesting. Half precision as float32."""
    flat = {}
    for name, value in found.items():
        if isinstance(value, tuple):
            flat |= {f"{name}_{i}": part for i, part in enumerate(value)}
        else:
            flat[name] = value
    return {name: tf.cast(value, tf.float32) for name, value in flat.items()}


def _holder(model: Model) -> tf.Module:
    """Owns the weights and nothing else: no optimizer slots, metrics or Python classes."""
    holder = tf.Module()
    holder.weights = [variable.value for variable in model.weights]
    return holder


def save_saved_model(model: Model, directory: str | Path) -> None:
    """Writes a SavedModel with the signatures of `serving_functions`, loads and compares it.

    `tf.saved_model.load(directory).signatures["serving_default"](input_ids=..., ...)` needs
    TensorFlow alone, and Keras not at all.

    Raises:
        InputError: where something stands already, or what was written disagrees with the model.
    """
    directory = Path(directory)
    if directory.exists():
        raise InputError(f"{directory}: exists already, expected a new place for a SavedModel")
    directory.parent.mkdir(parents=True, exist_ok=True)
    holder = _holder(model)
    with written_whole(directory) as partial:
        tf.saved_model.save(holder, str(partial), signatures=serving_functions(model))
        loaded = tf.saved_model.load(str(partial))
        for name, signature in loaded.signatures.items():
            taken = signature.structured_input_signature[1]

            def run(inputs: dict[str, np.ndarray], signature: Any = signature) -> Any:
                return signature(**{n: tf.constant(v) for n, v in inputs.items()})

            _compare(model, run, list(taken), f"{directory}: signature {name}")


def save_tflite(model: Model, path: str | Path) -> None:
    """Writes a TFLite (LiteRT) file of the signature `serving_default`, and compares it.

    Inputs are resized to the batch at hand: `interpreter.resize_tensor_input`, or a call of
    `interpreter.get_signature_runner()` with arrays of any [B, L].

    Raises:
        InputError: where TensorFlow's converter refuses the model, as it does in mixed precision,
            or the interpreter disagrees with it: nothing is written then.
    """
    path = Path(path)
    holder = _holder(model)
    function = serving_functions(model)["serving_default"]
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], holder)
    try:
        content = converter.convert()
    except Exception as error:  # the converter's own class is private
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path}: TFLite cannot hold this model ({reason})") from None
    with warnings.catch_warnings():
        # It announces its move to another package, which TensorFlow 2.21 does not bring along.
        warnings.simplefilter("ignore")
        runner = tf.lite.Interpreter(model_content=content).get_signature_runner()

    def run(inputs: dict[str, np.ndarray]) -> Any:
        return runner(**inputs)

    _compare(model, run, list(runner.get_input_details()), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_bytes(content)


def _compare(model: Model, run: Any, names: list[str], source: str) -> None:
    """Holds `run` to the model at two shapes, with pads on the right."""
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
        states = "hidden_states_0" in found
        options = {"output_hidden_states": states, "output_attentions": states}
        expected = flat_fields(model(inputs, **options, return_dict=True))
        for name, value in expected.items():
            value = value.numpy()
            scale = np.sqrt(np.mean(np.square(value))) or 1.0
            error = np.sqrt(np.mean(np.square(np.asarray(found[name]) - value))) / scale
            if not error <= tolerance:
                raise InputError(
                    f"{source}: {name} differs from the model's by {error:.1e} of its rms at "
                    f"shape {list(shape)}, expected {tolerance:.0e} or less"
                )

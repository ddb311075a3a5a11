"""Carries a model out: Hugging Face folder, PyTorch, TensorFlow, ONNX, StableHLO, model card.

python -m experiments.export --model=runs/demo --output=exports/demo
python -m experiments.export --model=DIR --output=exports/onnx --format=onnx

Each file is loaded back and compared with the Flax model; the folder appears when all agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.find_model import find_model_folder
from experiments.flags.checks import check_installed, check_new_folder
from experiments.flags.launch import launch
from experiments.flags.programs import ExportSettings
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

if TYPE_CHECKING:
    import numpy as np

    from prelnroberta.config import RobertaPreLayerNormConfig
    from prelnroberta.params import Tree

    Arrays = dict[str, np.ndarray]
    Run = Callable[[Arrays], Arrays]

TOLERANCE = 1e-4  # of the largest error, over the rms of the outputs; what is wrong is off by 1
_NEEDS = {
    "torch": [("torch", "torch")],
    "tensorflow": [("tensorflow", "tf")],
    "onnx": [("torch", "torch"), ("onnxscript", "onnx"), ("onnxruntime", "onnx")],
    "stablehlo": [],
}


def main(settings: ExportSettings) -> int:
    """Writes and verifies each format. Returns the exit code."""
    directory, output = find_model_folder(settings.model), Path(settings.output)
    check_new_folder(settings.output)
    for form in settings.format:
        for module, extra in _NEEDS[form]:
            check_installed(module, extra, f"--format={form}")

    from experiments.common.model_card import make_model_card
    from prelnroberta.params import parameter_count

    params, config, model = load(directory)
    agreement = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as partial:
        for form in ("huggingface", *dict.fromkeys(settings.format)):
            run = WRITERS[form](params, config, model, directory, partial)
            agreement[form] = largest_error(run, params, config, model)
            print(f"{form:<12} loaded back; largest error {agreement[form]:.1e}", flush=True)
            if not agreement[form] <= TOLERANCE:
                raise InputError(
                    f"{form}: what was written differs from the model by {agreement[form]:.1e} of "
                    f"its rms, expected {TOLERANCE:.0e} or less; {output} was not made"
                )
        card = make_model_card(
            config,
            model,
            parameter_count(config, model),
            directory.parent if (directory.parent / "flags.txt").exists() else None,
            parity(params, config, model),
            agreement,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
    print(f"written: {output}, with a model card in README.md")
    return 0


def load(directory: Path) -> tuple[Tree, RobertaPreLayerNormConfig, str]:
    """The tree, config and model that config.json's `architectures` names."""
    from prelnroberta.config import ARCHITECTURES
    from prelnroberta.pretrained import hf_checkpoint

    tensors, source = hf_checkpoint.read_weights(directory)
    config = hf_checkpoint.RobertaPreLayerNormConfig.from_json(directory)
    named = config.extra.get("architectures") or [None]
    # RobertaPreLayerNormModel comes with a pooler or without.
    pooled = any(name.endswith("pooler.dense.weight") for name in tensors)
    names = {
        cls.removeprefix("Flax").removeprefix("TF"): model
        for model, cls in ARCHITECTURES.items()
        if model != ("encoder" if pooled else "base")
    }
    model = names.get(str(named[0]).removeprefix("Flax").removeprefix("TF"))
    if model is None:
        raise InputError(
            f"{directory}/config.json: architectures={named}, expected one of {', '.join(names)}"
        )
    return hf_checkpoint.from_state_dict(tensors, config, model, source), config, model


def parity(params: Tree, config: RobertaPreLayerNormConfig, model: str) -> list[Any]:
    """The float32 errors of the twins whose frameworks are installed; none without torch."""
    import importlib.util

    from bridges.verify.parity import PARITY_MODELS, compare_frameworks, make_batch

    installed = [f for f in ("torch", "tensorflow") if importlib.util.find_spec(f)]
    if "torch" not in installed or model not in PARITY_MODELS:
        return []
    frameworks = ["flax", "pytorch", *installed[1:]]
    batch = make_batch(config, model, min(32, config.max_length))
    return list(compare_frameworks(params, config, model, batch, frameworks, ["float32"]))


# ---------------------------------------------------------------------------------------------
# Formats: each writes below `output` and returns a function that runs what it wrote.


def write_huggingface(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, source: Path, output: Path
) -> Run:
    from prelnroberta.data.tokenizer import load_tokenizer, save_tokenizer
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained, save_pretrained

    save_pretrained(output, params, config, model)
    if (source / "tokenizer.json").exists() or (source / "vocab.json").exists():
        save_tokenizer(load_tokenizer(source), output, config.max_length)
    again, saved = load_pretrained(output, model)
    return flax(again, saved, model)


def write_torch(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, source: Path, output: Path
) -> Run:
    import torch
    from safetensors.torch import load_file

    from bridges.pytorch.export import save_state_dict

    made = pytorch_twin(params, config, model)
    save_state_dict(made, output / "torch" / "state_dict.safetensors")
    again = type(made)(config, **options(model)).eval()
    again.load_state_dict(load_file(output / "torch" / "state_dict.safetensors"), strict=True)

    def run(inputs: Arrays) -> Arrays:
        with torch.no_grad():
            outputs = again(**{name: torch.from_numpy(x).long() for name, x in inputs.items()})
        return {name: x.numpy() for name, x in outputs.items() if torch.is_tensor(x)}

    return run


def write_onnx(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, source: Path, output: Path
) -> Run:
    import numpy as np
    import onnxruntime

    from bridges.pytorch.export import save_onnx

    save_onnx(pytorch_twin(params, config, model), output / "onnx")
    session = onnxruntime.InferenceSession(output / "onnx" / "model.onnx")
    names = [given.name for given in session.get_outputs()]

    def run(inputs: Arrays) -> Arrays:
        found = session.run(names, {name: x.astype(np.int64) for name, x in inputs.items()})
        return dict(zip(names, found, strict=True))

    return run


def write_tensorflow(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, source: Path, output: Path
) -> Run:
    # First, because it keeps TensorFlow from chatting on standard error.
    from bridges import tensorflow as twins
    from bridges.tensorflow.export import save_saved_model
    from prelnroberta.config import ARCHITECTURES

    # isort: split
    import tensorflow as tf

    twin = getattr(twins, f"TF{ARCHITECTURES[model]}")
    save_saved_model(twin.from_params(params, config, **options(model)), output / "tensorflow")
    signature = tf.saved_model.load(str(output / "tensorflow")).signatures["serving_default"]
    taken = signature.structured_input_signature[1]

    def run(inputs: Arrays) -> Arrays:
        found = signature(**{name: tf.constant(inputs[name]) for name in taken})
        return {name: x.numpy() for name, x in found.items()}

    return run


def write_stablehlo(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, source: Path, output: Path
) -> Run:
    import numpy as np

    from prelnroberta.inference.stablehlo import load_stablehlo, save_stablehlo

    save_stablehlo(params, config, model, output / "stablehlo")
    call = load_stablehlo(output / "stablehlo")

    def run(inputs: Arrays) -> Arrays:
        return {name: np.asarray(x) for name, x in call(*inputs.values()).items()}

    return run


WRITERS: dict[str, Callable[..., Run]] = {
    "huggingface": write_huggingface,
    "torch": write_torch,
    "tensorflow": write_tensorflow,
    "onnx": write_onnx,
    "stablehlo": write_stablehlo,
}


def options(model: str) -> dict[str, bool]:
    """What the twins' constructors take for this model of the parameter table."""
    return {"add_pooling_layer": False} if model == "encoder" else {}


def pytorch_twin(params: Tree, config: RobertaPreLayerNormConfig, model: str) -> Any:
    from bridges import pytorch
    from prelnroberta.config import ARCHITECTURES

    return getattr(pytorch, ARCHITECTURES[model]).from_params(params, config, **options(model))


# ---------------------------------------------------------------------------------------------
# Comparison


def flax(params: Tree, config: RobertaPreLayerNormConfig, model: str) -> Run:
    """The Flax model as what all others are compared with."""
    import jax
    import numpy as np

    from prelnroberta.inference.stablehlo import forward

    call = jax.jit(partial(forward, config, model))

    def run(inputs: Arrays) -> Arrays:
        with jax.default_matmul_precision("highest"):
            found = call(params, *inputs.values())
        return {name: np.asarray(x) for name, x in found.items()}

    return run


def batches(config: RobertaPreLayerNormConfig, model: str) -> Iterator[Arrays]:
    """Random int32 input_ids, attention_mask and token_type_ids of two shapes, padded on the
    right; neither is that of an example that a format was traced with."""
    import numpy as np

    rng = np.random.default_rng(0)
    for B, L in ((1, 5), (4, min(19, config.max_length))):
        shape = (B, 2, L) if model == "multiple_choice" else (B, L)
        mask = np.ones(shape, np.int32)
        mask[-1, ..., L // 2 :] = 0
        ids = np.where(mask == 1, rng.integers(0, config.vocab_size, shape), config.pad_token_id)
        types = rng.integers(0, config.type_vocab_size, shape)
        yield {
            "input_ids": ids.astype(np.int32),
            "attention_mask": mask,
            "token_type_ids": types.astype(np.int32),
        }


def largest_error(run: Run, params: Tree, config: RobertaPreLayerNormConfig, model: str) -> float:
    """Over all outputs and batches: largest difference from Flax over the rms of the output."""
    import numpy as np

    expected_by = flax(params, config, model)
    worst = 0.0
    for inputs in batches(config, model):
        found = run(inputs)
        for name, expected in expected_by(inputs).items():
            rms = float(np.sqrt(np.mean(np.square(expected)))) or 1.0
            # NaN must not pass for small.
            worst = np.fmax(
                worst, np.nan_to_num(np.abs(found[name] - expected).max() / rms, nan=np.inf)
            )
    return float(worst)


if __name__ == "__main__":
    launch(main, ExportSettings)

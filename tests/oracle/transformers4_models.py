"""transformers 4.57.6 on directories of ours, all in one process: what its torch and Flax classes
give and what gradients they have, what they say on loading, and Flax files for us to read.

python transformers4_models.py ROOT, which holds, for each case, CASE/config.json and weights,
CASE/architecture.txt and CASE/batch.npz: inputs by name, and of arrays named `of.FIELD` the
gradient of a loss at output FIELD. Writes CASE/said.txt, CASE/torch.npz and, but for what is
torch's alone, CASE/flax.npz and CASE/msgpack/. Gradients go by torch's names, after `d.`.
"""

import logging
import sys
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from flax.traverse_util import flatten_dict

TARGETS = ("labels", "start_positions", "end_positions")


class Said(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def flat(output) -> dict[str, np.ndarray]:
    """FIELD.i -> array."""
    return {
        f"{field}.{i}": np.asarray(part.detach() if isinstance(part, torch.Tensor) else part)
        for field, value in output.items()
        for i, part in enumerate(value if isinstance(value, tuple) else (value,))
    }


def run_torch(model, batch, weights) -> dict[str, np.ndarray]:
    model = model.double().eval()
    inputs = {k: torch.from_numpy(v) for k, v in batch.items()}
    inputs = {k: v.double() if v.dtype == torch.float32 else v for k, v in inputs.items()}
    if model.config.is_decoder:
        inputs["use_cache"] = False
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    target = output.get("loss")
    if target is None:
        target = sum((output[k] * torch.from_numpy(v)).sum() for k, v in weights.items())
    target.backward()
    gradients = {
        f"d.{n}": p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None
    }
    return flat(output) | gradients


def run_flax(model, batch, weights) -> dict[str, np.ndarray]:
    batch = {k: v for k, v in batch.items() if k not in TARGETS}

    def weighted(params):
        output = model(**batch, params=params, output_hidden_states=True, output_attentions=True)
        return sum((output[k] * v).sum() for k, v in weights.items()), output

    (_, output), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(model.params)
    results = flat(output)
    for path, leaf in flatten_dict(gradients, sep=".").items():
        module, _, kind = path.rpartition(".")
        name = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(kind, kind)
        results[f"d.{module}.{name}"] = np.asarray(leaf.T if kind == "kernel" else leaf)
    return results


def main(root: str) -> None:
    # What is compiled runs once.
    jax.config.update("jax_disable_most_optimizations", True)
    torch.set_num_threads(1)
    said = Said()
    transformers.logging.set_verbosity_warning()
    logging.captureWarnings(True)
    for name in ("transformers", "py.warnings"):
        logging.getLogger(name).addHandler(said)
    for case in sorted(Path(root).iterdir()):
        name = (case / "architecture.txt").read_text()
        said.lines.clear()
        model, info = getattr(transformers, name).from_pretrained(case, output_loading_info=True)
        complaints = [*said.lines, *(f"{k}: {v}" for k, v in info.items() if v)]
        (case / "said.txt").write_text("\n".join(complaints))
        if not (case / "batch.npz").exists():
            continue
        batch = dict(np.load(case / "batch.npz"))
        weights = {k.removeprefix("of."): batch.pop(k) for k in list(batch) if k.startswith("of.")}
        np.savez(case / "torch.npz", **run_torch(model, batch, weights))
        if (case / "torch_alone").exists():
            continue
        model = getattr(transformers, "Flax" + name).from_pretrained(case, from_pt=True)
        np.savez(case / "flax.npz", **run_flax(model, batch, weights))
        model.save_pretrained(case / "msgpack")


if __name__ == "__main__":
    main(*sys.argv[1:])

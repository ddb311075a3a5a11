"""Writes the model card of an export: architecture, training data, evaluation and parity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.run_report import read_records
from prelnroberta.config import ARCHITECTURES

if TYPE_CHECKING:
    from bridges.verify.parity import Comparison
    from prelnroberta.config import RobertaPreLayerNormConfig

# Model -> pipeline of the Hugging Face hub.
_PIPELINES = {
    "masked_lm": "fill-mask",
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
}
# Export format -> how to load it.
_USAGE = {
    "huggingface": "this folder: transformers' `{name}.from_pretrained`, or Flax{name}",
    "torch": "`torch/state_dict.safetensors`: `load_state_dict(safetensors.torch.load_file(...))`",
    "tensorflow": '`tensorflow/`: `tf.saved_model.load(...).signatures["serving_default"]`',
    "onnx": "`onnx/model.onnx`: `onnxruntime.InferenceSession(...)`",
    "stablehlo": "`stablehlo/`: `jax.export.deserialize(...).call`, on params.safetensors",
}


def make_model_card(
    config: RobertaPreLayerNormConfig,
    model: str,
    num_parameters: int,
    run_dir: Path | None,
    comparisons: list[Comparison],
    file_errors: Mapping[str, float],
) -> str:
    """Returns the card's Markdown.

    Args:
        run_dir: the run that trained the model, if known.
        comparisons: of all frameworks in float32.
        file_errors: export format -> largest error of its outputs over their rms.
    """
    name = ARCHITECTURES[model]
    facts = {
        "class": name,
        "parameters": f"{num_parameters:,}",
        "layers, hidden, heads, MLP": f"{config.num_hidden_layers}, {config.hidden_size}, "
        f"{config.num_attention_heads}, {config.intermediate_size}",
        "vocabulary": f"{config.vocab_size:,}",
        "longest row": f"{config.max_length} tokens, special tokens included",
    }
    pipeline = f"pipeline_tag: {_PIPELINES[model]}\n" if model in _PIPELINES else ""
    uses = "\n".join(f"- {_USAGE[form].format(name=name)}" for form in file_errors)
    files = _table({form: f"{error:.1e}" for form, error in file_errors.items()}, "file", "error")
    return f"""---
library_name: transformers
tags: [roberta-prelayernorm, jax, pytorch, tensorflow]
{pipeline}---
# RoBERTa-PreLayerNorm

RoBERTa with norm-and-add in place of add-and-norm, trained or converted with prelnroberta.

{_table(facts, "", "")}
## Use

{uses}

## Training data

{_training_data(run_dir)}
## Evaluation

{_evaluation(run_dir)}
## Parity

Each file was loaded after it was written and run on random ids. Its largest error against the Flax
model, over the rms of the outputs:

{files}
Flax, PyTorch and TensorFlow against the same function in float64
(`python -m experiments.parity` repeats this):

{_parity(comparisons)}"""


def _table(rows: Mapping[str, Any], left: str, right: str) -> str:
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"| {left} | {right} |\n|---|---|\n{lines}"


def _training_data(run_dir: Path | None) -> str:
    if run_dir is None or not (run_dir / "corpus.json").exists():
        return "Not recorded.\n"
    manifest = json.loads((run_dir / "corpus.json").read_text(encoding="utf-8"))
    train = manifest["train"]
    rows = {
        "documents": f"{train['files']['document_ends']['length']:,}",
        "tokens": f"{train['files']['tokens']['length']:,}",
        "sha256 of the text": train["text"]["sha256"],
        "sha256 of the tokenizer": train["tokenizer_sha256"],
    }
    corpus = json.dumps(train["corpus"], indent=2)
    return f"{_table(rows, 'training split', '')}\n```json\n{corpus}\n```\n"


def _evaluation(run_dir: Path | None) -> str:
    records = read_records(run_dir / "metrics.jsonl") if run_dir is not None else []
    last = next((r for r in reversed(records) if r["kind"] == "validation"), None)
    if last is None:
        return "Not recorded.\n"
    values = {name: value for name, value in last.items() if name not in ("kind", "seconds")}
    return _table({name: f"{value:.6g}" for name, value in values.items()}, "validation", "")


def _parity(comparisons: list[Comparison]) -> str:
    from bridges.verify.parity import ARRAY_KINDS, worst

    lines = ""
    for framework in dict.fromkeys(c.framework for c in comparisons):
        own = [c for c in comparisons if c.framework == framework]
        errors = [worst(own, kind) for kind in ARRAY_KINDS]
        cells = " | ".join("-" if e is None else f"{e.rms:.1e}, {e.max_abs:.1e}" for e in errors)
        lines += f"| {framework} | {cells} |\n"
    columns = len(ARRAY_KINDS)
    return f"| rms, largest | {' | '.join(ARRAY_KINDS)} |\n|---|{'---|' * columns}\n{lines}"

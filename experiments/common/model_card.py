"""The README.md of an exported model: what it is, was trained on, scored, and is proved to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.report import read_records
from prelnroberta.config import ARCHITECTURES

if TYPE_CHECKING:
    from bridges.verify.parity import Error
    from prelnroberta.config import RobertaPreLayerNormConfig

_PIPELINES = {
    "masked_lm": "fill-mask",
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
}
_USES = {
    "huggingface": "this folder: transformers' `{name}.from_pretrained`, or Flax{name}",
    "torch": "`torch/state_dict.safetensors`: `load_state_dict(safetensors.torch.load_file(...))`",
    "tensorflow": '`tensorflow/`: `tf.saved_model.load(...).signatures["serving_default"]`',
    "onnx": "`onnx/model.onnx`: `onnxruntime.InferenceSession(...)`",
    "stablehlo": "`stablehlo/`: `jax.export.deserialize(...).call`, on params.safetensors",
}


def model_card(
    config: RobertaPreLayerNormConfig,
    model: str,
    parameters: int,
    run_dir: Path | None,
    parity: list[Error],
    agreement: Mapping[str, float],
) -> str:
    """The text of the card.

    Args:
        run_dir: the run that trained it, if that is known.
        parity: float32 errors of the twins.
        agreement: format -> largest error of its file, over the rms of the outputs.
    """
    name = ARCHITECTURES[model]
    facts = {
        "class": name,
        "parameters": f"{parameters:,}",
        "layers, hidden, heads, MLP": f"{config.num_hidden_layers}, {config.hidden_size}, "
        f"{config.num_attention_heads}, {config.intermediate_size}",
        "vocabulary": f"{config.vocab_size:,}",
        "longest row": f"{config.max_length} tokens, specials included",
    }
    pipeline = f"pipeline_tag: {_PIPELINES[model]}\n" if model in _PIPELINES else ""
    uses = "\n".join(f"- {_USES[form].format(name=name)}" for form in agreement)
    files = _table({form: f"{error:.1e}" for form, error in agreement.items()}, "file", "error")
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

Each file was loaded back after it was written and run on random ids; its largest error against the
Flax model, over the rms of the outputs:

{files}
The PyTorch and TensorFlow twins, and Flax itself, against the same function in float64
(`python -m experiments.parity` repeats this):

{_parity(parity)}"""


def _table(rows: Mapping[str, Any], left: str, right: str) -> str:
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"| {left} | {right} |\n|---|---|\n{lines}"


def _training_data(run_dir: Path | None) -> str:
    if run_dir is None or not (run_dir / "corpus.json").exists():
        return "Not recorded beside the weights.\n"
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
        return "Not recorded beside the weights.\n"
    values = {name: value for name, value in last.items() if name not in ("kind", "seconds")}
    return _table({name: f"{value:.6g}" for name, value in values.items()}, "validation", "")


def _parity(errors: list[Error]) -> str:
    from bridges.verify.parity import KINDS, worst

    lines = ""
    for framework in dict.fromkeys(error.framework for error in errors):
        found = [worst((e for e in errors if e.framework == framework), kind) for kind in KINDS]
        cells = " | ".join("-" if e is None else f"{e.rms:.1e}, {e.largest:.1e}" for e in found)
        lines += f"| {framework} | {cells} |\n"
    return f"| rms, largest | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}\n{lines}"

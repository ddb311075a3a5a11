"""This project's Flax models and training step, as its programs run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmark.cases import Case, checked
from experiments.benchmark.work import Work
from experiments.common.loop import compiled
from prelnroberta.config import IGNORE_INDEX
from prelnroberta.data.batches.packed import PackedBatches
from prelnroberta.data.features.base import Features
from prelnroberta.distributed.sharding import Layout, Parallelism
from prelnroberta.inference.ragged import PackedBatch, pack_sequences
from prelnroberta.model import losses
from prelnroberta.model.heads import MODULES
from prelnroberta.model.losses import Scores
from prelnroberta.pretrained import flax_models as pretrained
from prelnroberta.pretrained.hf_checkpoint import load_pretrained
from prelnroberta.training.optimizer import OptimizerConfig, adamw
from prelnroberta.training.train_step import TrainState, compile_train_step, make_train_step

Batch = dict[str, np.ndarray]


def build(weights: Path, case: Case, batch: Batch, modes: list[str]) -> dict[str, Work]:
    """modes: padded, as peers do it; and where the case is ragged, packed."""
    make = {"train": _train, "forward": _forward, "generate": _generate}[case.work]
    return {mode: make(weights, case, batch, mode) for mode in modes}


def _train(weights: Path, case: Case, batch: Batch, mode: str) -> Work:
    params, config = load_pretrained(weights, case.model)[:2]
    module = MODULES[case.model](config)
    optimizer = adamw(OptimizerConfig(steps=10_000, learning_rate=1e-4), config, case.model)

    def score(params: dict, batch: dict, dropout_rngs: jax.Array | None) -> Scores:
        return _scores(case.model, module, params, batch, dropout_rngs)

    layout = Layout(Parallelism(), config, case.model)
    step = compile_train_step(make_train_step(score, optimizer, seed=0), layout)
    state = layout.init_sharded(lambda given: TrainState.create(given, optimizer), params)
    batches = [layout.shard_batch(part) for part in _batches(case, batch, mode)]
    programs: dict[int, Callable] = {}  # by rows, which packed language models' batches differ in

    def check() -> float:
        part = jax.device_put(_batches(case, checked(case, batch), mode)[0])
        scores = jax.jit(score)(state.params, part, None)
        return float(scores.mean)

    def run() -> None:
        nonlocal state
        for part in batches:
            rows = len(part["input_ids"])
            if rows not in programs:
                programs[rows], _ = compiled(step, state, part)
            state, _ = programs[rows](state, part)
        jax.block_until_ready(state)

    return Work(check, run)


def _scores(
    model: str, module: Any, params: dict, batch: dict, dropout_rngs: jax.Array | None
) -> Scores:
    if model == "masked_lm":
        return losses.masked_lm_scores(module, params, batch, dropout_rngs)
    names = ["input_ids", "attention_mask", "segment_ids", "position_ids"]
    if model in ("sequence_classification", "multiple_choice"):  # the others read every token
        names.append("read_positions")
    inputs = {name: batch[name] for name in names if name in batch}
    logits, _ = module.apply({"params": params}, **inputs, dropout_rngs=dropout_rngs)
    if model == "question_answering":
        spans = batch["start_positions"], batch["end_positions"]
        starts, ends = losses.span_scores(logits, *spans, segment_ids=batch.get("segment_ids"))
        return starts + ends
    score = losses.causal_lm_scores if model == "causal_lm" else losses.label_scores
    return score(logits, batch["labels"])


def _batches(case: Case, batch: Batch, mode: str) -> list[Batch]:
    """The case's examples as the mode trains on them."""
    n = len(batch["input_ids"])
    language = case.model in ("masked_lm", "causal_lm")
    if mode == "packed" and not language:
        steps = n // case.B
        packed = PackedBatches(_Examples(batch), case.B, seed=0, steps=steps)
        return [packed.batch(step) for step in range(steps)]
    parts = [
        {name: values[at : at + case.B] for name, values in batch.items()}
        for at in range(0, n, case.B)
    ]
    return [_language_model_rows(case, part, mode) for part in parts] if language else parts


@dataclasses.dataclass(frozen=True)
class _Examples(Features):
    """The case's padded examples for `PackedBatches`: arrays [n], [n, L] or [n, C, L]."""

    arrays: Batch

    @property
    def by_token(self) -> tuple[str, ...]:
        return tuple(name for name, values in self.arrays.items() if values.ndim > 1)

    @property
    def choices(self) -> int:
        return self._counts.shape[1]

    @property
    def lengths(self) -> np.ndarray:
        return self._counts.max(1)

    @property
    def sizes(self) -> np.ndarray:
        return self._counts.sum(1)

    @property
    def _counts(self) -> np.ndarray:
        """[n, C]: tokens of each choice; one, where there are none to choose from."""
        return self.arrays["attention_mask"].sum(-1).reshape(len(self.arrays["input_ids"]), -1)

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        return {
            name: values[indices, ..., :length] if name in self.by_token else values[indices]
            for name, values in self.arrays.items()
        }


def _language_model_rows(case: Case, batch: Batch, mode: str) -> Batch:
    packed, labels = _rows(case, batch, mode)
    if case.model == "causal_lm":
        # Nothing predicts the first token of a segment.
        first = np.diff(packed.inputs["segment_ids"], axis=1, prepend=0) != 0
        return {**packed.inputs, "labels": np.where(first, IGNORE_INDEX, labels)}
    masked = labels != IGNORE_INDEX
    M = int(masked.sum(1).max())
    positions = np.argsort(~masked, axis=1, kind="stable")[:, :M].astype(np.int32)
    counted = np.take_along_axis(masked, positions, axis=1)
    chosen = np.take_along_axis(labels, positions, axis=1)
    return {
        **packed.inputs,
        "masked_positions": positions,
        "masked_labels": np.where(counted, chosen, 0).astype(np.int32),
        "masked_weights": counted.astype(np.float32),
    }


def _rows(case: Case, batch: Batch, mode: str) -> tuple[PackedBatch, np.ndarray]:
    """The batch's sequences, several a row if packed, else one a row; and their labels."""
    lengths = batch["attention_mask"].sum(1)
    sequences = [row[:n] for row, n in zip(batch["input_ids"], lengths, strict=True)]
    rows = pack_sequences(sequences, case.L) if mode == "packed" else _one_a_row(batch, lengths)
    labels = [row[:n] for row, n in zip(batch["labels"], lengths, strict=True)]
    return rows, rows.pack_values(labels, IGNORE_INDEX, np.int32)


def _one_a_row(batch: Batch, lengths: np.ndarray) -> PackedBatch:
    mask = batch["attention_mask"]
    inputs = {
        "input_ids": batch["input_ids"],
        "segment_ids": mask,
        "position_ids": (np.cumsum(mask, 1) * mask + 1).astype(np.int32),
    }
    return PackedBatch(inputs, np.arange(len(mask)), np.zeros(len(mask), int), lengths)


def _forward(weights: Path, case: Case, batch: Batch, mode: str) -> Work:
    model = _pretrained(weights, case)
    lengths = batch["attention_mask"].sum(1)
    if mode == "packed":
        sequences = [row[:n] for row, n in zip(batch["input_ids"], lengths, strict=True)]
        rows = pack_sequences(sequences, case.L)
        inputs = rows.inputs
    else:
        rows, inputs = _one_a_row(batch, lengths), {k: batch[k] for k in batch}
    inputs = jax.device_put(inputs)
    params = model.execution.params_for_inference(model.params)

    @jax.jit
    def forward(params: dict, inputs: dict) -> jax.Array:
        logits, output = model.module.apply({"params": params}, **inputs)
        return output.last_hidden_state if case.model == "base" else logits

    def check() -> np.ndarray:
        return np.concatenate(rows.unpack(forward(params, inputs)))

    return Work(check, lambda: jax.block_until_ready(forward(params, inputs)))


def _generate(weights: Path, case: Case, batch: Batch, mode: str) -> Work:
    model = _pretrained(weights, case)

    def generate() -> np.ndarray:
        output = model.generate(batch["input_ids"], max_new_tokens=case.new_tokens)
        return np.asarray(output.sequences)

    return Work(generate, generate)


def _pretrained(weights: Path, case: Case) -> Any:
    return getattr(pretrained, "Flax" + case.architecture).from_pretrained(weights)

"""This project's Flax models and training step, as its programs run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmark.cases import Case, comparison_batch, split_batches
from experiments.benchmark.workload import Workload
from experiments.common.training_loop import compile_step
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


def make_workloads(
    weights: Path, case: Case, batch: Batch, variants: list[str]
) -> dict[str, Workload]:
    """A workload for each variant: padded, as the peers; packed, of ragged cases."""
    make = {"train": _train, "forward": _forward, "generate": _generate}[case.operation]
    return {variant: make(weights, case, batch, variant) for variant in variants}


def _train(weights: Path, case: Case, batch: Batch, variant: str) -> Workload:
    params, config = load_pretrained(weights, case.model)[:2]
    module = MODULES[case.model](config)
    optimizer = adamw(OptimizerConfig(steps=10_000, learning_rate=1e-4), config, case.model)

    def score(params: dict, batch: dict, dropout_rngs: jax.Array | None) -> Scores:
        return _scores(case.model, module, params, batch, dropout_rngs)

    layout = Layout(Parallelism(), config, case.model)
    step = compile_train_step(make_train_step(score, optimizer, seed=0), layout)
    state = layout.init_sharded(lambda params: TrainState.create(params, optimizer), params)
    batches = [layout.shard_batch(batch) for batch in _training_batches(case, batch, variant)]
    compiled: dict[int, Callable] = {}  # by rows: batches of packed language models differ in them

    def outputs() -> float:
        first = _training_batches(case, comparison_batch(case, batch), variant)[0]
        return float(jax.jit(score)(state.params, jax.device_put(first), None).mean)

    def run() -> None:
        nonlocal state
        for batch in batches:
            rows = len(batch["input_ids"])
            if rows not in compiled:
                compiled[rows], _ = compile_step(step, state, batch)
            state, _ = compiled[rows](state, batch)
        jax.block_until_ready(state)

    return Workload(outputs, run)


def _scores(
    model: str, module: Any, params: dict, batch: dict, dropout_rngs: jax.Array | None
) -> Scores:
    if model == "masked_lm":
        return losses.masked_lm_scores(module, params, batch, dropout_rngs)
    names = ["input_ids", "attention_mask", "segment_ids", "position_ids"]
    if model in ("sequence_classification", "multiple_choice"):  # the others need all positions
        names.append("read_positions")
    inputs = {name: batch[name] for name in names if name in batch}
    logits, _ = module.apply({"params": params}, **inputs, dropout_rngs=dropout_rngs)
    if model == "question_answering":
        spans = batch["start_positions"], batch["end_positions"]
        starts, ends = losses.span_scores(logits, *spans, segment_ids=batch.get("segment_ids"))
        return starts + ends
    score = losses.causal_lm_scores if model == "causal_lm" else losses.label_scores
    return score(logits, batch["labels"])


def _training_batches(case: Case, batch: Batch, variant: str) -> list[Batch]:
    """The batches of a variant: padded or packed."""
    is_language_model = case.model in ("masked_lm", "causal_lm")
    if variant == "packed" and not is_language_model:
        steps = len(batch["input_ids"]) // case.B
        packed = PackedBatches(_Examples(batch), case.B, seed=0, steps=steps)
        return [packed.batch(step) for step in range(steps)]
    batches = split_batches(case, batch)
    if is_language_model:
        return [_language_model_batch(case, batch, variant) for batch in batches]
    return batches


@dataclasses.dataclass(frozen=True)
class _Examples(Features):
    """The case's padded examples for `PackedBatches`: arrays [n], [n, L] or [n, A, L]."""

    arrays: Batch

    @property
    def per_token_arrays(self) -> tuple[str, ...]:
        return tuple(name for name, values in self.arrays.items() if values.ndim > 1)

    @property
    def num_choices(self) -> int:
        return self._choice_lengths.shape[1]

    @property
    def lengths(self) -> np.ndarray:
        return self._choice_lengths.max(1)

    @property
    def total_lengths(self) -> np.ndarray:
        return self._choice_lengths.sum(1)

    @property
    def _choice_lengths(self) -> np.ndarray:
        """[n, A]: tokens of each choice; A is 1 in tasks without choices."""
        return self.arrays["attention_mask"].sum(-1).reshape(len(self.arrays["input_ids"]), -1)

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        return {
            name: values[indices, ..., :length]
            if name in self.per_token_arrays
            else values[indices]
            for name, values in self.arrays.items()
        }


def _language_model_batch(case: Case, batch: Batch, variant: str) -> Batch:
    rows, labels = _rows_and_labels(case, batch, variant)
    if case.model == "causal_lm":
        # The first token of a segment is not predicted.
        first = np.diff(rows.inputs["segment_ids"], axis=1, prepend=0) != 0
        return {**rows.inputs, "labels": np.where(first, IGNORE_INDEX, labels)}
    masked = labels != IGNORE_INDEX
    M = int(masked.sum(1).max())
    positions = np.argsort(~masked, axis=1, kind="stable")[:, :M].astype(np.int32)
    is_masked = np.take_along_axis(masked, positions, axis=1)
    token_ids = np.take_along_axis(labels, positions, axis=1)
    return {
        **rows.inputs,
        "masked_positions": positions,
        "masked_labels": np.where(is_masked, token_ids, 0).astype(np.int32),
        "masked_weights": is_masked.astype(np.float32),
    }


def _rows_and_labels(case: Case, batch: Batch, variant: str) -> tuple[PackedBatch, np.ndarray]:
    """Sequences and labels of a batch: several in a row if packed, else one in a row."""
    lengths = batch["attention_mask"].sum(1)
    sequences = [row[:n] for row, n in zip(batch["input_ids"], lengths, strict=True)]
    rows = (
        pack_sequences(sequences, case.L) if variant == "packed" else _one_per_row(batch, lengths)
    )
    labels = [row[:n] for row, n in zip(batch["labels"], lengths, strict=True)]
    return rows, rows.pack_values(labels, IGNORE_INDEX, np.int32)


def _one_per_row(batch: Batch, lengths: np.ndarray) -> PackedBatch:
    mask = batch["attention_mask"]
    inputs = {
        "input_ids": batch["input_ids"],
        "segment_ids": mask,
        "position_ids": (np.cumsum(mask, 1) * mask + 1).astype(np.int32),
    }
    return PackedBatch(inputs, np.arange(len(mask)), np.zeros(len(mask), int), lengths)


def _forward(weights: Path, case: Case, batch: Batch, variant: str) -> Workload:
    model = _pretrained(weights, case)
    lengths = batch["attention_mask"].sum(1)
    if variant == "packed":
        sequences = [row[:n] for row, n in zip(batch["input_ids"], lengths, strict=True)]
        rows = pack_sequences(sequences, case.L)
        inputs = rows.inputs
    else:
        rows, inputs = _one_per_row(batch, lengths), dict(batch)
    inputs = jax.device_put(inputs)
    params = model.execution.params_for_inference(model.params)

    @jax.jit
    def forward(params: dict, inputs: dict) -> jax.Array:
        logits, output = model.module.apply({"params": params}, **inputs)
        return output.last_hidden_state if case.model == "base" else logits

    def outputs() -> np.ndarray:
        return np.concatenate(rows.unpack(forward(params, inputs)))

    return Workload(outputs, lambda: jax.block_until_ready(forward(params, inputs)))


def _generate(weights: Path, case: Case, batch: Batch, variant: str) -> Workload:
    model = _pretrained(weights, case)

    def generate() -> np.ndarray:
        output = model.generate(batch["input_ids"], max_new_tokens=case.new_tokens)
        return np.asarray(output.sequences)

    return Workload(generate, generate)


def _pretrained(weights: Path, case: Case) -> Any:
    return getattr(pretrained, "Flax" + case.architecture).from_pretrained(weights)

"""The cases of the benchmark; all contenders get the same arrays."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from prelnroberta.config import ARCHITECTURES, IGNORE_INDEX, RobertaPreLayerNormConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """A computation that is timed.

    Attributes:
        operation: train (forward, backward and AdamW, dropout 0.1), forward, or generate.
        model: name in the parameter table.
        preset: name of the architecture.
        B, L: sequences in a batch, and the length to which they are padded.
        ragged: sequences have the lengths of real documents, truncated to L, not all L.
        mask_rate: of masked language models.
        steps: batches that one run trains on.
        new_tokens: tokens to generate after prompts of length L.
    """

    operation: str
    model: str
    preset: str
    B: int
    L: int
    ragged: bool = False
    mask_rate: float = 0.15
    steps: int = 1
    new_tokens: int = 0

    @property
    def name(self) -> str:
        kind = {
            ("train", "masked_lm"): "pretrain",
            ("forward", "base"): "encoder",
            ("forward", "masked_lm"): "logits",
            ("generate", "causal_lm"): "generate",
        }.get((self.operation, self.model), f"finetune-{self.model}")
        rate = f"-{self.mask_rate:.0%}" if kind == "pretrain" else ""
        ragged = "-ragged" if self.ragged else ""
        return f"{kind}-{self.preset.removeprefix('roberta-')}-{self.B}x{self.L}{ragged}{rate}"

    @property
    def config(self) -> RobertaPreLayerNormConfig:
        changes: dict[str, Any] = {"is_decoder": self.model == "causal_lm"}
        if self.model in ("token_classification", "sequence_classification"):
            changes["num_labels"] = 5
        if self.operation == "generate":
            changes |= {"eos_token_id": None, "pad_token_id": 1}
        return RobertaPreLayerNormConfig.preset(self.preset, **changes)

    @property
    def architecture(self) -> str:
        """Name of the class in transformers, without the framework's prefix."""
        return ARCHITECTURES[self.model]

    def flops(self, lengths: np.ndarray, num_masked: np.ndarray | None = None) -> float:
        """FLOPs for the real tokens, without padding.

        Args:
            lengths: [n], tokens of each sequence.
            num_masked: [n], positions whose logits are computed; None: all.
        """
        is_language_model = self.model.endswith("_lm")
        passes = 3 if self.operation == "train" else 1
        masked = [None] * len(lengths) if num_masked is None else map(int, num_masked)
        return passes * sum(
            self.config.forward_flops(int(n), m, is_language_model)
            for n, m in zip(lengths, masked, strict=True)
        )


def all_cases() -> list[Case]:
    """All cases, in the order of the report: pretraining, forward, fine-tuning, generation."""

    def pretrain(preset: str, B: int, L: int, rate: float = 0.15, ragged: bool = False) -> Case:
        return Case("train", "masked_lm", preset, B, L, ragged, rate)

    def forward(preset: str, model: str, B: int, L: int, ragged: bool = False) -> Case:
        return Case("forward", model, preset, B, L, ragged)

    base, small = "roberta-base", "small"
    return [
        pretrain(base, 8, 128),
        pretrain(base, 8, 128, 0.4),
        pretrain(base, 2, 512),
        pretrain(base, 8, 128, ragged=True),
        pretrain(small, 32, 128),
        pretrain(small, 32, 128, 0.4),
        pretrain(small, 8, 512),
        pretrain(small, 32, 128, ragged=True),
        *(forward(base, model, B, 128) for model in ("base", "masked_lm") for B in (1, 8)),
        *(forward(small, model, B, 128) for model in ("base", "masked_lm") for B in (1, 8, 32)),
        forward(base, "base", 4, 512),
        forward(base, "base", 16, 128, ragged=True),
        forward(small, "base", 32, 128, ragged=True),
        *(Case("train", model, small, 16, 128, ragged=True, steps=4) for model in _FINETUNED),
        Case("train", "multiple_choice", small, 4, 128, ragged=True, steps=4),
        Case("generate", "causal_lm", small, 8, 16, new_tokens=48),
    ]


_FINETUNED = ["sequence_classification", "token_classification", "question_answering", "causal_lm"]


def tokenized_documents(count: int, cache: Path) -> list[list[int]]:
    """Token ids of documents of any length, `<s> ... </s>`: docstrings of the installed packages.

    The tokenizer has 8,192 tokens, no more than the vocabulary of any preset.
    """
    from prelnroberta.data.pretraining.docstrings import DocstringCorpus
    from prelnroberta.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

    texts = [document.text for document in DocstringCorpus().documents()]
    if not (cache / "tokenizer").exists():
        save_tokenizer(train_tokenizer(texts, 8192), cache / "tokenizer", 512)
    tokenizer = load_tokenizer(cache / "tokenizer")
    order = np.random.default_rng(0).permutation(len(texts))[:count]
    return [encoding.ids for encoding in tokenizer.encode_batch([texts[i] for i in order])]


def write_case(case: Case, folder: Path, documents: list[list[int]]) -> None:
    """Writes `case.json`, and `batch.npz` with the inputs of transformers' models: rows padded on
    the right to L, and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_text(json.dumps(dataclasses.asdict(case)))
    np.savez(folder / "batch.npz", **_make_batch(case, documents))


def read_case(folder: Path) -> tuple[Case, dict[str, np.ndarray]]:
    """Reads the files of `write_case`."""
    with np.load(folder / "batch.npz") as batch:
        return Case(**json.loads((folder / "case.json").read_text())), dict(batch)


def split_batches(case: Case, batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The batches of B examples that one run trains on."""
    return [
        {name: rows[start : start + case.B] for name, rows in batch.items()}
        for start in range(0, len(batch["input_ids"]), case.B)
    ]


def comparison_batch(case: Case, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first B examples, on whose loss all contenders must agree.

    In question answering they and their answers are truncated to the shortest example: padding
    competes in transformers' loss, and packed rows have none.
    """
    first = {name: rows[: case.B] for name, rows in batch.items()}
    if case.model != "question_answering":
        return first
    shortest = int(first["attention_mask"].sum(1).min())
    return {
        name: rows[:, :shortest] if rows.ndim > 1 else np.minimum(rows, shortest - 1)
        for name, rows in first.items()
    }


def write_weights(case: Case, folder: Path) -> None:
    """Writes the config.json and the initial weights of all contenders. Trained weights would give
    the same times."""
    import jax

    from prelnroberta import params as parameters
    from prelnroberta.pretrained.hf_checkpoint import save_pretrained

    tree = parameters.init(case.config, jax.random.key(0), case.model)
    save_pretrained(folder, tree, case.config, case.model)


def _make_batch(case: Case, documents: list[list[int]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    choices = 4 if case.model == "multiple_choice" else 1
    n, L = case.steps * case.B * choices, case.L
    rows = np.full((n, L), case.config.pad_token_id, np.int32)
    if case.ragged:
        for row, ids in zip(rows, documents[:n], strict=True):
            ids = ids if len(ids) <= L else ids[: L - 1] + ids[-1:]
            row[: len(ids)] = ids
    else:
        stream = np.array([token for ids in documents for token in ids], np.int32)
        rows[:] = np.resize(stream, (n, L))
    mask = (rows != case.config.pad_token_id).astype(np.int32)
    batch = {"input_ids": rows, "attention_mask": mask}
    if case.operation == "train":
        batch |= _make_labels(case, rows, mask, rng)
    if choices > 1:
        for name in ("input_ids", "attention_mask"):
            batch[name] = batch[name].reshape(-1, choices, L)
    return batch


def _make_labels(
    case: Case, rows: np.ndarray, mask: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    lengths = mask.sum(1)
    if case.model == "masked_lm":
        labels = np.full(rows.shape, IGNORE_INDEX, np.int32)
        for row, length, out in zip(rows, lengths, labels, strict=True):
            positions = rng.choice(length, max(1, round(case.mask_rate * length)), replace=False)
            out[positions] = row[positions]
            row[positions] = case.config.vocab_size - 1
        return {"labels": labels}
    if case.model == "causal_lm":
        return {"labels": np.where(mask == 1, rows, IGNORE_INDEX).astype(np.int32)}
    if case.model == "token_classification":
        labels = rng.integers(0, case.config.num_labels, rows.shape)
        return {"labels": np.where(mask == 1, labels, IGNORE_INDEX).astype(np.int32)}
    if case.model == "question_answering":
        starts = rng.integers(0, lengths).astype(np.int32)
        return {"start_positions": starts, "end_positions": np.minimum(starts + 2, lengths - 1)}
    classes = 4 if case.model == "multiple_choice" else case.config.num_labels
    return {"labels": rng.integers(0, classes, case.steps * case.B).astype(np.int32)}

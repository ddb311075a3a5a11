"""What is measured: each case one piece of work, with the very arrays that all contenders get."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from prelnroberta.config import IGNORE_INDEX, RobertaPreLayerNormConfig

# What fine-tuning learns -> the model that stands for it.
TASKS = {
    "sequence_classification": "ForSequenceClassification",
    "multiple_choice": "ForMultipleChoice",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "masked_lm": "ForMaskedLM",
    "causal_lm": "ForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        work: train (forward, backward and AdamW, dropout 0.1), forward, or generate.
        model: of the parameter table.
        preset: the architecture.
        B, L: sequences, and the length that padding brings them to.
        ragged: lengths of real documents, cut at L, instead of full rows.
        mask_rate: of masked language models.
        steps: batches of B sequences that one measurement trains on.
        new_tokens: of generation, after prompts of L.
    """

    work: str
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
        what = {
            ("train", "masked_lm"): "pretrain",
            ("forward", "base"): "encoder",
            ("forward", "masked_lm"): "logits",
            ("generate", "causal_lm"): "generate",
        }.get((self.work, self.model), f"finetune-{self.model}")
        rate = f"-{self.mask_rate:.0%}" if what == "pretrain" else ""
        ragged = "-ragged" if self.ragged else ""
        return f"{what}-{self.preset.removeprefix('roberta-')}-{self.B}x{self.L}{ragged}{rate}"

    @property
    def config(self) -> RobertaPreLayerNormConfig:
        changes: dict[str, Any] = {"is_decoder": self.model == "causal_lm"}
        if self.model in ("token_classification", "sequence_classification"):
            changes["num_labels"] = 5
        if self.work == "generate":
            changes |= {"eos_token_id": None, "pad_token_id": 1}
        return RobertaPreLayerNormConfig.preset(self.preset, **changes)

    @property
    def architecture(self) -> str:
        """transformers' name, without the framework's prefix."""
        return "RobertaPreLayerNorm" + {"base": "Model", **TASKS}[self.model]

    def flops(self, lengths: np.ndarray, read: np.ndarray | int | None = None) -> float:
        """FLOPs that the real tokens need: products over pads are nobody's work."""
        vocab = self.model.endswith("_lm")
        times = 3 if self.work == "train" else 1
        reads = np.broadcast_to(-1 if read is None else read, lengths.shape)
        return times * sum(
            self.config.forward_flops(int(n), None if m < 0 else int(m), vocab)
            for n, m in zip(lengths, reads, strict=True)
        )


def all_cases() -> list[Case]:
    """In the order of the report: pretraining, forward, fine-tuning, generation."""

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
        *(Case("train", model, small, 16, 128, ragged=True, steps=4) for model in _TUNED),
        Case("train", "multiple_choice", small, 4, 128, ragged=True, steps=4),
        Case("generate", "causal_lm", small, 8, 16, new_tokens=48),
    ]


_TUNED = ["sequence_classification", "token_classification", "question_answering", "causal_lm"]


def documents(count: int, cache: Path) -> list[list[int]]:
    """Token ids of real documents, `<s> .. </s>`, any length: the installed packages' docstrings.

    Tokenized with 8,192 pieces, which every preset has.
    """
    from prelnroberta.data.pretraining.docstrings import DocstringCorpus
    from prelnroberta.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

    texts = [document.text for document in DocstringCorpus().documents()]
    if not (cache / "tokenizer").exists():
        save_tokenizer(train_tokenizer(texts, 8192), cache / "tokenizer", 512)
    tokenizer = load_tokenizer(cache / "tokenizer")
    chosen = np.random.default_rng(0).permutation(len(texts))[:count]
    return [encoding.ids for encoding in tokenizer.encode_batch([texts[i] for i in chosen])]


def write(case: Case, folder: Path, texts: list[list[int]]) -> None:
    """Makes the case's folder: case.json, and batch.npz with what transformers' models take:
    rows padded on the right to L, and targets."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_text(json.dumps(dataclasses.asdict(case)))
    np.savez(folder / "batch.npz", **_batch(case, texts))


def read(folder: Path) -> tuple[Case, dict[str, np.ndarray]]:
    """What `write` wrote."""
    with np.load(folder / "batch.npz") as batch:
        return Case(**json.loads((folder / "case.json").read_text())), dict(batch)


def checked(case: Case, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The B examples whose loss all contenders must agree on.

    Of question answering they are cut to the shortest, answers too: transformers' loss takes pads
    for possible answers, ours of packed rows does not.
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
    """config.json and weights that every contender starts from: initial values, for none of this
    depends on what a model has learnt."""
    import jax

    from prelnroberta import params as parameters
    from prelnroberta.pretrained.hf_checkpoint import save_pretrained

    tree = parameters.init(case.config, jax.random.key(0), case.model)
    save_pretrained(folder, tree, case.config, case.model)


def _batch(case: Case, texts: list[list[int]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    choices = 4 if case.model == "multiple_choice" else 1
    n, L = case.steps * case.B * choices, case.L
    rows = np.full((n, L), case.config.pad_token_id, np.int32)
    if case.ragged:
        for row, text in zip(rows, texts[:n], strict=True):
            kept = text if len(text) <= L else text[: L - 1] + text[-1:]
            row[: len(kept)] = kept
    else:
        stream = np.array([token for text in texts for token in text], np.int32)
        rows[:] = np.resize(stream, (n, L))
    mask = (rows != case.config.pad_token_id).astype(np.int32)
    batch = {"input_ids": rows, "attention_mask": mask}
    if case.work == "train":
        batch |= _targets(case, rows, mask, rng)
    if choices > 1:
        for name in ("input_ids", "attention_mask"):
            batch[name] = batch[name].reshape(-1, choices, L)
    return batch


def _targets(
    case: Case, rows: np.ndarray, mask: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    lengths = mask.sum(1)
    if case.model == "masked_lm":
        labels = np.full(rows.shape, IGNORE_INDEX, np.int32)
        for row, length, out in zip(rows, lengths, labels, strict=True):
            at = rng.choice(length, max(1, round(case.mask_rate * length)), replace=False)
            out[at] = row[at]
            row[at] = case.config.vocab_size - 1
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

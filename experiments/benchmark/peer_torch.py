"""transformers 5's torch classes, with SDPA or eager attention; and this project's twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benchmark.cases import Case, checked
from experiments.benchmark.work import Work

Batch = dict[str, np.ndarray]


def build(weights: Path, case: Case, batch: Batch, modes: list[str]) -> dict[str, Work]:
    """modes: sdpa, eager; and those of our twin: twin, and skip_padding on ragged rows."""
    import transformers

    import bridges.pytorch

    torch.set_num_threads(2)
    make = {"train": _train, "forward": _forward, "generate": _generate}[case.work]
    works = {}
    for package, its in ((bridges.pytorch, ("skip_padding", "twin")), (transformers, _THEIRS)):
        model = getattr(package, case.architecture).from_pretrained(weights)
        if case.work == "generate" and package is transformers:
            # Its generate counts positions from 0, this family's from pad_token_id + 1: the table
            # is shifted, so that both compute the same.
            table = model.get_submodule("roberta_prelayernorm.embeddings.position_embeddings")
            table.weight.data = table.weight.data.roll(-case.config.pad_token_id - 1, 0)
        works |= {mode: make(model, case, batch, mode) for mode in its if mode in modes}
    return {mode: works[mode] for mode in modes}


_THEIRS = ("sdpa", "eager")


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(rows).long() for name, rows in batch.items()}


def _options(model: Any, mode: str) -> dict[str, Any]:
    if mode in _THEIRS:
        model.set_attn_implementation(mode)
    return {"skip_padding": True} if mode == "skip_padding" else {}


def _forward(model: Any, case: Case, batch: Batch, mode: str) -> Work:
    model.eval()
    tensors = _tensors(batch)
    real = tensors["attention_mask"] == 1

    def forward() -> torch.Tensor:
        options = _options(model, mode)
        with torch.no_grad():
            return model(**tensors, **options)[0]

    def run() -> None:
        forward()

    return Work(lambda: forward()[real].numpy(), run)


def _generate(model: Any, case: Case, batch: Batch, mode: str) -> Work:
    model.eval()
    tensors = _tensors(batch)

    def generate() -> np.ndarray:
        _options(model, mode)
        with torch.no_grad():
            output = model.generate(
                tensors["input_ids"],
                attention_mask=tensors["attention_mask"],
                max_new_tokens=case.new_tokens,
                do_sample=False,
            )
        return np.asarray(getattr(output, "sequences", output))

    return Work(generate, generate)


def _train(model: Any, case: Case, batch: Batch, mode: str) -> Work:
    named = dict(model.named_parameters())
    decays = [p for n, p in named.items() if "norm" not in n.lower() and not n.endswith("bias")]
    others = [p for n, p in named.items() if "norm" in n.lower() or n.endswith("bias")]
    groups = [{"params": decays, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
    parts = [
        _tensors({name: rows[at : at + case.B] for name, rows in batch.items()})
        for at in range(0, len(batch["input_ids"]), case.B)
    ]
    first = _tensors(checked(case, batch))

    def check() -> float:
        model.eval()
        options = _options(model, mode)
        with torch.no_grad():
            return float(model(**first, **options).loss)

    def run() -> None:
        model.train()
        options = _options(model, mode)
        for part in parts:
            optimizer.zero_grad(set_to_none=True)
            model(**part, **options).loss.backward()
            optimizer.step()

    return Work(check, run)

"""The PyTorch classes of transformers 5 with SDPA or eager attention, and of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benchmark.cases import Case, comparison_batch, split_batches
from experiments.benchmark.workload import Workload

Batch = dict[str, np.ndarray]


def make_workloads(
    weights: Path, case: Case, batch: Batch, variants: list[str]
) -> dict[str, Workload]:
    """A workload for each variant: sdpa, eager; twin (this project's), and skip_padding."""
    import transformers

    import bridges.pytorch

    torch.set_num_threads(2)
    make = {"train": _train, "forward": _forward, "generate": _generate}[case.operation]
    workloads = {}
    for package, package_variants in (
        (bridges.pytorch, ("skip_padding", "twin")),
        (transformers, _ATTENTION_IMPLEMENTATIONS),
    ):
        model = getattr(package, case.architecture).from_pretrained(weights)
        if case.operation == "generate" and package is transformers:
            # transformers' generate counts positions from 0, ours from pad_token_id + 1. A shifted
            # table makes them compute the same.
            table = model.get_submodule("roberta_prelayernorm.embeddings.position_embeddings")
            table.weight.data = table.weight.data.roll(-case.config.pad_token_id - 1, 0)
        workloads |= {
            variant: make(model, case, batch, variant)
            for variant in package_variants
            if variant in variants
        }
    return {variant: workloads[variant] for variant in variants}


_ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(rows).long() for name, rows in batch.items()}


def _options(model: Any, variant: str) -> dict[str, Any]:
    if variant in _ATTENTION_IMPLEMENTATIONS:
        model.set_attn_implementation(variant)
    return {"skip_padding": True} if variant == "skip_padding" else {}


def _forward(model: Any, case: Case, batch: Batch, variant: str) -> Workload:
    model.eval()
    tensors = _tensors(batch)
    real = tensors["attention_mask"] == 1

    def forward() -> torch.Tensor:
        options = _options(model, variant)
        with torch.no_grad():
            return model(**tensors, **options)[0]

    def run() -> None:
        forward()

    return Workload(lambda: forward()[real].numpy(), run)


def _generate(model: Any, case: Case, batch: Batch, variant: str) -> Workload:
    model.eval()
    tensors = _tensors(batch)

    def generate() -> np.ndarray:
        _options(model, variant)
        with torch.no_grad():
            output = model.generate(
                tensors["input_ids"],
                attention_mask=tensors["attention_mask"],
                max_new_tokens=case.new_tokens,
                do_sample=False,
            )
        return np.asarray(getattr(output, "sequences", output))

    return Workload(generate, generate)


def _train(model: Any, case: Case, batch: Batch, variant: str) -> Workload:
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if "norm" not in n.lower() and not n.endswith("bias")]
    others = [p for n, p in named.items() if "norm" in n.lower() or n.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
    batches = [_tensors(batch) for batch in split_batches(case, batch)]
    first = _tensors(comparison_batch(case, batch))

    def outputs() -> float:
        model.eval()
        options = _options(model, variant)
        with torch.no_grad():
            return float(model(**first, **options).loss)

    def run() -> None:
        model.train()
        options = _options(model, variant)
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            model(**batch, **options).loss.backward()
            optimizer.step()

    return Workload(outputs, run)

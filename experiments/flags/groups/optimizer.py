"""Optimizer, schedule, and what stays frozen."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from experiments.flags.checks import check_positive
from experiments.flags.field import flag
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    from prelnroberta.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    steps: int | None = flag(10_000, "Number of optimizer steps.")
    optimizer: str = flag(
        "adamw",
        "lamb is for batches of tens of thousands of rows.",
        choices=["adamw", "lamb"],
    )
    learning_rate: float = flag(1e-3, "Peak learning rate.")
    warmup_steps: int | None = flag(500, "Steps of linear warm-up.")
    schedule: str = flag(
        "linear",
        "How the learning rate decays after warm-up.",
        choices=["linear", "cosine", "polynomial", "constant"],
    )
    end_learning_rate: float = flag(0.0, "Learning rate of the last step.")
    polynomial_power: float = flag(1.0, "Power of the polynomial schedule.")
    adam_beta1: float = flag(0.9, "Decay rate of the first moment.")
    adam_beta2: float = flag(0.98, "Decay rate of the second moment.")
    adam_epsilon: float = flag(1e-6, "Epsilon of Adam, added to the root of the second moment.")
    weight_decay: float = flag(0.01, "Decoupled weight decay.")
    decay_biases: bool = flag(False, "Apply weight decay to biases (fairseq does).")
    decay_norms: bool = flag(False, "Apply weight decay to LayerNorm parameters (fairseq does).")
    clip_norm: float = flag(0.0, "Maximum global gradient norm; 0 does not clip.")
    gradient_accumulation_steps: int = flag(
        1, "Microbatches into which each batch is split; their gradients are summed."
    )
    layer_decay: float = flag(
        1.0, "Learning rate of each layer as a multiple of the rate of the layer above it."
    )
    freeze_layers: int = flag(0, "Freeze the embeddings and this many first layers; 0: none.")
    freeze: tuple[str, ...] = flag(
        (),
        "Freeze parameters whose path matches, for example 'embeddings/*'; repeat the flag for "
        "several patterns.",
        repeated=True,
    )

    def optimizer_config(self, **counted: int) -> OptimizerConfig:
        """The optimizer's config; each field has the name of its flag.

        Args:
            counted: steps and warm-up where they follow from the data.
        """
        from prelnroberta.training.optimizer import OptimizerConfig

        names = {field.name for field in dataclasses.fields(OptimizerConfig)} - counted.keys()
        return OptimizerConfig(**{name: getattr(self, name) for name in names}, **counted)

    def check_microbatches(self, batch_size: int) -> None:
        """Raises InputError for a --batch_size that cannot be split."""
        parts = self.gradient_accumulation_steps
        check_positive(self, "batch_size", "gradient_accumulation_steps")
        if batch_size % parts:
            raise InputError(
                f"--gradient_accumulation_steps={parts} does not divide --batch_size={batch_size}"
            )

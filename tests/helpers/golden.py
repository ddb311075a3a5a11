"""Outputs, losses and gradients of every Flax class, kept in tests/golden to detect any change.

A gradient is kept as two numbers: its norm and its product with a fixed vector of that length.
"""

from pathlib import Path

import numpy as np

from tests.helpers.model_cases import MODEL_CASES, flax_loss_and_gradients

GOLDEN = Path(__file__).parents[1] / "golden"
OUTPUTS = ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits")


def golden_values(kind: str) -> dict[str, np.ndarray]:
    """Values of one of MODEL_CASES: outputs, loss, and gradient checksums [2] by tensor name."""
    loss, output, gradients, _ = flax_loss_and_gradients(kind, *MODEL_CASES[kind])
    values = {name: np.asarray(output[name]) for name in OUTPUTS if name in output}
    values["loss"] = np.float32(loss)
    return values | {f"gradient of {name}": checksum(g) for name, g in sorted(gradients.items())}


def checksum(gradient: np.ndarray) -> np.ndarray:
    flat = np.float64(gradient).reshape(-1)
    return np.array([np.sqrt(flat @ flat), flat @ np.cos(np.arange(flat.size) + 1.0)])

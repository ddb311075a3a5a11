"""Cross entropy with every option, against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from prelnroberta.config import IGNORE_INDEX
from prelnroberta.model import losses
from prelnroberta.model.losses import LossSettings

pytestmark = pytest.mark.torch

WEIGHTS = (0.3, 1.7, 2.0, 0.9, 1.1)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_matches_torch(weights, smoothing):
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((4, 7, 5)).astype(np.float32)
    labels = rng.integers(0, 5, (4, 7))
    labels[rng.random((4, 7)) < 0.3] = IGNORE_INDEX
    settings = LossSettings(class_weights=weights, label_smoothing=smoothing)

    def ours(logits):
        return losses.label_scores(logits, jnp.asarray(labels), settings).mean

    inputs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(
        inputs.reshape(-1, 5),
        torch.tensor(labels).reshape(-1),
        weight=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        label_smoothing=smoothing,
    )
    theirs.backward()
    loss, gradient = jax.value_and_grad(ours)(logits)
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, inputs.grad.numpy(), atol=1e-7)

"""Activations against torch in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from prelnroberta.model.layers import ACTIVATIONS

pytestmark = pytest.mark.torch


def test_gelu_error_is_within_error_of_torch():
    x = np.linspace(-8, 8, 100_001).astype(np.float32)
    expected = torch.nn.functional.gelu(torch.tensor(x, dtype=torch.float64)).numpy()
    theirs = torch.nn.functional.gelu(torch.tensor(x)).numpy()

    def error(found):
        return np.sqrt(np.mean((np.asarray(found, np.float64) - expected) ** 2))

    assert error(ACTIVATIONS["gelu"](jnp.asarray(x))) < 1.5 * error(theirs)

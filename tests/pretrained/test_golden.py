"""Every Flax class computes what it computed when tests/golden was written, without an oracle."""

import numpy as np
import pytest

from tests.helpers.golden import GOLDEN, golden_values
from tests.helpers.model_cases import MODEL_CASES
from tests.helpers.tolerances import assert_close


@pytest.mark.parametrize("kind", MODEL_CASES)
def test_outputs_loss_and_gradients_match_golden_files(kind):
    """Both sides are float32: the bounds are those of the comparison with transformers 4's Flax."""
    found, expected = golden_values(kind), dict(np.load(GOLDEN / f"{kind}.npz"))
    assert list(found) == list(expected)
    largest_norm = max(v[0] for name, v in expected.items() if name.startswith("gradient of "))
    for name, value in expected.items():
        if name == "loss":
            assert abs(found[name] - value) < 3e-6 * max(1, abs(value))
        elif not name.startswith("gradient of "):
            assert_close(found[name], value, name, 6e-6, 6e-5)
        elif value[0] <= 1e-6 * largest_norm:  # zero in truth, as of a bias that softmax ignores
            assert found[name][0] < 2e-6 * largest_norm, name
        else:
            assert np.abs(found[name] - value).max() < 1e-5 * value[0], name


def test_every_case_has_a_golden_file():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(MODEL_CASES)

"""Writes the golden files. Run it only after a change that is meant to change numbers.

python -m tests.golden.regenerate
"""

import numpy as np

from tests.helpers.golden import GOLDEN, golden_values
from tests.helpers.model_cases import MODEL_CASES

if __name__ == "__main__":
    for kind in MODEL_CASES:
        np.savez_compressed(GOLDEN / f"{kind}.npz", **golden_values(kind))

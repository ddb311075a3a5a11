"""Random labels and predictions."""

import numpy as np


def random_labels_and_predictions(rng, n, classes):
    """Labels and predictions that agree more or less, and may leave classes out."""
    labels = rng.integers(0, rng.integers(1, classes + 1), n)
    guesses = rng.integers(0, rng.integers(1, classes + 1), n)
    return labels, np.where(rng.random(n) < rng.random(), labels, guesses)

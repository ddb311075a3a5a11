"""The unigram baseline of masked language models: token frequencies alone.

A model that has learned only token frequencies reaches exactly this loss. Masked language models
that are trained from scratch are known to stay there for a while.
"""

from __future__ import annotations

import numpy as np

from prelnroberta.model.losses import Scores


class UnigramBaseline:
    """Predicts every masked token by its frequency in the training text.

    Args:
        counts: [V] int, how often each id occurs in the training text.
        special_ids: ids that are never masked and have probability 0.

    Attributes:
        log_probabilities: [V] float64.
    """

    def __init__(self, counts: np.ndarray, special_ids: tuple[int, ...]):
        smoothed = counts.astype(np.float64) + 1.0
        smoothed[list(special_ids)] = 0.0
        with np.errstate(divide="ignore"):
            self.log_probabilities = np.log(smoothed / smoothed.sum())
        self._most_frequent_id = int(smoothed.argmax())

    def scores(self, labels: np.ndarray, weights: np.ndarray) -> Scores:
        """Loss in nats, correct predictions and weight, summed over labels [...] int with weights
        [...] > 0."""
        counted = labels[weights > 0]
        return Scores(
            loss=-self.log_probabilities[counted].sum(),
            correct=(counted == self._most_frequent_id).sum(),
            weight=counted.size,  # type: ignore[arg-type]  # Scores of numpy
        )

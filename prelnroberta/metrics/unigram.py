"""What a masked language model is measured against: word frequencies alone.

A model that has learned nothing but how often each token occurs sits exactly on this line, which
is where masked language models trained from scratch are known to linger.
"""

from __future__ import annotations

import numpy as np

from prelnroberta.model.losses import Scores


class UnigramBaseline:
    """Predicts every masked token by its frequency in the training text.

    Args:
        counts: [V] int, how often each id occurs in the training text.
        specials: ids that are never asked for and so get no share.
    """

    def __init__(self, counts: np.ndarray, specials: tuple[int, ...]):
        smoothed = counts.astype(np.float64) + 1.0
        smoothed[list(specials)] = 0.0
        with np.errstate(divide="ignore"):
            self.log_probabilities = np.log(smoothed / smoothed.sum())
        self.most_frequent = int(smoothed.argmax())

    def scores(self, labels: np.ndarray, weights: np.ndarray) -> Scores:
        """Summed loss (nats), right guesses and weight of labels [...] int, weights [...]."""
        counted = labels[weights > 0]
        return Scores(
            loss=-self.log_probabilities[counted].sum(),
            correct=(counted == self.most_frequent).sum(),
            weight=counted.size,
        )

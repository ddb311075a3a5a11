"""Confusion matrices, regression metrics, perplexity and bootstrap intervals."""

import math
import warnings

import numpy as np
import pytest
import scipy.stats

from prelnroberta.metrics.classification import (
    bootstrap_intervals,
    confusion_matrix,
    perplexity,
    regression_metrics,
)
from tests.helpers.random_labels import random_labels_and_predictions


def test_confusion_matrices_add_up_over_batches():
    rng = np.random.default_rng(1)
    labels, predictions = random_labels_and_predictions(rng, 100, 5)
    parts = sum(confusion_matrix(labels[i::7], predictions[i::7], 5) for i in range(7))
    np.testing.assert_array_equal(parts, confusion_matrix(labels, predictions, 5))


def test_correlations_match_scipy():
    rng = np.random.default_rng(3)
    for _ in range(1000):
        n = int(rng.integers(2, 40))
        scale = 10.0 ** rng.integers(-6, 6)
        labels = np.round(rng.standard_normal(n), int(rng.integers(0, 4))) * scale + rng.normal()
        predictions = np.round(labels * rng.normal() + rng.standard_normal(n) * scale, 7)
        found = regression_metrics(labels, predictions)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pearson = scipy.stats.pearsonr(labels, predictions)[0]
            spearman = scipy.stats.spearmanr(labels, predictions)[0]
        assert found["pearson"] == pytest.approx(pearson, abs=1e-9, nan_ok=True)
        assert found["spearman"] == pytest.approx(spearman, abs=1e-9, nan_ok=True)
        square = np.mean((labels - predictions) ** 2)
        assert found["mean_squared_error"] == pytest.approx(square)
    assert math.isnan(regression_metrics([1.0, 1.0], [0.0, 1.0])["pearson"])


def test_perplexity():
    assert perplexity(0.0, 5.0) == 1.0
    assert perplexity(math.log(50) * 7, 7) == pytest.approx(50)
    assert perplexity(1e6, 1) == math.inf
    assert math.isnan(perplexity(0.0, 0.0))


def test_bootstrap_interval_coverage():
    """Of 200 samples of a coin, about 95 % have an interval that holds its probability."""
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        hits = rng.random(80) < 0.7
        interval = bootstrap_intervals(
            lambda i, hits=hits: {"mean": hits[i].mean()}, 80, 200, seed=trial
        )
        covered += interval["mean"].low <= 0.7 <= interval["mean"].high
    assert 180 <= covered <= 199  # binomial(200, 0.95): mean 190, 3 standard deviations are 9
    wider = bootstrap_intervals(
        lambda i: {"mean": hits[i].mean()}, 80, 200, confidence=0.99, seed=0
    )["mean"]
    narrow = bootstrap_intervals(
        lambda i: {"mean": hits[i].mean()}, 80, 200, confidence=0.5, seed=0
    )["mean"]
    assert wider.low < narrow.low <= hits.mean() <= narrow.high < wider.high
    undefined = bootstrap_intervals(lambda i: {"x": math.nan}, 3, 5)["x"]
    assert math.isnan(undefined.low) and math.isnan(undefined.high)

"""Metrics of classification, multi-label classification, regression and language modeling, with
bootstrap confidence intervals.

Metrics of classes are computed from counts that add up over batches and hosts: a confusion matrix,
or `ClassCounts`. Definitions are those of scikit-learn, with 0 / 0 = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

AVERAGE_MODES = ("micro", "macro", "weighted")


class ClassCounts(NamedTuple):
    """Counts of each class, [C] int. `predictions` and `targets` include the true positives."""

    true_positives: np.ndarray
    predictions: np.ndarray
    targets: np.ndarray

    def precision_recall_f1(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall and F1 of each class, [C] float64 each."""
        correct, predictions, targets = (np.asarray(x, np.float64) for x in self)
        return (
            _ratio(correct, predictions),
            _ratio(correct, targets),
            _ratio(2 * correct, predictions + targets),
        )

    def average(self, mode: str) -> tuple[float, float, float]:
        """Precision, recall and F1, averaged over the classes.

        Args:
            mode: "micro" adds up the counts of all classes, "macro" is the mean over classes,
                "weighted" the mean weighted by targets.
        """
        if mode == "micro":
            total = ClassCounts(*(np.asarray(x).sum(keepdims=True) for x in self))
            precision, recall, f1 = (float(x[0]) for x in total.precision_recall_f1())
            return precision, recall, f1
        weights = self.targets if mode == "weighted" else np.ones(len(self.targets))
        precision, recall, f1 = (
            float(_ratio((x * weights).sum(), weights.sum())) for x in self.precision_recall_f1()
        )
        return precision, recall, f1


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), 0.0)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [C, C]: number of examples by label (row) and prediction (column).

    Args:
        labels, predictions: int, of the same shape. Negative labels are ignored.
    """
    labels, predictions = np.asarray(labels).ravel(), np.asarray(predictions).ravel()
    counted = labels >= 0
    pairs = labels[counted].astype(np.int64) * num_classes + predictions[counted]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def counts_from_confusion(confusion: np.ndarray) -> ClassCounts:
    return ClassCounts(confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1))


def multi_label_counts(labels: np.ndarray, predictions: np.ndarray) -> ClassCounts:
    """Counts of boolean labels and predictions [n, C]."""
    labels, predictions = np.asarray(labels, bool), np.asarray(predictions, bool)
    correct = (labels & predictions).sum(axis=0)
    return ClassCounts(correct, predictions.sum(axis=0), labels.sum(axis=0))


def single_label_metrics(confusion: np.ndarray) -> dict[str, float]:
    """accuracy, matthews, f1_macro, f1_micro, f1_weighted, and for two classes f1, that of class 1.

    Averages are over the classes that occur among labels or predictions, as in scikit-learn.
    """
    counts = counts_from_confusion(confusion)
    present = (counts.predictions + counts.targets) > 0
    present_counts = ClassCounts(*(x[present] for x in counts))
    metrics = {
        "accuracy": float(_ratio(counts.true_positives.sum(), confusion.sum())),
        "matthews": matthews(confusion),
        **{f"f1_{mode}": present_counts.average(mode)[2] for mode in AVERAGE_MODES},
    }
    if len(confusion) == 2:
        metrics["f1"] = float(counts.precision_recall_f1()[2][1])
    return metrics


def matthews(confusion: np.ndarray) -> float:
    """Matthews correlation for any number of classes (Gorodkin, 2004); 0 where it is undefined."""
    confusion = np.asarray(confusion, np.float64)
    targets, predictions, total = confusion.sum(axis=1), confusion.sum(axis=0), confusion.sum()
    covariance = confusion.trace() * total - targets @ predictions
    variances = (total**2 - targets @ targets) * (total**2 - predictions @ predictions)
    return float(covariance / math.sqrt(variances)) if variances > 0 else 0.0


def multi_label_metrics(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """exact_match (all labels of a row correct), label_accuracy, f1_macro, f1_micro, f1_weighted.

    Args:
        labels, predictions: bool [n, C]. Averages are over all C classes.
    """
    correct = np.asarray(labels, bool) == np.asarray(predictions, bool)
    counts = multi_label_counts(labels, predictions)
    return {
        "exact_match": float(correct.all(axis=1).mean()),
        "label_accuracy": float(correct.mean()),
        **{f"f1_{mode}": counts.average(mode)[2] for mode in AVERAGE_MODES},
    }


def regression_metrics(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """pearson, spearman, mean_squared_error of [n] float. Correlations with a constant are nan."""
    labels, predictions = (np.asarray(x, np.float64).ravel() for x in (labels, predictions))
    return {
        "pearson": pearson(labels, predictions),
        "spearman": pearson(ranks(labels), ranks(predictions)),
        "mean_squared_error": float(np.square(labels - predictions).mean()),
    }


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation of x and y [n]; nan if one of them is constant, as in scipy."""
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    # Normalize each first, because the product of small norms would underflow.
    r = (x / np.linalg.norm(x)) @ (y / np.linalg.norm(y))
    return float(np.clip(r, -1.0, 1.0))


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks of x [n] from 1, float64 [n]. Equal values have the mean of their ranks."""
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    last_ranks = np.cumsum(counts)
    return (last_ranks - (counts - 1) / 2)[group]


def perplexity(loss: float, weight: float) -> float:
    """exp(loss / weight), for a loss in nats summed over `weight` tokens; inf on overflow."""
    try:
        return math.exp(loss / weight) if weight else math.nan
    except OverflowError:
        return math.inf


class ClassReportRow(NamedTuple):
    """A row of a classification report; `support` is the number of targets."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


def classification_report(counts: ClassCounts, names: Sequence[str]) -> list[ClassReportRow]:
    """Precision, recall and F1 of each class, in the order of `names`."""
    columns = [
        *(x.tolist() for x in counts.precision_recall_f1()),
        np.asarray(counts.targets).tolist(),
    ]
    return [ClassReportRow(*row) for row in zip(names, *columns, strict=True)]


class ConfidenceInterval(NamedTuple):
    low: float
    high: float


def bootstrap_intervals(
    metrics_fn: Callable[[np.ndarray], dict[str, float]],
    n: int,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, ConfidenceInterval]:
    """Percentile bootstrap intervals of metrics over n examples (Efron, 1979).

    Args:
        metrics_fn: maps the indices [n] int of examples, with repeats, to metrics. Undefined values
            (nan) are left out of the interval.
        n: number of examples.
    """
    generator = np.random.default_rng(seed)
    samples = [metrics_fn(generator.integers(0, n, n)) for _ in range(resamples)]
    tail = (1 - confidence) / 2
    intervals = {}
    for name in samples[0]:
        values = np.array([sample[name] for sample in samples])
        values = values[~np.isnan(values)]
        bounds = np.quantile(values, (tail, 1 - tail)) if len(values) else (math.nan, math.nan)
        intervals[name] = ConfidenceInterval(*map(float, bounds))
    return intervals

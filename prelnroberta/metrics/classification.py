"""What predictions are worth: for classes, several labels, numbers, choices and language models.

Metrics of classes come from counts that add up over batches and hosts: a confusion matrix, or
`ClassCounts`. Definitions are scikit-learn's; 0 / 0 is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

AVERAGE_MODES = ("micro", "macro", "weighted")


class ClassCounts(NamedTuple):
    """Of each class, [C] int: right predictions, predictions, and targets."""

    hits: np.ndarray
    predicted: np.ndarray
    true: np.ndarray

    def scores(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall and F1 of each class, [C] float64 each."""
        hits, predicted, true = (np.asarray(x, np.float64) for x in self)
        return _ratio(hits, predicted), _ratio(hits, true), _ratio(2 * hits, predicted + true)

    def averaged(self, average: str) -> tuple[float, float, float]:
        """Precision, recall and F1 over the classes.

        Args:
            average: 'micro' counts all classes together; 'macro' is the mean of the classes,
                'weighted' that weighted by their targets.
        """
        if average == "micro":
            total = ClassCounts(*(np.asarray(x).sum(keepdims=True) for x in self))
            return tuple(float(x[0]) for x in total.scores())
        weights = self.true if average == "weighted" else np.ones(len(self.true))
        return tuple(float(_ratio((x * weights).sum(), weights.sum())) for x in self.scores())


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), 0.0)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """int64 [C, C]: how often label (row) met prediction (column). Negative labels do not count.

    Args:
        labels, predictions: int, of the same shape.
    """
    labels, predictions = np.asarray(labels).ravel(), np.asarray(predictions).ravel()
    counted = labels >= 0
    pairs = labels[counted].astype(np.int64) * classes + predictions[counted]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def counts_from_confusion(confusion: np.ndarray) -> ClassCounts:
    return ClassCounts(confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1))


def multi_label_counts(labels: np.ndarray, predictions: np.ndarray) -> ClassCounts:
    """Counts of labels and predictions [n, C], each side true or false."""
    labels, predictions = np.asarray(labels, bool), np.asarray(predictions, bool)
    hits = (labels & predictions).sum(axis=0)
    return ClassCounts(hits, predictions.sum(axis=0), labels.sum(axis=0))


def single_label_metrics(confusion: np.ndarray) -> dict[str, float]:
    """accuracy, matthews, f1_macro, f1_micro, f1_weighted; and of two classes f1, that of class 1.

    Averages are over the classes that occur among labels or predictions, as scikit-learn's.
    """
    counts = counts_from_confusion(confusion)
    present = (counts.predicted + counts.true) > 0
    occurring = ClassCounts(*(x[present] for x in counts))
    total = confusion.sum()
    metrics = {
        "accuracy": float(_ratio(counts.hits.sum(), total)),
        "matthews": matthews(confusion),
        **{f"f1_{average}": occurring.averaged(average)[2] for average in AVERAGE_MODES},
    }
    if len(confusion) == 2:
        metrics["f1"] = float(counts.scores()[2][1])
    return metrics


def matthews(confusion: np.ndarray) -> float:
    """Matthews correlation of any number of classes (Gorodkin 2004); 0 where it is undefined."""
    confusion = np.asarray(confusion, np.float64)
    true, predicted, total = confusion.sum(axis=1), confusion.sum(axis=0), confusion.sum()
    covariance = confusion.trace() * total - true @ predicted
    spread = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0


def multi_label_metrics(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """exact_match (all labels of a row right), label_accuracy, f1_macro, f1_micro, f1_weighted.

    Args:
        labels, predictions: [n, C], each side true or false. Averages are over all C.
    """
    right = np.asarray(labels, bool) == np.asarray(predictions, bool)
    counts = multi_label_counts(labels, predictions)
    return {
        "exact_match": float(right.all(axis=1).mean()),
        "label_accuracy": float(right.mean()),
        **{f"f1_{average}": counts.averaged(average)[2] for average in AVERAGE_MODES},
    }


def regression_metrics(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """pearson, spearman, mean_squared_error of [n] float; nan where one side is constant."""
    labels, predictions = (np.asarray(x, np.float64).ravel() for x in (labels, predictions))
    return {
        "pearson": pearson(labels, predictions),
        "spearman": pearson(ranks(labels), ranks(predictions)),
        "mean_squared_error": float(np.square(labels - predictions).mean()),
    }


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation of x and y [n]; nan where one of them is constant, as scipy says."""
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    # Each is divided by its own norm first: squares of small numbers would underflow.
    r = (x / np.linalg.norm(x)) @ (y / np.linalg.norm(y))
    return float(np.clip(r, -1.0, 1.0))


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank: float64 [n]."""
    _, group, sizes = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    return (ends - (sizes - 1) / 2)[group]


def perplexity(loss: float, weight: float) -> float:
    """exp of the mean loss; `loss` the sum in nats, over `weight` tokens. inf if that overflows."""
    try:
        return math.exp(loss / weight) if weight else math.nan
    except OverflowError:
        return math.inf


class ClassReportRow(NamedTuple):
    """A line of a report; `support` is how many targets there are."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


def classification_report(counts: ClassCounts, names: Sequence[str]) -> list[ClassReportRow]:
    """Precision, recall and F1 of each class, in the order of `names`."""
    columns = [*(scores.tolist() for scores in counts.scores()), np.asarray(counts.true).tolist()]
    return [ClassReportRow(*line) for line in zip(names, *columns, strict=True)]


class ConfidenceInterval(NamedTuple):
    low: float
    high: float


def bootstrap_intervals(
    metrics: Callable[[np.ndarray], dict[str, float]],
    n: int,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, ConfidenceInterval]:
    """Percentile intervals of metrics over n examples drawn with replacement (Efron 1979).

    Args:
        metrics: from indices [n] int of examples, which repeat, to the metrics of those.
            Undefined ones (nan) are left out of the interval.
        n: how many examples there are.
    """
    generator = np.random.default_rng(seed)
    found = [metrics(generator.integers(0, n, n)) for _ in range(resamples)]
    tail = (1 - confidence) / 2
    intervals = {}
    for name in found[0]:
        values = np.array([sample[name] for sample in found])
        values = values[~np.isnan(values)]
        bounds = np.quantile(values, (tail, 1 - tail)) if len(values) else (math.nan, math.nan)
        intervals[name] = ConfidenceInterval(*map(float, bounds))
    return intervals

"""Classification metrics against scikit-learn on random cases."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from prelnroberta.metrics.classification import (
    AVERAGE_MODES,
    classification_report,
    confusion_matrix,
    counts_from_confusion,
    multi_label_counts,
    multi_label_metrics,
    single_label_metrics,
)
from tests.helpers.random_labels import random_labels_and_predictions

pytestmark = pytest.mark.oracle


@pytest.mark.filterwarnings("ignore")
def test_single_label_metrics_match_sklearn():
    rng = np.random.default_rng(0)
    for _ in range(500):
        n, classes = int(rng.integers(1, 30)), int(rng.integers(2, 6))
        labels, predictions = random_labels_and_predictions(rng, n, classes)
        ignored = rng.random(n) < 0.1
        confusion = confusion_matrix(np.where(ignored, -100, labels), predictions, classes)
        labels, predictions = labels[~ignored], predictions[~ignored]
        if not len(labels):
            assert single_label_metrics(confusion)["accuracy"] == 0
            continue
        expected = sklearn_metrics.confusion_matrix(labels, predictions, labels=range(classes))
        np.testing.assert_array_equal(confusion, expected)
        found = single_label_metrics(confusion)
        assert found["accuracy"] == pytest.approx((labels == predictions).mean(), abs=1e-12)
        matthews = sklearn_metrics.matthews_corrcoef(labels, predictions)
        assert found["matthews"] == pytest.approx(matthews, abs=1e-12)
        for average in AVERAGE_MODES:
            f1 = sklearn_metrics.f1_score(labels, predictions, average=average)
            assert found[f"f1_{average}"] == pytest.approx(f1, abs=1e-12)
        if classes == 2:
            f1 = sklearn_metrics.f1_score(labels, predictions, pos_label=1)
            assert found["f1"] == pytest.approx(f1, abs=1e-12)
        columns = sklearn_metrics.precision_recall_fscore_support(
            labels, predictions, labels=range(classes)
        )
        names = [f"class {i}" for i in range(classes)]
        report = classification_report(counts_from_confusion(confusion), names)
        assert [line.name for line in report] == names
        np.testing.assert_allclose([line[1:] for line in report], np.transpose(columns), atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_multi_label_metrics_match_sklearn():
    rng = np.random.default_rng(2)
    for _ in range(300):
        shape = rng.integers(1, 20), rng.integers(2, 6)
        labels, predictions = rng.random((2, *shape)) < rng.random((2, 1, 1))
        found = multi_label_metrics(labels, predictions)
        exact = sklearn_metrics.accuracy_score(labels, predictions)
        assert found["exact_match"] == pytest.approx(exact, abs=1e-12)
        wrong = sklearn_metrics.hamming_loss(labels, predictions)
        assert found["label_accuracy"] == pytest.approx(1 - wrong, abs=1e-12)
        for average in AVERAGE_MODES:
            f1 = sklearn_metrics.f1_score(labels, predictions, average=average)
            assert found[f"f1_{average}"] == pytest.approx(f1, abs=1e-12)
        columns = sklearn_metrics.precision_recall_fscore_support(labels, predictions)
        report = classification_report(
            multi_label_counts(labels, predictions), "abcdef"[: shape[1]]
        )
        np.testing.assert_allclose([line[1:] for line in report], np.transpose(columns), atol=1e-12)

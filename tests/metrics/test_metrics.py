"""Metrics are scikit-learn's, scipy's, seqeval's and SQuAD's, on thousands of random cases."""

import itertools
import json
import math
import re
import string
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as sklearn_metrics

from prelnroberta.data.readers.bio_tags import (
    SCHEMES,
    Span,
    scheme_of,
    spans,
    strict_spans,
    tags_of,
)
from prelnroberta.metrics.classification import (
    AVERAGE_MODES,
    bootstrap_intervals,
    classification_report,
    confusion_matrix,
    counts_from_confusion,
    multi_label_counts,
    multi_label_metrics,
    perplexity,
    regression_metrics,
    single_label_metrics,
)
from prelnroberta.metrics.entities import EntityCounts
from prelnroberta.metrics.squad import (
    answer_f1,
    exact_match,
    find_best_null_threshold,
    question_scores,
)
from tests.helpers.oracles import run_oracle

HERE = Path(__file__).parent


def labelled(rng, n, classes):
    """Labels and predictions that agree more or less, and may leave classes out."""
    labels = rng.integers(0, rng.integers(1, classes + 1), n)
    guesses = rng.integers(0, rng.integers(1, classes + 1), n)
    return labels, np.where(rng.random(n) < rng.random(), labels, guesses)


@pytest.mark.filterwarnings("ignore")
def test_classes_as_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(500):
        n, classes = int(rng.integers(1, 30)), int(rng.integers(2, 6))
        labels, predictions = labelled(rng, n, classes)
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


def test_confusion_adds_up_over_batches():
    rng = np.random.default_rng(1)
    labels, predictions = labelled(rng, 100, 5)
    parts = sum(confusion_matrix(labels[i::7], predictions[i::7], 5) for i in range(7))
    np.testing.assert_array_equal(parts, confusion_matrix(labels, predictions, 5))


@pytest.mark.filterwarnings("ignore")
def test_several_labels_as_scikit_learn():
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
        report = classification_report(multi_label_counts(labels, predictions), "abcdef"[: shape[1]])
        np.testing.assert_allclose([line[1:] for line in report], np.transpose(columns), atol=1e-12)


def test_correlations_as_scipy():
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


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    """Of 200 samples of a coin, about 95 % have an interval that holds its probability."""
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        hits = rng.random(80) < 0.7
        interval = bootstrap_intervals(lambda i, hits=hits: {"mean": hits[i].mean()}, 80, 200, seed=trial)
        covered += interval["mean"].low <= 0.7 <= interval["mean"].high
    assert 180 <= covered <= 199  # binomial(200, 0.95): mean 190, 3 standard deviations are 9
    wider = bootstrap_intervals(lambda i: {"mean": hits[i].mean()}, 80, 200, confidence=0.99, seed=0)["mean"]
    narrow = bootstrap_intervals(lambda i: {"mean": hits[i].mean()}, 80, 200, confidence=0.5, seed=0)["mean"]
    assert wider.low < narrow.low <= hits.mean() <= narrow.high < wider.high
    undefined = bootstrap_intervals(lambda i: {"x": math.nan}, 3, 5)["x"]
    assert math.isnan(undefined.low) and math.isnan(undefined.high)


# ---------------------------------------------------------------------------------------------
# Entities.


def random_tags(rng, letters, length):
    tags = [f"{letter}-{kind}" for letter in letters for kind in ("x", "yz")]
    return ["O" if rng.random() < 0.3 else str(rng.choice(tags)) for _ in range(length)]


# Another way to say what an entity is: a pattern over tags, each written as one character.
CODES = {"O": "."} | {
    f"{letter}-{kind}": code
    for kind, codes in (("x", "bies"), ("yz", "BIES"))
    for letter, code in zip("BIES", codes, strict=True)
}
PATTERNS = {
    ("IOB2", True): r"bi*|BI*",
    ("IOB2", False): r"[bi]i*|[BI]I*",
    ("IOBES", True): r"bi*e|s|BI*E|S",
    ("IOBES", False): r"s|[bi]i*e?|e|S|[BI]I*E?|E",
}


@pytest.mark.parametrize("scheme, strict", PATTERNS)
def test_spans_are_what_the_pattern_finds(scheme, strict):
    rng = np.random.default_rng(5)
    for _ in range(1500):
        tags = random_tags(rng, "BI" if scheme == "IOB2" else "BIES", int(rng.integers(0, 12)))
        text = "".join(CODES[tag] for tag in tags)
        expected = [
            Span(*match.span(), "x" if match[0].islower() else "yz")
            for match in re.finditer(PATTERNS[scheme, strict], text)
        ]
        assert (strict_spans(tags, scheme) if strict else spans(tags)) == expected, tags


def test_entity_scores_as_seqeval():
    """Its answers are kept in a file; oracle/seqeval_cases.py tells how it was made."""
    lines = (HERE / "seqeval_cases.txt").read_text().splitlines()
    assert len(lines) > 400
    for line in lines:
        scheme, *sides, precision, recall, f1, _, _, macro = line.split("\t")
        true, predicted = (
            [
                [tag if tag == "O" else f"{tag[0]}-{tag[1:]}" for tag in sentence.split(" ")]
                for sentence in side.split("/")
            ]
            for side in sides
        )
        counts = EntityCounts(true, predicted, None if scheme == "default" else scheme)
        found = counts.metrics()
        for name, expected in zip(
            ("precision", "recall", "f1", "f1_macro"), (precision, recall, f1, macro), strict=True
        ):
            assert found[name] == pytest.approx(float(expected), abs=1e-10), (line, name)
        right = [
            a == b for pair in zip(true, predicted, strict=True) for a, b in zip(*pair, strict=True)
        ]
        assert found["accuracy"] == pytest.approx(np.mean(right))


def test_entity_counts_of_chosen_sentences():
    """A bootstrap draws sentences; drawn twice, one counts twice."""
    true = [["B-x", "O"], ["B-x", "I-x"], ["O", "B-y"]]
    predicted = [["B-x", "O"], ["B-x", "O"], ["O", "O"]]
    counts = EntityCounts(true, predicted)
    twice = EntityCounts([true[1], true[1], true[2]], [predicted[1], predicted[1], predicted[2]])
    assert counts.metrics(np.array([1, 1, 2])) == twice.metrics()
    assert counts.types == ["x", "y"]
    assert [line.support for line in classification_report(counts.counts(), counts.types)] == [2, 1]
    with pytest.raises(ValueError, match="sentence 0 has 1 words, but 2 tags"):
        EntityCounts([["O"]], [["O", "O"]])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_spans_survive_every_scheme(scheme):
    rng = np.random.default_rng(6)
    for _ in range(500):
        length = int(rng.integers(1, 15))
        cuts = np.sort(rng.choice(length + 1, int(rng.integers(0, length + 1)), replace=False))
        entities = [
            Span(int(a), int(b), str(rng.choice(["x", "y"])))
            for a, b in itertools.pairwise(cuts)
            if rng.random() < 0.6
        ]
        tags = tags_of(entities, length, scheme)
        assert spans(tags) == entities
        if scheme != "IOB1":  # seqeval's own does not close B-x before B-y
            assert strict_spans(tags, scheme) == entities
        elif any(tag[0] == "I" for tag in tags) and tags_of(entities, length) != tags:
            assert scheme_of([tags]) == "IOB1"


def test_scheme_is_recognised():
    assert scheme_of([["O", "I-x", "B-x"]]) == "IOB1"
    assert scheme_of([["O", "B-x", "I-x"]]) == "IOB2"
    assert scheme_of([["O", "B-x", "I-x"], ["I-x"]]) == "IOB2", "an error in IOB2, not IOB1"
    assert scheme_of([["S-x"], ["O"]]) == "IOBES"
    assert scheme_of([["U-x", "O", "B-x", "L-x"]]) == "IOBES"
    assert scheme_of([["NOUN", "O"]]) is None
    assert spans(["U-x", "B-x", "I-x", "L-x"]) == [Span(0, 1, "x"), Span(1, 4, "x")]
    assert spans(["I-x-y", "I-x-y", "B-z"]) == [Span(0, 2, "x-y"), Span(2, 3, "z")]


# ---------------------------------------------------------------------------------------------
# SQuAD.

WORDS = ["the", "a", "an", "The", "cat", "cat's", "Cat", "dog.", "'", "—", "ü", "thé", "1,000"]
WORDS += ["", "\u00a0"]


def texts(rng, n):
    return [
        " ".join(rng.choice(WORDS, int(rng.integers(0, 5)))) + str(rng.choice(["", "!", " the"]))
        for _ in range(n)
    ]


def official_v1(prediction, answer):
    """Exact match and F1 as evaluate-v1.1.py has them, in other words."""

    def tokens(text):
        kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    a, b = tokens(prediction), tokens(answer)
    same = sum((Counter(a) & Counter(b)).values())
    if same == 0:
        return float(a == b), 0.0
    precision, recall = same / len(a), same / len(b)
    return float(a == b), 2 * precision * recall / (precision + recall)


def test_answers_as_squad_1():
    rng = np.random.default_rng(7)
    for prediction, answer in zip(texts(rng, 3000), texts(rng, 3000), strict=True):
        exact, f1 = official_v1(prediction, answer)
        assert exact_match(prediction, answer) == exact
        assert answer_f1(prediction, answer) == pytest.approx(f1, abs=1e-12)


def test_answers_as_squad_2(tmp_path):
    """Against the script as transformers 4 carries it, 2,000 questions and best thresholds."""
    rng = np.random.default_rng(8)
    names = [f"q{i}" for i in range(2000)]
    answers = {name: texts(rng, int(rng.integers(0, 4))) for name in names}
    predictions = dict(zip(names, texts(rng, len(names)), strict=True))
    for name in names[::3]:
        predictions[name] = answers[name][0] if answers[name] else ""
    null = dict(zip(names, rng.standard_normal(len(names)).tolist(), strict=True))
    given, judged = tmp_path / "given.json", tmp_path / "judged.json"
    given.write_text(json.dumps({"predictions": predictions, "answers": answers, "null": null}))
    run_oracle("squad_scores.py", given, judged)
    expected = json.loads(judged.read_text())
    scores = question_scores(predictions, answers, version_2=True)
    np.testing.assert_array_equal(scores.exact, list(expected["exact"].values()))
    np.testing.assert_allclose(scores.f1, list(expected["f1"].values()), atol=1e-12)
    filled = np.array([bool(predictions[name]) for name in names])
    for values, (best, threshold) in (
        (scores.exact, expected["best"]["exact"]),
        (scores.f1, expected["best"]["f1"]),
    ):
        # The script leaves out empty predictions; ours is given none that are empty.
        kept = filled | scores.answerable
        found = find_best_null_threshold(
            values[kept], scores.answerable[kept], np.array(list(null.values()))[kept]
        )
        empty = (~kept).sum()
        assert (found[0] * kept.sum() / 100 + empty) * 100 / len(kept) == pytest.approx(best)
        assert found[1] == pytest.approx(threshold)


def test_question_scores_take_the_best_answer_and_count_what_is_missing():
    answers = {"a": ["the cat", "dogs"], "b": ["cat"], "c": []}
    scores = question_scores({"a": "Cat", "c": ""}, answers, version_2=True)
    assert scores.exact.tolist() == [1, 0, 1]
    metrics = scores.metrics()
    assert metrics["exact_match"] == pytest.approx(200 / 3)
    assert metrics["has_answer_exact_match"] == 50 and metrics["no_answer_f1"] == 100
    answerable = question_scores({"a": "Cat"}, {"a": ["cat"]})
    assert answerable.metrics() == {"exact_match": 100, "f1": 100}
    intervals = bootstrap_intervals(scores.metrics, 3, 50)
    assert intervals["exact_match"].low < 67 < intervals["exact_match"].high

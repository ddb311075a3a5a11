"""SQuAD's exact match and F1, against both versions of the official script."""

import json
import re
import string
from collections import Counter

import numpy as np
import pytest

from prelnroberta.metrics.classification import (
    bootstrap_intervals,
)
from prelnroberta.metrics.squad import (
    answer_f1,
    exact_match,
    find_best_null_threshold,
    question_scores,
)
from tests.helpers.oracles import run_oracle

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


def test_answer_scores_match_squad_1_script():
    rng = np.random.default_rng(7)
    for prediction, answer in zip(texts(rng, 3000), texts(rng, 3000), strict=True):
        exact, f1 = official_v1(prediction, answer)
        assert exact_match(prediction, answer) == exact
        assert answer_f1(prediction, answer) == pytest.approx(f1, abs=1e-12)


@pytest.mark.oracle
def test_question_scores_match_squad_2_script(tmp_path):
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


def test_question_scores_use_best_answer_and_count_missing_predictions():
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

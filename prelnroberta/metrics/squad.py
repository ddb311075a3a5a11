"""Exact match and F1 of answers, as defined by SQuAD's evaluation scripts.

v1.1 and v2.0 differ for answers that are empty once case, punctuation and articles are removed.
v1.1 gives such a pair an F1 of 0, v2.0 gives 1 if both are empty. In v2.0 a question without
answers has one correct answer, the empty one.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-cases text and removes ASCII punctuation, English articles and extra whitespace."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(answer))


def answer_f1(prediction: str, answer: str, version_2: bool = False) -> float:
    """F1 of the words of two answers, as bags."""
    predicted, target = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if version_2 and not (predicted and target):
        return float(predicted == target)
    shared = sum((Counter(predicted) & Counter(target)).values())
    return 2 * shared / (len(predicted) + len(target)) if shared else 0.0


class QuestionScores(NamedTuple):
    """Exact match and F1 in [0, 1] of each question, and whether it has an answer; [n] each."""

    exact: np.ndarray
    f1: np.ndarray
    answerable: np.ndarray

    def metrics(self, questions: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """exact_match and f1 in percent. If some questions have no answer, also the same of those
        with an answer (has_answer_) and of those without (no_answer_)."""
        exact, f1, answerable = (x[questions] for x in self)
        groups = {"": np.ones(len(exact), bool)}
        if not self.answerable.all():
            groups |= {"has_answer_": answerable, "no_answer_": ~answerable}
        return {
            prefix + name: 100 * float(values[group].mean()) if group.any() else float("nan")
            for prefix, group in groups.items()
            for name, values in (("exact_match", exact), ("f1", f1))
        }


def question_scores(
    predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]], version_2: bool = False
) -> QuestionScores:
    """Scores of the questions of `answers`, in its order: the best over the answers of each.

    Args:
        predictions: id -> text. A missing prediction scores 0.
        answers: id -> correct answers; empty if the question has no answer.
    """
    exact, f1, answerable = [], [], []
    for question_id, targets in answers.items():
        answerable.append(bool(targets))
        if version_2:
            targets = [target for target in targets if normalize_answer(target)] or [""]
        text = predictions.get(question_id)
        scored = text is not None and len(targets) > 0
        exact.append(max(exact_match(text, target) for target in targets) if scored else 0.0)
        f1.append(max(answer_f1(text, target, version_2) for target in targets) if scored else 0.0)
    return QuestionScores(np.array(exact), np.array(f1), np.array(answerable, bool))


def find_best_null_threshold(
    scores: np.ndarray, answerable: np.ndarray, null_score_diffs: np.ndarray
) -> tuple[float, float]:
    """Returns the best mean score in percent over thresholds on null_score_diff, and its threshold.

    A question whose difference exceeds the threshold is predicted to have no answer. Same as
    find_best_thresh of the v2.0 script.

    Args:
        scores: [n], exact match or F1 of the best non-empty answer to each question.
        answerable: bool [n], whether the question has an answer.
        null_score_diffs: [n], score of "no answer" minus that of the best non-empty answer.
    """
    order = np.argsort(null_score_diffs, kind="stable")
    gains = np.where(answerable, scores, -1.0)[order]
    totals = (~answerable).sum() + np.concatenate([[0.0], np.cumsum(gains)])
    best = int(totals.argmax())
    threshold = 0.0 if best == 0 else float(null_score_diffs[order[best - 1]])
    return 100 * float(totals[best]) / len(scores), threshold

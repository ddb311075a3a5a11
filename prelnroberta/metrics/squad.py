"""Exact match and F1 of answers, by the definitions of SQuAD's evaluation scripts.

v1.1 and v2.0 differ where nothing is left of an answer once case, punctuation and articles are
gone: v1.1 gives such a pair no F1, v2.0 gives it 1 if both are empty. In v2.0 a question without
answers has one right answer, the empty one.
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
    """Lower case, without ASCII punctuation, English articles and extra whitespace."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(answer))


def answer_f1(prediction: str, answer: str, version_2: bool = False) -> float:
    """F1 of the two bags of words."""
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if version_2 and not (predicted and wanted):
        return float(predicted == wanted)
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0


class QuestionScores(NamedTuple):
    """Of each question [n]: exact match and F1 in [0, 1], and whether it has an answer."""

    exact: np.ndarray
    f1: np.ndarray
    answerable: np.ndarray

    def metrics(self, questions: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """exact_match and f1 in percent; and, where some questions have no answer, the same of
        those that have one (has_answer_) and of the others (no_answer_)."""
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
    """Scores of the questions of `answers`, in its order; the best over the answers of each.

    Args:
        predictions: id -> text; a question that is missing here is answered wrongly.
        answers: id -> right answers, none where the question has no answer.
    """
    exact, f1, answerable = [], [], []
    for name, right in answers.items():
        answerable.append(bool(right))
        if version_2:
            right = [answer for answer in right if normalize_answer(answer)] or [""]
        text = predictions.get(name)
        known = text is not None and len(right) > 0
        exact.append(max(exact_match(text, answer) for answer in right) if known else 0.0)
        f1.append(max(answer_f1(text, answer, version_2) for answer in right) if known else 0.0)
    return QuestionScores(np.array(exact), np.array(f1), np.array(answerable, bool))


def find_best_null_threshold(
    scores: np.ndarray, answerable: np.ndarray, null_differences: np.ndarray
) -> tuple[float, float]:
    """The mean score, in percent, at the best threshold of null_difference, and that threshold.

    Above the threshold 'no answer' is given. As the v2.0 script's find_best_thresh.

    Args:
        scores: [n], exact match or F1 of each question's best answer that is not empty.
        answerable: bool [n], whether the question has an answer.
        null_differences: [n], score of 'no answer' minus that of the best answer.
    """
    order = np.argsort(null_differences, kind="stable")
    gains = np.where(answerable, scores, -1.0)[order]
    totals = (~answerable).sum() + np.concatenate([[0.0], np.cumsum(gains)])
    best = int(totals.argmax())
    threshold = 0.0 if best == 0 else float(null_differences[order[best - 1]])
    return 100 * float(totals[best]) / len(scores), threshold

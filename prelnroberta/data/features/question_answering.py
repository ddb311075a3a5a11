"""Extractive question answering: questions -> features -> batches -> answers.

A batch, B rows of L tokens:
    input_ids, attention_mask        int32 [B, L]
    start_positions, end_positions   int32 [B], of the answer's first and last token; 0, that is
                                     `<s>`, where the row does not hold all of it; -100 in filling
                                     rows
    weights                          float32 [B], 1 for a row of a question, 0 for a filling row
Without answers in the questions there are no positions.

A row is `<s> question </s></s> context </s>`. A context that does not fit becomes several windows
that overlap. Features and answers follow run_qa.py and utils_qa.py of transformers (its folder
examples/pytorch/question-answering).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prelnroberta.config import IGNORE_INDEX
from prelnroberta.data.features.base import PADDING_INDEX, Features, collate_tokens
from prelnroberta.data.features.encoding import PAIR_SPECIALS, encodings, plain, token_ids, windows
from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.readers.squad import Question
from prelnroberta.data.shuffle import Batch
from prelnroberta.data.tokenizer import BOS_ID, EOS_ID
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers


@dataclasses.dataclass(frozen=True)
class QuestionFeatures(Features):
    """Rows of questions, each question's one after another.

    Attributes:
        examples: the questions that are left, in order.
        owners: int [rows], the question of each row.
        input_ids: int32 [tokens] each.
        context_starts: int [rows], where the context begins in each row.
        offsets: int [tokens of the context, 2] each: characters of the context, start and end.
        positions: int32 [rows, 2], first and last token of the answer, or None.
    """

    examples: list[Question]
    owners: np.ndarray
    input_ids: list[np.ndarray]
    context_starts: np.ndarray
    offsets: list[np.ndarray]
    positions: np.ndarray | None

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.input_ids], np.int64)

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        """The module's batch of the rows at `indices` [B]; -1 fills up."""
        batch = collate_tokens(self.input_ids, indices, length)
        if self.positions is not None:
            real = np.asarray(indices)[:, None] != PADDING_INDEX
            starts, ends = np.where(real, self.positions[indices], IGNORE_INDEX).T
            batch["start_positions"], batch["end_positions"] = starts, ends
        return batch


def question_features(
    questions: Sequence[Question],
    tokenizer: tokenizers.Tokenizer,
    max_length: int = 384,
    doc_stride: int = 128,
    bad: RowErrors | None = None,
) -> QuestionFeatures:
    """Features of questions, with the positions of their first answers if they have any.

    Ids and offsets are those of transformers' `tokenizer(question.lstrip(), context,
    truncation="only_second", max_length=, doc_stride=, return_overflowing_tokens=True)`.

    Args:
        max_length: longest row, with its four specials.
        doc_stride: tokens of context that neighbouring windows share.
        bad: takes questions so long that `doc_stride` tokens of context do not fit beside them.

    Raises:
        InputError: no questions (left), or bad ones where `bad` is None.
    """
    bad, own = ensure_collector(bad)
    bad.ensure_row_count(len(questions))
    asked = token_ids(tokenizer, (q.question.lstrip() for q in questions))
    # A context has several questions as a rule.
    distinct = list(dict.fromkeys(q.context for q in questions))
    contexts = {
        context: (np.array(encoding.ids, np.int32), np.array(encoding.offsets).reshape(-1, 2))
        for context, encoding in zip(distinct, encodings(plain(tokenizer), distinct), strict=True)
    }
    known = bool(questions) and questions[0].answers is not None
    kept: list[Question] = []
    owners, input_ids, context_starts, offsets, positions = [], [], [], [], []
    for question, ids in zip(questions, asked, strict=True):
        room = max_length - PAIR_SPECIALS - len(ids)
        if room <= doc_stride:
            bad.add(
                question.place,
                f"the question has {len(ids)} tokens: beside it a row of {max_length} has room for "
                f"{max(room, 0)} of context, and windows that share {doc_stride} need more",
            )
            continue
        context_ids, context_offsets = contexts[question.context]
        context_start = len(ids) + 3
        head = np.concatenate([[BOS_ID], ids, [EOS_ID, EOS_ID]])
        for start, end in windows(len(context_ids), room, doc_stride):
            row_offsets = context_offsets[start:end]
            owners.append(len(kept))
            input_ids.append(
                np.concatenate([head, context_ids[start:end], [EOS_ID]]).astype(np.int32)
            )
            context_starts.append(context_start)
            offsets.append(row_offsets)
            if known:
                positions.append(_positions(question, row_offsets, context_start))
        kept.append(question)
    if own:
        bad.raise_if_any()
    if not kept:
        raise InputError(f"no questions left: {bad.summary}")
    return QuestionFeatures(
        kept,
        np.array(owners),
        input_ids,
        np.array(context_starts),
        offsets,
        np.array(positions, np.int32) if known else None,
    )


def _positions(question: Question, offsets: np.ndarray, context_start: int) -> tuple[int, int]:
    """First and last token of the first answer in a row; (0, 0) unless it lies in it whole.

    As run_qa.py, but for an answer that begins in the last token of the context in a row: there its
    walk goes on over `</s>` and pads, and takes the last of them for the start.
    """
    if not question.answers or not len(offsets):
        return 0, 0
    text, start = question.answers[0]
    end = start + len(text)
    if offsets[0, 0] > start or offsets[-1, 1] < end:
        return 0, 0
    later = np.flatnonzero(offsets[:, 0] > start)
    first = (later[0] if len(later) else len(offsets)) - 1
    earlier = np.flatnonzero(offsets[:, 1] < end)
    last = earlier[-1] + 1 if len(earlier) else 0
    return context_start + int(first), context_start + int(last)


class Candidate(NamedTuple):
    """A possible answer: characters start to end of the context; the empty text means none.

    `score` is the sum of the two logits; `probability` is among the candidates listed with it.
    """

    text: str
    start: int
    end: int
    score: float
    probability: float


class Prediction(NamedTuple):
    """The answer of a question.

    candidates: best first, at most n_best_size and the empty one. `text` is that of one of them.
    null_difference: score of 'no answer' minus that of the best answer; None in v1.1.
    """

    id: str
    text: str
    null_difference: float | None
    candidates: list[Candidate]


def predict_answers(
    features: QuestionFeatures,
    logits: Sequence[np.ndarray],
    n_best_size: int = 20,
    max_answer_length: int = 30,
    may_be_null: bool = False,
    null_score_diff_threshold: float = 0.0,
) -> list[Prediction]:
    """An answer for each question from the logits of its rows.

    As utils_qa.postprocess_qa_predictions: of each row the `n_best_size` starts and ends, paired where
    the end is not before the start and not over `max_answer_length` tokens, are candidates. With
    `may_be_null` (SQuAD v2.0) the answer is empty if the least score of `<s>` over the rows exceeds
    the best answer's by more than `null_score_diff_threshold`. Where no row has a candidate, the
    answer is empty; utils_qa says 'empty'.

    Args:
        logits: of each row [L, 2], starts and ends; L may exceed the row's tokens.
    """
    rows_of: list[list[int]] = [[] for _ in features.examples]
    for row, owner in enumerate(features.owners):
        rows_of[owner].append(row)
    return [
        _predict(
            question,
            [
                (
                    np.asarray(logits[row], np.float64)[: len(features.input_ids[row])],
                    int(features.context_starts[row]),
                    features.offsets[row],
                )
                for row in rows
            ],
            n_best_size,
            max_answer_length,
            may_be_null,
            null_score_diff_threshold,
        )
        for question, rows in zip(features.examples, rows_of, strict=True)
    ]


def _predict(
    question: Question,
    rows: list[tuple[np.ndarray, int, np.ndarray]],
    n_best_size: int,
    max_answer_length: int,
    may_be_null: bool,
    null_score_diff_threshold: float,
) -> Prediction:
    found = [c for row in rows for c in _row_candidates(*row, n_best_size, max_answer_length)]
    null_score = min(float(logits[0].sum()) for logits, _, _ in rows)
    if may_be_null:
        found.append((null_score, 0, 0))
    # Sorted by score alone and stably: rows and ranks decide between equals, as in utils_qa.
    best = sorted(found, key=lambda candidate: -candidate[0])[:n_best_size]
    if may_be_null and (0, 0) not in [candidate[1:] for candidate in best]:
        best.append((null_score, 0, 0))
    if not best:
        return Prediction(question.id, "", null_score if may_be_null else None, [])
    scores = np.array([score for score, _, _ in best])
    exps = np.exp(scores - scores.max())
    candidates = [
        Candidate(question.context[start:end], start, end, score, float(probability))
        for (score, start, end), probability in zip(best, exps / exps.sum(), strict=True)
    ]
    if not may_be_null:
        return Prediction(question.id, candidates[0].text, None, candidates)
    answer = next((candidate for candidate in candidates if candidate.text), None)
    if answer is None:
        return Prediction(question.id, "", np.inf, candidates)
    difference = null_score - answer.score
    text = "" if difference > null_score_diff_threshold else answer.text
    return Prediction(question.id, text, difference, candidates)


def _row_candidates(
    logits: np.ndarray,
    context_start: int,
    offsets: np.ndarray,
    n_best_size: int,
    max_answer_length: int,
) -> Iterator[tuple[float, int, int]]:
    """(score, start, end in characters) of the pairs of best starts and ends that are spans."""
    starts, ends = (np.argsort(side)[: -n_best_size - 1 : -1] for side in logits.T)
    first, last = (x.ravel() for x in np.meshgrid(starts, ends, indexing="ij"))
    context_end = context_start + len(offsets)
    inside = (first >= context_start) & (last < context_end)
    valid = inside & (last >= first) & (last - first < max_answer_length)
    first, last = first[valid], last[valid]
    scores = logits[first, 0] + logits[last, 1]
    yield from zip(
        scores.tolist(),
        offsets[first - context_start, 0].tolist(),
        offsets[last - context_start, 1].tolist(),
        strict=True,
    )

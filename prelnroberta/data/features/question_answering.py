"""Extractive question answering: questions -> features -> batches -> answers.

A batch, B rows of L tokens:
    input_ids, attention_mask        int32 [B, L]
    start_positions, end_positions   int32 [B], the answer's first and last token; 0, the position
                                     of `<s>`, if the row does not hold the whole answer; -100 in
                                     padding rows
    weights                          float32 [B], 1 for a row of a question, 0 for a padding row
If the questions have no answers, the positions are absent.

A row is `<s> question </s></s> context </s>`. A context that does not fit becomes several
overlapping windows, one to a row. Features and answers follow run_qa.py and utils_qa.py of
transformers (examples/pytorch/question-answering).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prelnroberta.config import IGNORE_INDEX
from prelnroberta.data.features.base import PADDING_INDEX, Features, collate_tokens
from prelnroberta.data.features.encoding import (
    NUM_PAIR_SPECIALS,
    encode_in_chunks,
    encode_texts,
    window_ranges,
    without_padding,
)
from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.readers.squad import Question
from prelnroberta.data.shuffle import Batch
from prelnroberta.data.tokenizer import BOS_ID, EOS_ID
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers


@dataclasses.dataclass(frozen=True)
class QuestionFeatures(Features):
    """Rows of questions; the rows of a question follow each other.

    Attributes:
        examples: the usable questions, in order.
        example_indices: int [rows], the question of each row.
        input_ids: int32 [tokens] of each row.
        context_starts: int [rows], the position where the context begins in each row.
        offsets: int [context tokens, 2] of each row: start and end characters in the context.
        answer_positions: int32 [rows, 2], first and last token of the answer, or None.
    """

    examples: list[Question]
    example_indices: np.ndarray
    input_ids: list[np.ndarray]
    context_starts: np.ndarray
    offsets: list[np.ndarray]
    answer_positions: np.ndarray | None

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.input_ids], np.int64)

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        """The batch of the rows at `indices` [B], see the module docstring."""
        batch = collate_tokens(self.input_ids, indices, length)
        if self.answer_positions is not None:
            is_row = np.asarray(indices)[:, None] != PADDING_INDEX
            starts, ends = np.where(is_row, self.answer_positions[indices], IGNORE_INDEX).T
            batch["start_positions"], batch["end_positions"] = starts, ends
        return batch


def question_features(
    questions: Sequence[Question],
    tokenizer: tokenizers.Tokenizer,
    max_length: int = 384,
    doc_stride: int = 128,
    row_errors: RowErrors | None = None,
) -> QuestionFeatures:
    """Tokenizes questions and contexts, and finds the tokens of the first answers, if known.

    Ids and offsets are those of transformers' `tokenizer(question.lstrip(), context,
    truncation="only_second", max_length=, stride=, return_overflowing_tokens=True)`.

    Args:
        max_length: maximal number of tokens of a row, including its four special tokens.
        doc_stride: tokens of context that neighbouring windows share.
        row_errors: collects questions so long that a row has no room for more than `doc_stride`
            tokens of context; they are left out.

    Raises:
        InputError: there are no usable questions; or some are unusable and `row_errors` is None.
    """
    row_errors, is_owner = ensure_collector(row_errors)
    row_errors.ensure_row_count(len(questions))
    question_ids = encode_texts(tokenizer, (q.question.lstrip() for q in questions))
    contexts = _encode_contexts(questions, tokenizer)
    has_answers = bool(questions) and questions[0].answers is not None
    kept: list[Question] = []
    example_indices, input_ids, context_starts, offsets, positions = [], [], [], [], []
    for question, ids in zip(questions, question_ids, strict=True):
        room = max_length - NUM_PAIR_SPECIALS - len(ids)
        if room <= doc_stride:
            row_errors.add(
                question.location,
                f"the question has {len(ids)} tokens, which leaves room for {max(room, 0)} tokens "
                f"of context in a row of {max_length}; expected more than the {doc_stride} that "
                "windows share",
            )
            continue
        context_ids, context_offsets = contexts[question.context]
        prefix = np.concatenate([[BOS_ID], ids, [EOS_ID, EOS_ID]])
        for start, end in window_ranges(len(context_ids), room, doc_stride):
            row = np.concatenate([prefix, context_ids[start:end], [EOS_ID]])
            row_offsets = context_offsets[start:end]
            example_indices.append(len(kept))
            input_ids.append(row.astype(np.int32))
            context_starts.append(len(prefix))
            offsets.append(row_offsets)
            if has_answers:
                positions.append(_answer_positions(question, row_offsets, len(prefix)))
        kept.append(question)
    if is_owner:
        row_errors.raise_if_any()
    if not kept:
        raise InputError(f"no questions left: {row_errors.summary}")
    return QuestionFeatures(
        kept,
        np.array(example_indices),
        input_ids,
        np.array(context_starts),
        offsets,
        np.array(positions, np.int32) if has_answers else None,
    )


def _encode_contexts(
    questions: Sequence[Question], tokenizer: tokenizers.Tokenizer
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """context -> (int32 [tokens] ids, int [tokens, 2] offsets); several questions share one."""
    contexts = list(dict.fromkeys(q.context for q in questions))
    encodings = encode_in_chunks(without_padding(tokenizer), contexts)
    return {
        context: (np.array(encoding.ids, np.int32), np.array(encoding.offsets).reshape(-1, 2))
        for context, encoding in zip(contexts, encodings, strict=True)
    }


def _answer_positions(
    question: Question, offsets: np.ndarray, context_start: int
) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) unless the row holds the whole answer.

    As run_qa.py, except for an answer that begins in a row's last context token: run_qa.py searches
    on past `</s>` and the pads and takes the last of them as the start.
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


class AnswerCandidate(NamedTuple):
    """A possible answer: characters `start` to `end` of the context; empty text for 'no answer'.

    `score` is the sum of the start and end logits. `probability` is the softmax of the scores of
    the candidates listed with it.
    """

    text: str
    start: int
    end: int
    score: float
    probability: float


class AnswerPrediction(NamedTuple):
    """The answer to a question.

    Attributes:
        text: the text of one of the candidates.
        null_score_diff: score of 'no answer' minus that of the best answer; None in SQuAD v1.1.
        candidates: best first, at most `n_best_size` and the empty one.
    """

    id: str
    text: str
    null_score_diff: float | None
    candidates: list[AnswerCandidate]


def predict_answers(
    features: QuestionFeatures,
    logits: Sequence[np.ndarray],
    n_best_size: int = 20,
    max_answer_length: int = 30,
    may_be_null: bool = False,
    null_score_diff_threshold: float = 0.0,
) -> list[AnswerPrediction]:
    """Predicts the answer to each question from the logits of its rows.

    As utils_qa.postprocess_qa_predictions. In each row, the `n_best_size` best starts and ends are
    paired; a pair is a candidate if its end is not before its start and it has at most
    `max_answer_length` tokens. With `may_be_null` (SQuAD v2.0), the answer is empty if the lowest
    score of `<s>` over the rows exceeds the best answer's by more than
    `null_score_diff_threshold`. If no row has a candidate, the answer is empty (utils_qa gives the
    text 'empty').

    Args:
        logits: float [L, 2] of each row, starts and ends; L may exceed the row's length.
    """
    question_rows: list[list[int]] = [[] for _ in features.examples]
    for row, example in enumerate(features.example_indices):
        question_rows[example].append(row)
    return [
        _predict_answer(
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
        for question, rows in zip(features.examples, question_rows, strict=True)
    ]


def _predict_answer(
    question: Question,
    rows: list[tuple[np.ndarray, int, np.ndarray]],
    n_best_size: int,
    max_answer_length: int,
    may_be_null: bool,
    null_score_diff_threshold: float,
) -> AnswerPrediction:
    spans = [
        span for row in rows for span in _candidate_spans(*row, n_best_size, max_answer_length)
    ]
    null_score = min(float(logits[0].sum()) for logits, _, _ in rows)
    if may_be_null:
        spans.append((null_score, 0, 0))
    # A stable sort by score alone: rows and ranks decide between equals, as in utils_qa.
    best = sorted(spans, key=lambda span: -span[0])[:n_best_size]
    if may_be_null and (0, 0) not in [span[1:] for span in best]:
        best.append((null_score, 0, 0))
    if not best:
        return AnswerPrediction(question.id, "", null_score if may_be_null else None, [])
    scores = np.array([score for score, _, _ in best])
    exps = np.exp(scores - scores.max())
    candidates = [
        AnswerCandidate(question.context[start:end], start, end, score, float(probability))
        for (score, start, end), probability in zip(best, exps / exps.sum(), strict=True)
    ]
    if not may_be_null:
        return AnswerPrediction(question.id, candidates[0].text, None, candidates)
    answer = next((candidate for candidate in candidates if candidate.text), None)
    if answer is None:
        return AnswerPrediction(question.id, "", np.inf, candidates)
    difference = null_score - answer.score
    text = "" if difference > null_score_diff_threshold else answer.text
    return AnswerPrediction(question.id, text, difference, candidates)


def _candidate_spans(
    logits: np.ndarray,
    context_start: int,
    offsets: np.ndarray,
    n_best_size: int,
    max_answer_length: int,
) -> Iterator[tuple[float, int, int]]:
    """(score, start and end characters) of the valid pairs of a row's best starts and ends."""
    starts, ends = (np.argsort(side)[: -n_best_size - 1 : -1] for side in logits.T)
    first, last = (x.ravel() for x in np.meshgrid(starts, ends, indexing="ij"))
    context_end = context_start + len(offsets)
    in_context = (first >= context_start) & (last < context_end)
    valid = in_context & (last >= first) & (last - first < max_answer_length)
    first, last = first[valid], last[valid]
    scores = logits[first, 0] + logits[last, 1]
    yield from zip(
        scores.tolist(),
        offsets[first - context_start, 0].tolist(),
        offsets[last - context_start, 1].tolist(),
        strict=True,
    )

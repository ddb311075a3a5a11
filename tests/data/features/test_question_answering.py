"""Windows of questions and the answers chosen from them, against transformers' run_qa.py."""

import numpy as np
import pytest

from prelnroberta.config import IGNORE_INDEX
from prelnroberta.data.features.question_answering import predict_answers, question_features
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.data.readers.squad import Answer, Question
from prelnroberta.errors import InputError
from tests.helpers.random_texts import assert_same_ids, random_questions


def reference_positions(given, offsets, sequence_ids):
    """run_qa.py's rule, walking from both ends of the context's tokens.

    With one repair. Where the answer begins in the row's last token of context, its walk goes on
    over `</s>` and pads, whose offsets are (0, 0), and marks the last of them as the start.
    """
    if not given.answers or 1 not in sequence_ids:
        return 0, 0
    start = given.answers[0].start
    end = start + len(given.answers[0].text)
    left = sequence_ids.index(1)
    right = last = len(sequence_ids) - 1 - sequence_ids[::-1].index(1)
    if offsets[left][0] > start or offsets[right][1] < end:
        return 0, 0
    while left < len(offsets) and offsets[left][0] <= start:
        left += 1
    while offsets[right][1] >= end:
        right -= 1
    if left == len(offsets):
        assert offsets[last][0] <= start
        left = last + 1
    return left - 1, right + 1


@pytest.mark.oracle
@pytest.mark.parametrize("max_length, stride", [(384, 128), (48, 10), (40, 0), (36, 7)])
def test_questions_match_transformers(tokenizer, theirs, max_length, stride):
    rng = np.random.default_rng(max_length)
    bad = RowErrors(skip=True)
    features = question_features(
        list(random_questions(rng, 600, 30)), tokenizer, max_length, stride, row_errors=bad
    )
    given = features.examples
    assert len(given) + len(bad.problems) == 600 and len(given) > 450
    expected = theirs(
        [question.question.lstrip() for question in given],
        [question.context for question in given],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert_same_ids(features.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(features.example_indices, expected["overflow_to_sample_mapping"])
    inside = 0
    for row, owner in enumerate(features.example_indices):
        sequence_ids = expected.sequence_ids(row)
        offsets = expected["offset_mapping"][row]
        context = [offset for offset, s in zip(offsets, sequence_ids, strict=True) if s == 1]
        assert features.offsets[row].tolist() == [list(offset) for offset in context]
        if context:
            assert features.context_starts[row] == sequence_ids.index(1)
        wanted = reference_positions(given[owner], offsets, sequence_ids)
        assert tuple(features.answer_positions[row]) == wanted
        inside += wanted != (0, 0)
    assert inside > 200


def test_answer_cut_by_windows_is_labelled_only_where_whole(tokenizer):
    """25,000 characters; windows share 20 tokens, and the answers are shorter or longer."""
    rng = np.random.default_rng(0)
    words = rng.choice(["model", "answer", "window", "of", "the"], 5000)
    context = " ".join(words)[:25_000]
    given = []
    for i in range(300):
        start = int(rng.integers(0, 24_000))
        length = int(rng.integers(1, 40)) if i % 2 else 900
        given.append(
            Question(
                "f", str(i), "Where?", context, [Answer(context[start : start + length], start)]
            )
        )
    features = question_features(given, tokenizer, 128, 20)
    positions = features.answer_positions.reshape(300, -1, 2)
    found = (positions[:, :, 0] > 0).sum(axis=1)
    assert (found[1::2] >= 1).all() and (found[::2] == 0).all()
    # What a row marks is the answer, up to the tokens' own edges.
    for row in np.flatnonzero(features.answer_positions[:, 0])[::7]:
        answer = given[features.example_indices[row]].answers[0]
        first, last = features.answer_positions[row] - features.context_starts[row]
        start, end = features.offsets[row][first, 0], features.offsets[row][last, 1]
        assert start <= answer.start and end >= answer.start + len(answer.text)
        assert answer.text in context[start:end] and end - start < len(answer.text) + 30
    # Every token of the context is in some row.
    covered = np.zeros(len(context), bool)
    for row in np.flatnonzero(features.example_indices == 0):
        covered[features.offsets[row][0, 0] : features.offsets[row][-1, 1]] = True
    assert covered.all()


def test_question_batches_and_too_long_questions(tokenizer):
    given = [
        Question("f:1", "a", "Who?", "The cat sat.", [Answer("cat", 4)]),
        Question("f:2", "b", "Who?", "The cat sat.", []),
        Question("f:3", "c", "Who " * 60, "The cat sat.", []),
    ]
    with pytest.raises(InputError, match=r"1 of 3 rows are bad: f:3: the question has \d+ tokens"):
        question_features(given, tokenizer, 64, 16)
    bad = RowErrors(skip=True)
    features = question_features(given, tokenizer, 64, 16, row_errors=bad)
    batch = features.batch(np.array([0, 1, -1]), 48)
    assert batch["start_positions"][0] > 0 and batch["start_positions"][1] == 0
    assert batch["end_positions"].tolist()[2] == IGNORE_INDEX and batch["weights"].tolist() == [
        1,
        1,
        0,
    ]
    assert batch["start_positions"].dtype == batch["end_positions"].dtype == np.int32
    unknown = [question._replace(answers=None) for question in given[:2]]
    assert "start_positions" not in question_features(unknown, tokenizer).batch(np.array([0]), 64)


def reference_answers(features, logits, n_best_size, longest, version_2, threshold):
    """utils_qa.postprocess_qa_predictions, in other words."""
    for number, question in enumerate(features.examples):
        candidates, null = [], None
        for row in np.flatnonzero(features.example_indices == number):
            length = len(features.input_ids[row])
            start_logits, end_logits = logits[row][:length].T
            first = features.context_starts[row]
            offsets = {first + i: tuple(o) for i, o in enumerate(features.offsets[row].tolist())}
            score = start_logits[0] + end_logits[0]
            null = score if null is None else min(null, score)
            for s in np.argsort(start_logits)[-1 : -n_best_size - 1 : -1]:
                for e in np.argsort(end_logits)[-1 : -n_best_size - 1 : -1]:
                    if s in offsets and e in offsets and s <= e < s + longest:
                        span = offsets[s][0], offsets[e][1]
                        candidates.append((start_logits[s] + end_logits[e], span))
        if version_2:
            candidates.append((null, (0, 0)))
        candidates = sorted(candidates, key=lambda c: c[0], reverse=True)[:n_best_size]
        if version_2 and all(span != (0, 0) for _, span in candidates):
            candidates.append((null, (0, 0)))
        texts = [question.context[a:b] for _, (a, b) in candidates]
        if not any(texts):
            yield "", texts
            continue
        if not version_2:
            yield texts[0], texts
            continue
        best = next(i for i, answer in enumerate(texts) if answer)
        empty = null - candidates[best][0] > threshold
        yield "" if empty else texts[best], texts


@pytest.mark.parametrize("version_2, threshold", [(False, 0.0), (True, 0.0), (True, -2.5)])
def test_predicted_answers_match_run_qa(tokenizer, version_2, threshold):
    rng = np.random.default_rng(3)
    given = [q for q in random_questions(rng, 400, 25) if q.context.strip()]
    features = question_features(given, tokenizer, 48, 4, row_errors=RowErrors(skip=True))
    # Rows are as long as their batch, pads and all.
    logits = [3 * rng.standard_normal((48, 2)) for _ in features.input_ids]
    settings = (5, 6, version_2, threshold)
    found = predict_answers(features, logits, *settings)
    assert [p.id for p in found] == [question.id for question in features.examples]
    empty = 0
    expected = reference_answers(features, logits, *settings)
    for prediction, (answer, texts) in zip(found, expected, strict=True):
        assert prediction.text == answer
        assert [candidate.text for candidate in prediction.candidates] == texts
        if texts:
            total = sum(candidate.probability for candidate in prediction.candidates)
            assert total == pytest.approx(1)
        empty += not answer
    if version_2:
        assert 20 < empty < len(found) - 20

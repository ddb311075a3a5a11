"""Reads questions about a context: SQuAD's JSON (v1.1 and v2.0), or JSON lines.

SQuAD: {"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text",
"answer_start"}], "is_impossible"}]}]}]}. JSON lines, as Hugging Face's datasets export it: objects
with id, question, context and answers {"text": [..], "answer_start": [..]}. A question with no
answers, or marked impossible, cannot be answered from its context (v2.0).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.readers.tables import stream_table, text_problem
from prelnroberta.data.text_chunks import iter_text_chunks
from prelnroberta.errors import InputError


class Answer(NamedTuple):
    """A part of the context, and the index of its first character there."""

    text: str
    start: int


class Question(NamedTuple):
    """`answers` is empty if the context holds no answer, and None if the answers are unknown."""

    location: str
    id: str
    question: str
    context: str
    answers: list[Answer] | None


def read_questions(
    path: str | Path, answered: bool = True, row_errors: RowErrors | None = None
) -> list[Question]:
    """All questions of a file; arguments as of `stream_questions`.

    Raises:
        InputError: as of `stream_questions`; or there are unusable questions and `row_errors` is
            None.
    """
    row_errors, is_owner = ensure_collector(row_errors)
    questions = list(stream_questions(path, row_errors, answered))
    if is_owner:
        row_errors.raise_if_any()
    return questions


def stream_questions(
    path: str | Path, row_errors: RowErrors, answered: bool = True, file: BinaryIO | None = None
) -> Iterator[Question]:
    """Yields questions in the file's order; JSON lines are yielded while reading.

    Args:
        path: `.json` in SQuAD's format, or `.jsonl`; plain or .gz.
        row_errors: collects unusable questions: without text, context or id, with a repeated id,
            or with an answer that is not at its `answer_start`.
        answered: whether answers are required; if False, they are not read.
        file: read instead of `path`, which then is only its name (for example standard input).

    Raises:
        InputError: the file cannot be read, does not have the format, or has no questions.
    """
    path = Path(path).expanduser()
    rows_before = row_errors.num_rows
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix in (".jsonl", ".ndjson"):
        records = _from_lines(path, answered, row_errors, file)
    elif suffix == ".json":
        records = _from_squad(path, row_errors, file)
    else:
        raise InputError(f"{path}: expected .json in SQuAD's format, or .jsonl")
    seen_ids: set[str] = set()
    for location, record in records:
        question, problem = _parse_question(location, record, answered)
        if problem is None and question.id in seen_ids:
            problem = f"id {question.id!r} occurs a second time"
        if problem:
            row_errors.add(location, problem)
        else:
            seen_ids.add(question.id)
            yield question
    if row_errors.num_rows == rows_before:
        raise InputError(f"{path}: no questions")


def _from_squad(
    path: Path, row_errors: RowErrors, file: BinaryIO | None
) -> Iterator[tuple[str, dict]]:
    try:
        content = json.loads("".join(iter_text_chunks(path, file)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise InputError(f"{path}: not SQuAD's format: expected an object with a list 'data'")
    for a, article in enumerate(content["data"]):
        article_location = f"{path}: data[{a}]"
        paragraphs = _list_items(article, "paragraphs", article_location, row_errors)
        for p, paragraph in enumerate(paragraphs):
            location = f"{article_location}.paragraphs[{p}]"
            for q, qa in enumerate(_list_items(paragraph, "qas", location, row_errors)):
                row_errors.count_rows()
                record = qa if isinstance(qa, dict) else {}
                yield f"{location}.qas[{q}]", {**record, "context": paragraph.get("context")}


def _list_items(holder: Any, name: str, location: str, row_errors: RowErrors) -> list:
    """The list under `name`; without a list, adds a problem and returns an empty list."""
    if isinstance(holder, dict) and isinstance(holder.get(name), list):
        return holder[name]
    row_errors.count_rows()
    row_errors.add(location, f"expected an object with a list {name!r}")
    return []


def _from_lines(
    path: Path, answered: bool, row_errors: RowErrors, file: BinaryIO | None
) -> Iterator[tuple[str, dict]]:
    required = ["question", "context", *(["answers"] if answered else [])]
    optional = ["id", "is_impossible"]
    for location, values in stream_table(path, required, row_errors, optional, file=file):
        line = location.rsplit(":", 1)[1]
        answers = values.get("answers")
        if isinstance(answers, dict):
            texts, starts = answers.get("text"), answers.get("answer_start")
            are_lists = isinstance(texts, list) and isinstance(starts, list)
            if are_lists and len(texts) == len(starts):
                answers = [
                    {"text": text, "answer_start": start}
                    for text, start in zip(texts, starts, strict=True)
                ]
        yield location, {"id": line, **values, "answers": answers}


def _parse_question(
    location: str, record: dict, answered: bool
) -> tuple[Question | None, str | None]:
    """(the question, None), or (None, the problem)."""
    for name in ("question", "context"):
        if problem := text_problem(name, record.get(name)):
            return None, problem
    if not isinstance(record.get("id"), str | int):
        return None, "no id"
    question, context = record["question"], record["context"]
    if not question.strip():
        return None, "an empty question"
    if not answered:
        return Question(location, str(record["id"]), question, context, None), None
    answers, problem = _parse_answers(record, context)
    if problem:
        return None, problem
    return Question(location, str(record["id"]), question, context, answers), None


def _parse_answers(record: dict, context: str) -> tuple[list[Answer], str | None]:
    """(the answers, the problem or None)."""
    answers = [] if record.get("is_impossible") else record.get("answers")
    if not isinstance(answers, list):
        return [], "expected a list of answers"
    parsed = []
    for answer in answers:
        text = answer.get("text") if isinstance(answer, dict) else None
        start = answer.get("answer_start") if isinstance(answer, dict) else None
        if not isinstance(text, str) or not isinstance(start, int) or not text:
            return [], "expected answers with 'text' and 'answer_start'"
        found = context[max(start, 0) : max(start, 0) + len(text)]
        if start < 0 or found != text:
            return [], (
                f"answer {text[:40]!r} is not at character {start} of the context, "
                f"found {found[:40]!r}"
            )
        parsed.append(Answer(text, start))
    return parsed, None

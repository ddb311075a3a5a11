"""Questions about a context, from SQuAD's JSON (v1.1 and v2.0) or JSON lines.

SQuAD: {"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text",
"answer_start"}], "is_impossible"}]}]}]}. JSON lines, as Hugging Face's datasets export it: objects
with id, question, context and answers {"text": [..], "answer_start": [..]}. A question without
answers, or marked impossible, is one that the context does not answer (v2.0).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.readers.tables import stream_table, text_problem
from prelnroberta.data.text import iter_text_chunks
from prelnroberta.errors import InputError


class Answer(NamedTuple):
    text: str
    start: int  # character of the context


class Question(NamedTuple):
    """`answers` is empty where the context has none, and None where they are not known."""

    location: str
    id: str
    question: str
    context: str
    answers: list[Answer] | None


def read_questions(
    path: str | Path, answered: bool = True, row_errors: RowErrors | None = None
) -> list[Question]:
    """Every question of a file; arguments as of `stream_questions`.

    Raises:
        InputError: the file's, and bad questions where `bad` is None.
    """
    row_errors, is_owner = ensure_collector(row_errors)
    found = list(stream_questions(path, row_errors, answered))
    if is_owner:
        row_errors.raise_if_any()
    return found


def stream_questions(
    path: str | Path, row_errors: RowErrors, answered: bool = True, file: BinaryIO | None = None
) -> Iterator[Question]:
    """Questions in the file's order, as they are read where the file is JSON lines.

    Args:
        path: `.json` in SQuAD's format, or `.jsonl`, plain or .gz.
        bad: takes questions without text, context or id, ids that came before, and answers that do
            not stand where they are said to.
        answered: whether answers are needed; without, they are not read.
        file: read in the path's place, which is then only a name (standard input, say).

    Raises:
        InputError: the file cannot be read, is no such JSON or has no questions.
    """
    path = Path(path).expanduser()
    before = row_errors.num_rows
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix in (".jsonl", ".ndjson"):
        records = _from_lines(path, answered, row_errors, file)
    elif suffix == ".json":
        records = _from_squad(path, row_errors, file)
    else:
        raise InputError(f"{path}: expected .json in SQuAD's format, or .jsonl")
    count_rows: set[str] = set()
    for location, record in records:
        question, problem = _question(location, record, answered)
        if problem is None and question.id in count_rows:
            problem = f"id {question.id!r} stands there for the second time"
        if problem:
            row_errors.add(location, problem)
        else:
            count_rows.add(question.id)
            yield question
    if row_errors.num_rows == before:
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
        location = f"{path}: data[{a}]"
        for p, paragraph in enumerate(_items(article, "paragraphs", location, row_errors)):
            inside = f"{location}.paragraphs[{p}]"
            for q, qa in enumerate(_items(paragraph, "qas", inside, row_errors)):
                row_errors.count_rows()
                record = qa if isinstance(qa, dict) else {}
                yield f"{inside}.qas[{q}]", {**record, "context": paragraph.get("context")}


def _items(holder: Any, name: str, location: str, row_errors: RowErrors) -> list:
    if isinstance(holder, dict) and isinstance(holder.get(name), list):
        return holder[name]
    row_errors.count_rows()
    row_errors.add(location, f"expected an object with a list {name!r}")
    return []


def _from_lines(
    path: Path, answered: bool, row_errors: RowErrors, file: BinaryIO | None
) -> Iterator[tuple[str, dict]]:
    needed = ["question", "context", *(["answers"] if answered else [])]
    for location, values in stream_table(
        path, needed, row_errors, ["id", "is_impossible"], file=file
    ):
        line = location.rsplit(":", 1)[1]
        answers = values.get("answers")
        if isinstance(answers, dict):
            texts, starts = answers.get("text"), answers.get("answer_start")
            same = isinstance(texts, list) and isinstance(starts, list)
            if same and len(texts) == len(starts):
                answers = [
                    {"text": text, "answer_start": start}
                    for text, start in zip(texts, starts, strict=True)
                ]
        yield location, {"id": line, **values, "answers": answers}


def _question(location: str, record: dict, answered: bool) -> tuple[Question | None, str | None]:
    """The question, or what is wrong with it."""
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
    answers = record.get("answers")
    if record.get("is_impossible"):
        answers = []
    if not isinstance(answers, list):
        return None, "expected a list of answers"
    found = []
    for answer in answers:
        text = answer.get("text") if isinstance(answer, dict) else None
        start = answer.get("answer_start") if isinstance(answer, dict) else None
        if not isinstance(text, str) or not isinstance(start, int) or not text:
            return None, "expected answers with 'text' and 'answer_start'"
        stands = context[max(start, 0) : max(start, 0) + len(text)]
        if start < 0 or stands != text:
            return None, (
                f"answer {text[:40]!r} does not stand at character {start} of the context, "
                f"but {stands[:40]!r}"
            )
        found.append(Answer(text, start))
    return Question(location, str(record["id"]), question, context, found), None

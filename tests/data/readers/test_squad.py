"""Questions in the formats of SQuAD 1.1 and 2.0, and JSON Lines."""

import json

from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.data.readers.squad import Answer, read_questions
from tests.helpers.raw_files import error_message, json_lines


def squad(*qas, context="The cat sat on the mat."):
    return json.dumps(
        {"version": "v2.0", "data": [{"paragraphs": [{"context": context, "qas": qas}]}]}
    )


def qa(name, *answers, **more):
    listed = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": "Who?", "answers": listed, **more}


def test_squad_versions_1_and_2(write):
    path = write(
        "dev.json",
        squad(
            qa("a", ("cat", 4), ("The cat", 0)),
            qa("b", is_impossible=True, plausible_answers=[{"text": "mat", "answer_start": 19}]),
            qa("c"),
        ),
    )
    first, second, third = read_questions(path)
    assert first.answers == [Answer("cat", 4), Answer("The cat", 0)] and first.id == "a"
    assert second.answers == [] and third.answers == []
    assert first.location == f"{path}: data[0].paragraphs[0].qas[0]"
    flat = write(
        "dev.jsonl",
        json_lines(
            {
                "id": "a",
                "question": "Who?",
                "context": "The cat sat.",
                "answers": {"text": ["cat"], "answer_start": [4]},
            },
            {"question": "Why?", "context": "x", "answers": {"text": [], "answer_start": []}},
        ),
    )
    assert [(q.id, q.answers) for q in read_questions(flat)] == [("a", [("cat", 4)]), ("2", [])]
    unanswered = write("ask.json", squad({"id": 7, "question": "Who?"}))
    assert read_questions(unanswered, answered=False)[0].answers is None


def test_bad_questions_raise_with_reason(write):
    rows = [
        qa("good", ("cat", 4)),
        qa("moved", ("cat", 5)),
        qa("outside", ("cat", 400)),
        qa("negative", ("cat", -3)),
        {"id": "x", "answers": []},
        {"question": "Who?", "answers": []},
        qa("good", ("cat", 4)),
        {"id": "y", "question": "Who?"},
        {"id": "z", "question": "Who?", "answers": [{"text": "cat"}]},
        {"id": "e", "question": "  ", "answers": []},
        "no object",
    ]
    path = write("bad.json", squad(*rows))
    bad = RowErrors(skip=True)
    assert [q.id for q in read_questions(path, row_errors=bad)] == ["good"]
    assert bad.num_rows == 11 and len(bad.problems) == 10
    problems = [problem for _, problem in bad.problems.items()]
    assert "answer 'cat' is not at character 5 of the context, found 'at '" in problems[0]
    assert "second time" in problems[5]
    assert "10 of 11 rows are bad" in error_message(read_questions, path)
    assert "no questions" in error_message(read_questions, write("none.json", '{"data": []}'))
    assert "not JSON" in error_message(read_questions, write("cut.json", '{"data": ['))
    assert "not SQuAD's format" in error_message(read_questions, write("other.json", "[1]"))
    assert "expected .json" in error_message(read_questions, write("a.csv", ""))
    holes = write("holes.json", '{"data": [{"title": "x"}, 3]}')
    message = error_message(read_questions, holes)
    assert f"2 of 2 rows are bad: {holes}: data[0]: expected an object with a list" in message

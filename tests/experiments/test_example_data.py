"""Labelled data made of installed documentation: what its labels depend on."""

import csv
from collections import Counter

from experiments.example_data import find_conditions
from prelnroberta.data.pretraining.corpus import Document
from prelnroberta.data.readers.squad import read_questions
from tests.helpers.programs import call
from tests.helpers.task_files import example_file


def test_endings_alone_do_not_reveal_the_answer():
    rows = list(csv.DictReader(example_file("multiple_choice").open(encoding="utf-8")))
    assert len(rows) > 200
    endings = [[row[f"ending{i}"] for i in range(4)] for row in rows]
    assert all(len(set(four)) == 4 for four in endings)
    right = Counter(four[int(row["label"])] for four, row in zip(endings, rows, strict=True))
    shown = Counter(ending for four in endings for ending in four)
    assert set(right.values()) == {1}, "each is right once"
    assert set(shown.values()) == {4} and shown.keys() == right.keys(), "and wrong three times"
    places = Counter(row["label"] for row in rows)
    assert len(places) == 4 and min(places.values()) > len(rows) / 6


def test_question_context_has_several_candidate_sentences():
    text = """Axis to sum over. If None, all of them are. If x, y and z are, then none is.
If negative, it counts from the last, which is -1. Other text."""
    found = list(find_conditions([Document(text, "a")]))
    context = " ".join(text.split())
    answers = ["all of them are", "it counts from the last, which is -1"]
    assert [(c, q, a) for c, q, a, _ in found] == [
        (context, "What happens if None?", answers[0]),
        (context, "What happens if negative?", answers[1]),
    ]
    assert [start for *_, start in found] == [context.index(answer) for answer in answers]

    assert not list(find_conditions([Document("If None, all of them are.", "a")])), (
        "nothing to choose"
    )
    twice = "If None, all of them are. Axis. If None, it is the last."
    assert not list(find_conditions([Document(twice, "a")])), "two answers"
    far = f"{'A long sentence. ' * 20}If None, all of them are. {'A long sentence. ' * 20}"
    [(context, *_)] = find_conditions([Document(far.strip(), "a")])
    assert len(context) <= 180 and context.startswith("If None")


def test_answers_are_unique_and_verbatim():
    questions = read_questions(example_file("question_answering"))
    assert len(questions) > 100
    for question in questions:
        [answer] = question.answers
        before = question.context[: answer.start].removesuffix("then ").lower()
        condition = question.question.removeprefix("What happens ").removesuffix("?").lower()
        assert before.endswith(f"{condition}, ")


def test_pretraining_text_contains_no_dev_examples(tmp_path):
    done = call("example_data", f"--output={tmp_path / 'data'}", "--train_examples=50")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "language_modeling"
    read = folder.joinpath("pretraining.txt").read_text(encoding="utf-8")
    for text in folder.joinpath("train.txt").read_text(encoding="utf-8").split("\n\n"):
        assert text.strip() in read
    known = set(read.split("\n\n"))
    dev = folder.joinpath("dev.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert len(dev) >= 1000 and not known & set(dev)

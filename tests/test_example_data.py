"""Labelled data from the installed documentation: what its labels rest on."""

import csv
from collections import Counter

from support import call
from task_support import example_file


def test_an_ending_read_alone_tells_nothing():
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


def test_what_a_model_may_read_before_holds_nothing_of_dev(tmp_path):
    done = call("example_data", f"--output={tmp_path / 'data'}", "--train_examples=50")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "language_modeling"
    read = folder.joinpath("pretraining.txt").read_text(encoding="utf-8")
    for text in folder.joinpath("train.txt").read_text(encoding="utf-8").split("\n\n"):
        assert text.strip() in read
    known = set(read.split("\n\n"))
    dev = folder.joinpath("dev.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert len(dev) >= 1000 and not known & set(dev)

"""Multiple choice in the columns of SWAG, and JSON Lines."""

from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.data.readers.swag import MAX_CHOICES, read_choices
from tests.helpers.raw_files import error_message, json_lines, lines


def test_swag_columns_with_any_number_of_choices(write):
    header = "video-id,sent1,sent2,ending0,ending1,ending2,label"
    path = write("swag.csv", lines(header, "1,He walks.,He,sits.,runs.,flies.,2", "2,A,B,c,d,,0"))
    three, two = read_choices(path)
    assert three == (f"{path}:2", "He walks.", "He", ["sits.", "runs.", "flies."], 2)
    assert two.choices == ["c", "d"] and two.label == 0
    assert read_choices(path, label=None)[0].label is None
    lists = write(
        "mc.jsonl",
        json_lines(
            {"sent1": "A", "endings": ["b", "c", "d", "e", "f"], "label": 4},
            {"sent1": "A", "sent2": "so", "endings": ["b", "c"], "label": "1"},
            {"sent1": "A", "ending0": "b", "ending1": "c", "label": 0},
        ),
    )
    found = read_choices(lists)
    assert [len(e.choices) for e in found] == [5, 2, 2]
    assert [e.prefix for e in found] == ["", "so", ""] and [e.label for e in found] == [4, 1, 0]


def test_bad_choices_raise_with_reason(write):
    def row(label=0, **more):
        return {"sent1": "A", "label": label, **more}

    path = write(
        "mc.jsonl",
        json_lines(
            row(endings=["b", "c"]),
            row(endings=["b", "c"], label=2),
            row(endings=["b", "c"], label=-1),
            row(endings=["b", "c"], label=True),
            row(endings=["b"]),
            row(endings=["b"] * (MAX_CHOICES + 1)),
            row(endings="b c"),
            row(endings=["b", 3]),
            row(ending0="b", ending2="c"),
            row(),
            {"sent1": "A", "endings": ["b", "c"]},
            row(**{f"ending{i}": "b" for i in range(MAX_CHOICES + 5)}),
        ),
    )
    bad = RowErrors(skip=True)
    assert len(read_choices(path, row_errors=bad)) == 1
    assert bad.num_rows == 12
    problems = {int(place.rsplit(":", 1)[1]): problem for place, problem in bad.problems.items()}
    assert sorted(problems) == list(range(2, 13))
    assert problems[2] == "label 2 is not among its 2 choices, 0 to 1"
    assert "expected the number of a choice" in problems[3]
    assert problems[6] == problems[12] == "expected 2 to 32 choices, found 33"
    assert problems[9] == "choices are missing among ending0, ending2"
    assert problems[11] == "no key 'label' among 'sent1', 'endings'"
    assert "no column 'label'" in error_message(
        read_choices, write("a.csv", "sent1,ending0\na,b\n")
    )

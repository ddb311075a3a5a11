"""CSV, TSV, text and JSON Lines tables."""

import csv

from hypothesis import given, settings
from hypothesis import strategies as st

from prelnroberta.data.readers.classification import read_text_examples
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.data.readers.tables import read_table
from tests.helpers.raw_files import error_message, json_lines, lines


def test_tsv_ignores_quotes_and_accepts_bom_and_crlf(write):
    path = write(
        "dev.tsv",
        '\ufeffindex\tsentence\tlabel\r\n0\tthe 5" disk "spins\t1\r\n1\t"unbalanced\t0\r\n\r\n',
    )
    records = read_table(path, ["sentence", "label"])
    assert [r.values for r in records] == [
        {"sentence": 'the 5" disk "spins', "label": "1"},
        {"sentence": '"unbalanced', "label": "0"},
    ]
    assert [r.location for r in records] == [f"{path}:2", f"{path}:3"]


def test_files_without_a_header_have_numbered_columns(write):
    """CoLA's train.tsv, and STS-B as CSV."""
    cola = write("train.tsv", "gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\tThe the.\n")
    examples = read_text_examples(cola, text=3, label=1)
    assert [(e.text, e.label) for e in examples] == [
        ("Our friends won't buy this.", "1"),
        ("The the.", "0"),
    ]
    stsb = write("sts.csv", 'A plane.,"An air, plane.",5.0\n')
    (example,) = read_text_examples(stsb, text=0, pair=1, label=2)
    assert example == (f"{stsb}:1", "A plane.", "An air, plane.", "5.0")
    named = write("numbered.csv", "text,label\na,1\n")
    assert len(read_text_examples(named, text=0, label=1, header=True)) == 1
    assert "no column 2; the file has columns 0, 1" in error_message(read_table, named, [0, 2])


def test_csv_quoted_fields(write):
    path = write("a.csv.gz", 'text,label\n"one, ""two""\nthree",x\r\n\nfour,y\n')
    records = read_table(path, ["text", "label"])
    assert [r.values["text"] for r in records] == ['one, "two"\nthree', "four"]
    assert [r.location for r in records] == [f"{path}:2", f"{path}:5"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(
            st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"])),
            min_size=3,
            max_size=3,
        ),
        min_size=1,
        max_size=5,
    )
)
def test_csv_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["a", "b", "c"], *rows])
    found = read_table(path, ["a", "b", "c"])
    assert [list(record.values.values()) for record in found] == rows


def test_row_of_empty_cells_is_read(write):
    for name, row in (("a.csv", ","), ("a.tsv", "\t")):
        path = write(name, lines("text,label".replace(",", row), row, "", f"a{row}b"))
        assert [list(r.values.values()) for r in read_table(path, ["text", "label"])] == [
            ["", ""],
            ["a", "b"],
        ]


def test_long_fields_are_read_without_changing_the_csv_limit(write):
    limit = csv.field_size_limit()
    path = write("long.csv", f'text,label\n"{"word " * 60_000}",1\n')
    assert len(read_table(path, ["text"])[0].values["text"]) == 300_000
    assert csv.field_size_limit() == limit


def test_bad_rows_raise_with_line_numbers(write):
    path = write("a.tsv", lines("text\tlabel", *["fine\t1"] * 5, "short", "a\tb\tc", "fine\t0"))
    message = error_message(read_table, path, ["text", "label"])
    assert message.startswith(
        f"2 of 8 rows are bad: {path}:7: expected 2 columns as in the header, found 1; "
        f"{path}:8: expected 2 columns as in the header, found 3"
    )
    bad = RowErrors(skip=True)
    assert len(read_table(path, ["text", "label"], row_errors=bad)) == 6
    bad.raise_if_any()
    assert bad.num_rows == 8 and len(bad.problems) == 2 and "2 of 8 rows" in bad.summary

    many = write("many.tsv", lines("text\tlabel", *["short"] * 1200))
    message = error_message(read_table, many, ["text"])
    assert "1,200 of 1,200 rows" in message and "and 1,195 more" in message


def test_unclosed_quote_is_reported_and_reading_continues(write):
    inside = write("a.csv", 'text,label\n"good",1\n"bad" tail,0\ngood,1\n')
    bad = RowErrors(skip=True)
    assert [r.values["text"] for r in read_table(inside, ["text"], row_errors=bad)] == [
        "good",
        "good",
    ]
    assert list(bad.problems) == [f"{inside}:3"] and bad.num_rows == 3
    # What it swallows may be good rows: that is never skipped.
    for tail in ("", '"x" y,2\n'):
        open_ = write("b.csv", 'text,label\ngood,1\n"never closed,0\nswallowed,1\n' + tail)
        message = error_message(read_table, open_, ["text"], row_errors=RowErrors(skip=True))
        assert (
            f"{open_}:3: a quotation mark out of place" in message
            and "goes on to line 5" in message
        )


def test_table_without_rows_or_columns_raises(write):
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        assert "no rows" in error_message(read_table, write(name, ""), ["text"])
    assert "no rows" in error_message(read_table, write("header.csv", "text,label\n"), ["text"])
    path = write("b.csv", "sentence,label\na,1\n")
    message = error_message(read_table, path, ["text", "pair", "label"])
    assert "no column 'text', 'pair'; the file has columns sentence, label" in message
    twice = write("c.csv", "text,text\na,b\n")
    assert "more than once" in error_message(read_table, twice, ["text"])
    assert "expected a file named" in error_message(read_table, write("d.xlsx", ""), ["text"])
    assert "cannot be read" in error_message(read_table, path.parent / "none.csv", ["text"])
    latin = write("e.csv", "text\ncaf\xe9\n".encode("latin-1"))
    assert "not UTF-8 at byte 8" in error_message(read_table, latin, ["text"])


def test_json_lines_tables(write):
    path = write(
        "a.jsonl",
        json_lines(
            {"text": "a", "label": 1},
            "{broken",
            ["a", "list"],
            {"label": 0},
            "",
            {"text": None, "label": 1},
            {"text": "b", "label": None},
            {"text": "\ud800", "label": 1},
            {"text": "c", "label": True},
        ),
    )
    bad = RowErrors(skip=True)
    examples = read_text_examples(path, text="text", label="label", row_errors=bad)
    assert [(e.location, e.text, e.label) for e in examples] == [
        (f"{path}:1", "a", 1),
        (f"{path}:9", "c", True),
    ]
    problems = {int(place.rsplit(":", 1)[1]): problem for place, problem in bad.problems.items()}
    assert bad.num_rows == 8 and list(problems) == [2, 3, 4, 6, 7, 8]
    assert "not a line of JSON" in problems[2] and "expected a JSON object" in problems[3]
    assert problems[4] == "no key 'text' among 'label'"
    assert problems[6] == "expected text under 'text', found null"
    assert problems[7] == "no label under 'label'" and "surrogate" in problems[8]
    assert "have keys, not numbers" in error_message(read_table, path, [0])

"""Bad rows are collected over files and reported together."""

from prelnroberta.data.readers.classification import read_text_examples
from prelnroberta.data.readers.row_errors import RowErrors
from tests.helpers.raw_files import error_message


def test_row_errors_of_several_files_are_reported_together(write):
    first = write("a.tsv", "text\tlabel\nx\n")
    second = write("b.tsv", "text\tlabel\ny\nfine\t1\n")
    bad = RowErrors()
    read_text_examples(first, text="text", label="label", row_errors=bad)
    read_text_examples(second, text="text", label="label", row_errors=bad)
    message = error_message(bad.raise_if_any)
    assert "2 of 3 rows are bad" in message and str(first) in message and str(second) in message
    assert RowErrors().summary == "0 of 0 rows are bad"

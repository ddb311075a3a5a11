"""Examples of sequence classification: texts, pairs and labels."""

from prelnroberta.data.readers.classification import read_text_examples
from prelnroberta.data.readers.row_errors import RowErrors
from tests.helpers.raw_files import error_message


def test_labels_in_several_columns(write):
    path = write("toxic.csv", "text,rude,loud\na,1,0\nb,0,0\nc,1.0,true\nd,2,0\n")
    bad = RowErrors(skip=True)
    examples = read_text_examples(path, text="text", label=["rude", "loud"], row_errors=bad)
    assert [e.label for e in examples] == [["rude"], [], ["rude", "loud"]]
    assert bad.problems == {f"{path}:5": "expected 0 or 1 under 'rude', found '2'"}


def test_text_files_have_one_text_per_line(write):
    path = write("a.txt", 'one\ttab, "quote\n\n two \n')
    assert [e.text for e in read_text_examples(path, text="text")] == ['one\ttab, "quote', " two "]
    assert len(read_text_examples(path, text=0)) == 2
    assert "no column 'label'" in error_message(
        read_text_examples, path, text="text", label="label"
    )

"""All readers: streams are read as they arrive, and any content is read or reported."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelnroberta.data.readers.classification import read_text_examples, stream_text_examples
from prelnroberta.data.readers.conll import read_sentences, stream_sentences
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.data.readers.squad import read_questions, stream_questions
from prelnroberta.data.readers.swag import read_choices, stream_choices
from prelnroberta.data.readers.tables import stream_table
from prelnroberta.errors import InputError
from tests.helpers.raw_files import CountingStream, json_lines


def test_streams_yield_rows_as_they_arrive():
    data = "".join(f"line {i}\n" for i in range(500_000)).encode()
    source = CountingStream(data)
    bad = RowErrors()
    examples = stream_text_examples("stdin.txt", "text", bad, file=source)
    assert next(examples) == ("stdin.txt:1", "line 0", None, None)
    assert source.given < len(data) / 4, "not read to the end"
    assert sum(1 for _ in examples) == 499_999 == bad.num_rows - 1
    assert not source.closed, "the caller's to close"

    rows = json_lines({"text": "a", "tokens": ["a"]}, {"text": 3, "tokens": []}).encode()
    bad = RowErrors(skip=True)
    named = list(
        stream_text_examples("in.jsonl.gz", "text", bad, file=CountingStream(gzip.compress(rows)))
    )
    assert [e.text for e in named] == ["a"] and list(bad.problems) == ["in.jsonl.gz:2"]
    bad = RowErrors(skip=True)
    words = list(stream_sentences("in.jsonl", bad, tagged=False, file=CountingStream(rows)))
    assert [s.words for s in words] == [["a"]] and words[0].tags is None
    columns = list(stream_sentences("-", bad, file=CountingStream(b"EU I-ORG\nsaid O\n")))
    assert columns[0].tags == ["I-ORG", "O"], "as they stand: one sentence tells no scheme"
    asked = json_lines({"question": "Who?", "context": "x"}).encode()
    (question,) = stream_questions("in.jsonl", bad, answered=False, file=CountingStream(asked))
    assert question.answers is None and question.id == "1"
    choice = json_lines({"sent1": "a", "endings": ["b", "c"]}).encode()
    (example,) = stream_choices("in.jsonl", bad, label=None, file=CountingStream(choice))
    assert example.choices == ["b", "c"] and example.location == "in.jsonl:1"
    (csv_row,) = stream_table("in.csv", ["a"], bad, file=CountingStream(b"\xef\xbb\xbfa,b\n1,2\n"))
    assert csv_row.values == {"a": "1"}


KEYS = ["text", "label", "tokens", "ner_tags", "question", "context", "answers", "id", "sent1"]
KEYS += ["sent2", "endings", "ending0", "ending1", "answer_start", "data", "paragraphs", "qas"]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
    ),
    max_leaves=20,
)
CONTENTS = (
    st.binary(max_size=80)
    | st.text('ab,"\t\n\r |-OBI1.#{}[]:\ufeff', max_size=80).map(str.encode)
    | st.lists(JSON_VALUES, max_size=4).map(
        lambda rows: json_lines(*map(json.dumps, rows)).encode()
    )
    | JSON_VALUES.map(lambda value: json.dumps({"data": [value, value]}).encode())
)
READERS = {
    ".csv": lambda path, bad: read_text_examples(path, 0, label=1, row_errors=bad),
    ".tsv": lambda path, bad: read_text_examples(path, "a", label="b", row_errors=bad),
    ".txt": lambda path, bad: read_text_examples(path, 0, row_errors=bad),
    ".jsonl": lambda path, bad: read_text_examples(path, "text", label="label", row_errors=bad),
    "words.jsonl": lambda path, bad: read_sentences(path, row_errors=bad).examples,
    ".conll": lambda path, bad: read_sentences(path, row_errors=bad).examples,
    ".conllu": lambda path, bad: read_sentences(path, row_errors=bad).examples,
    ".json": lambda path, bad: read_questions(path, row_errors=bad),
    "asked.jsonl": lambda path, bad: read_questions(path, row_errors=bad),
    "mc.jsonl": lambda path, bad: read_choices(path, row_errors=bad),
    "mc.csv": lambda path, bad: read_choices(path, row_errors=bad),
}


@pytest.mark.parametrize("name", READERS)
def test_any_content_is_read_or_reported_row_by_row(name, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / f"file{name}"

    @settings(max_examples=80, deadline=None)
    @given(CONTENTS)
    def check(content):
        path.write_bytes(content)
        bad = RowErrors(skip=True)
        try:
            found = READERS[name](path, bad)
        except InputError as error:
            assert str(path) in str(error)
            return
        assert len(found) + len(bad.problems) == bad.num_rows > 0, "lost, or counted twice"
        assert all(str(path) in place for place in bad.problems)

    check()

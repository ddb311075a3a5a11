"""What people have in their files is read; what cannot be is named with its place, and counted."""

import csv
import gzip
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelnroberta.data.readers.classification import read_examples, stream_examples
from prelnroberta.data.readers.conll import read_sentences, stream_sentences, tag_names
from prelnroberta.data.readers.labels import LabelIds, discover_labels, label_name
from prelnroberta.data.readers.row_errors import BadRows
from prelnroberta.data.readers.squad import Answer, read_questions, stream_questions
from prelnroberta.data.readers.swag import MOST_CHOICES, read_choices, stream_choices
from prelnroberta.data.readers.tables import read_table, stream_table
from prelnroberta.errors import InputError


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def refused(function, *arguments, **named):
    """The message of the refusal, which is one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message
    return message


def lines(*rows):
    return "".join(f"{row}\n" for row in rows)


def json_lines(*rows):
    return lines(*(row if isinstance(row, str) else json.dumps(row) for row in rows))


# ---------------------------------------------------------------------------------------------
# Tables.


def test_glue_tsv_has_no_quotes_and_may_have_a_mark_and_crlf(write):
    path = write(
        "dev.tsv",
        '\ufeffindex\tsentence\tlabel\r\n0\tthe 5" disk "spins\t1\r\n1\t"unbalanced\t0\r\n\r\n',
    )
    records = read_table(path, ["sentence", "label"])
    assert [r.values for r in records] == [
        {"sentence": 'the 5" disk "spins', "label": "1"},
        {"sentence": '"unbalanced', "label": "0"},
    ]
    assert [r.place for r in records] == [f"{path}:2", f"{path}:3"]


def test_files_without_a_header_have_numbered_columns(write):
    """CoLA's train.tsv, and STS-B as CSV."""
    cola = write("train.tsv", "gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\tThe the.\n")
    examples = read_examples(cola, text=3, label=1)
    assert [(e.text, e.label) for e in examples] == [
        ("Our friends won't buy this.", "1"),
        ("The the.", "0"),
    ]
    stsb = write("sts.csv", 'A plane.,"An air, plane.",5.0\n')
    (example,) = read_examples(stsb, text=0, pair=1, label=2)
    assert example == (f"{stsb}:1", "A plane.", "An air, plane.", "5.0")
    named = write("numbered.csv", "text,label\na,1\n")
    assert len(read_examples(named, text=0, label=1, header=True)) == 1
    assert "no column 2; the file has columns 0, 1" in refused(read_table, named, [0, 2])


def test_csv_quotes_enclose_anything(write):
    path = write("a.csv.gz", 'text,label\n"one, ""two""\nthree",x\r\n\nfour,y\n')
    records = read_table(path, ["text", "label"])
    assert [r.values["text"] for r in records] == ['one, "two"\nthree', "four"]
    assert [r.place for r in records] == [f"{path}:2", f"{path}:5"]


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
def test_csv_gives_back_what_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["a", "b", "c"], *rows])
    found = read_table(path, ["a", "b", "c"])
    assert [list(record.values.values()) for record in found] == rows


def test_a_row_of_empty_cells_is_a_row(write):
    for name, row in (("a.csv", ","), ("a.tsv", "\t")):
        path = write(name, lines("text,label".replace(",", row), row, "", f"a{row}b"))
        assert [list(r.values.values()) for r in read_table(path, ["text", "label"])] == [
            ["", ""],
            ["a", "b"],
        ]


def test_long_fields_are_read_and_the_process_is_left_alone(write):
    limit = csv.field_size_limit()
    path = write("long.csv", f'text,label\n"{"word " * 60_000}",1\n')
    assert len(read_table(path, ["text"])[0].values["text"]) == 300_000
    assert csv.field_size_limit() == limit


def test_bad_rows_are_all_named_with_their_number(write):
    path = write("a.tsv", lines("text\tlabel", *["fine\t1"] * 5, "short", "a\tb\tc", "fine\t0"))
    message = refused(read_table, path, ["text", "label"])
    assert message.startswith(
        f"2 of 8 rows are bad: {path}:7: expected 2 columns as in the header, found 1; "
        f"{path}:8: expected 2 columns as in the header, found 3"
    )
    bad = BadRows(skip=True)
    assert len(read_table(path, ["text", "label"], bad=bad)) == 6
    bad.settle()
    assert bad.total == 8 and len(bad.bad) == 2 and "2 of 8 rows" in bad.summary

    many = write("many.tsv", lines("text\tlabel", *["short"] * 1200))
    message = refused(read_table, many, ["text"])
    assert "1,200 of 1,200 rows" in message and "and 1,195 more" in message


def test_a_quote_that_never_closes_is_found_and_reading_goes_on(write):
    inside = write("a.csv", 'text,label\n"good",1\n"bad" tail,0\ngood,1\n')
    bad = BadRows(skip=True)
    assert [r.values["text"] for r in read_table(inside, ["text"], bad=bad)] == ["good", "good"]
    assert list(bad.bad) == [f"{inside}:3"] and bad.total == 3
    # What it swallows may be good rows: that is never skipped.
    for tail in ("", '"x" y,2\n'):
        open_ = write("b.csv", 'text,label\ngood,1\n"never closed,0\nswallowed,1\n' + tail)
        message = refused(read_table, open_, ["text"], bad=BadRows(skip=True))
        assert (
            f"{open_}:3: a quotation mark out of place" in message
            and "goes on to line 5" in message
        )


def test_a_table_without_rows_or_columns_is_refused(write):
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        assert "no rows" in refused(read_table, write(name, ""), ["text"])
    assert "no rows" in refused(read_table, write("header.csv", "text,label\n"), ["text"])
    path = write("b.csv", "sentence,label\na,1\n")
    message = refused(read_table, path, ["text", "pair", "label"])
    assert "no column 'text', 'pair'; the file has columns sentence, label" in message
    twice = write("c.csv", "text,text\na,b\n")
    assert "more than once" in refused(read_table, twice, ["text"])
    assert "expected a file named" in refused(read_table, write("d.xlsx", ""), ["text"])
    assert "cannot be read" in refused(read_table, path.parent / "none.csv", ["text"])
    latin = write("e.csv", "text\ncaf\xe9\n".encode("latin-1"))
    assert "not UTF-8 at byte 8" in refused(read_table, latin, ["text"])


def test_json_lines(write):
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
    bad = BadRows(skip=True)
    examples = read_examples(path, text="text", label="label", bad=bad)
    assert [(e.place, e.text, e.label) for e in examples] == [
        (f"{path}:1", "a", 1),
        (f"{path}:9", "c", True),
    ]
    problems = {int(place.rsplit(":", 1)[1]): problem for place, problem in bad.bad.items()}
    assert bad.total == 8 and list(problems) == [2, 3, 4, 6, 7, 8]
    assert "not a line of JSON" in problems[2] and "expected a JSON object" in problems[3]
    assert problems[4] == "no key 'text' among 'label'"
    assert problems[6] == "expected text under 'text', found null"
    assert problems[7] == "no label under 'label'" and "surrogate" in problems[8]
    assert "have keys, not numbers" in refused(read_table, path, [0])


def test_labels_in_several_columns(write):
    path = write("toxic.csv", "text,rude,loud\na,1,0\nb,0,0\nc,1.0,true\nd,2,0\n")
    bad = BadRows(skip=True)
    examples = read_examples(path, text="text", label=["rude", "loud"], bad=bad)
    assert [e.label for e in examples] == [["rude"], [], ["rude", "loud"]]
    assert bad.bad == {f"{path}:5": "expected 0 or 1 under 'rude', found '2'"}


def test_label_names():
    assert discover_labels(["10", "9", 2]) == ("2", "9", "10")
    assert discover_labels(["b", " a", "b"]) == ("a", "b")
    assert label_name(True) == "true" and label_name(1) == "1"
    assert "no labels" in refused(discover_labels, [])
    ids = LabelIds(["neg", "pos"])
    assert [ids.find(label) for label in ("pos", 0, "1")] == [1, 0, 1]
    assert ids.find(2) == "label '2' is not among the 2 labels neg, pos"
    assert LabelIds(["1", "0"]).find(1) == 0, "names that are numbers are names"
    assert "expected different names" in refused(LabelIds, ["a", "a"])


# ---------------------------------------------------------------------------------------------
# CoNLL.


def test_conll_2003_with_documents_and_iob1(write):
    path = write(
        "eng.train",
        lines(
            "-DOCSTART- -X- -X- O",
            "",
            "EU NNP I-NP I-ORG",
            "rejects VBZ I-VP O",
            "German JJ I-NP I-MISC",
            "Boers NN I-NP B-MISC",
            "",
            "",
            "-DOCSTART- -X- -X- O",
            "",
            "Peter NNP I-NP I-PER",
            "Blackburn NNP I-NP I-PER",
        ),
    )
    found = read_sentences(path)
    assert found.scheme == "IOB1" and found.repaired == 0
    first, second = found.examples
    assert first.words == ["EU", "rejects", "German", "Boers"]
    assert first.tags == ["B-ORG", "O", "B-MISC", "B-MISC"]
    assert second.tags == ["B-PER", "I-PER"]
    assert [first.document, second.document] == [1, 2]
    assert [first.place, second.place] == [f"{path}:3", f"{path}:11"]
    names = ("O", "B-MISC", "I-MISC", "B-ORG", "I-ORG", "B-PER", "I-PER")
    assert tag_names(found.examples) == names
    chunks = read_sentences(path, tag=2)
    assert chunks.scheme == "IOB1" and chunks.examples[1].tags == ["B-NP", "I-NP"]
    words = read_sentences(path, tagged=False)
    assert words.scheme is None and words.examples[0].tags is None


def test_wnut_is_tab_separated_with_hashes_and_blank_lines_of_tabs(write):
    path = write("wnut.conll", "#photography\tO\n\u3000\x0b a\tO\n\t\nRick\tB-creative-work\r\n")
    found = read_sentences(path)
    assert [s.words for s in found.examples] == [["#photography", "a"], ["Rick"]]
    assert found.scheme == "IOB2"


def test_bioes_and_bilou_become_iob2_and_what_breaks_them_is_counted(write):
    good = lines("a S-X", "b B-Y", "c I-Y", "d E-Y", "e O", "")
    path = write("bioes.conll", good + lines("a I-X", "b E-X", "", "c B-X", "d O"))
    found = read_sentences(path)
    assert found.scheme == "IOBES" and found.repaired == 2
    assert [s.tags for s in found.examples] == [
        ["B-X", "B-Y", "I-Y", "I-Y", "O"],
        ["B-X", "I-X"],
        ["B-X", "O"],
    ]
    bilou = write("bilou.conll", good.replace("S-", "U-").replace("E-", "L-"))
    found = read_sentences(bilou)
    assert (found.scheme, found.repaired) == ("IOBES", 0)
    assert found.examples[0].tags == ["B-X", "B-Y", "I-Y", "I-Y", "O"]


def test_conllu_takes_syntactic_words(write):
    def row(number, form, tag):
        return f"{number}\t{form}\t_\t{tag}" + "\t_" * 6

    text = lines(
        "# newdoc",
        "# text = vámonos al mar",
        row("1-2", "vámonos", "_"),
        row("1", "vamos", "VERB"),
        row("2", "nos", "PRON"),
        row("3-4", "al", "_"),
        row("3", "a", "ADP"),
        row("4", "el", "DET"),
        row("4.1", "gran", "ADJ"),
        row("5", "# mar", "NOUN"),
    )
    path = write("es.conllu", text)
    (sentence,) = read_sentences(path).examples
    assert sentence.words == ["vamos", "nos", "a", "el", "# mar"]
    assert sentence.tags == ["VERB", "PRON", "ADP", "DET", "NOUN"]
    assert sentence.document == 1
    assert tag_names([sentence]) == ("ADP", "DET", "NOUN", "PRON", "VERB")
    broken = write("bad.conllu", text + "\n1\tword\tNOUN\n\n" + row("x", "a", "DET") + "\n")
    message = refused(read_sentences, broken)
    assert f"2 of 3 rows are bad: {broken}:12: expected 10 columns, found 3" in message
    assert f"{broken}:14: 'x' is no id of a word" in message


def test_bad_sentences_go_whole_and_are_counted(write):
    path = write(
        "a.conll", lines("good\tO", "", "one\tO", "two", "three\tO", "", "\tO", "", "x\tO")
    )
    message = refused(read_sentences, path)
    assert f"2 of 4 rows are bad: {path}:4: expected at least 2 columns, found 1" in message
    assert f"{path}:7: no word in column 0" in message
    bad = BadRows(skip=True)
    assert [s.words for s in read_sentences(path, bad=bad).examples] == [["good"], ["x"]]
    assert "no sentences" in refused(read_sentences, write("empty.conll", "\n\n"))
    assert "expected numbers" in refused(read_sentences, path, word="form")


def test_sentences_as_json_lines(write):
    path = write(
        "a.jsonl",
        json_lines(
            {"tokens": ["EU", "rejects"], "ner_tags": ["I-ORG", "O"]},
            {"tokens": ["a", "b"], "ner_tags": ["O"]},
            {"tokens": [], "ner_tags": []},
            {"tokens": ["a", ""], "ner_tags": ["O", "O"]},
            {"tokens": "a b", "ner_tags": ["O", "O"]},
            {"tokens": ["\ud800"], "ner_tags": ["O"]},
        ),
    )
    bad = BadRows(skip=True)
    found = read_sentences(path, bad=bad)
    assert found.scheme == "IOB1" and found.examples[0].tags == ["B-ORG", "O"]
    assert bad.total == 6 and len(bad.bad) == 5
    assert bad.bad[f"{path}:2"] == "expected 2 tags under 'ner_tags', found 1 tags"
    numbers = write("b.jsonl", json_lines({"tokens": ["a", "b"], "ner_tags": [0, 3]}))
    assert read_sentences(numbers).examples[0].tags == ["0", "3"]


# ---------------------------------------------------------------------------------------------
# SQuAD.


def squad(*qas, context="The cat sat on the mat."):
    return json.dumps(
        {"version": "v2.0", "data": [{"paragraphs": [{"context": context, "qas": qas}]}]}
    )


def qa(name, *answers, **more):
    listed = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": "Who?", "answers": listed, **more}


def test_squad_of_both_versions(write):
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
    assert first.place == f"{path}: data[0].paragraphs[0].qas[0]"
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


def test_bad_questions_are_named(write):
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
    bad = BadRows(skip=True)
    assert [q.id for q in read_questions(path, bad=bad)] == ["good"]
    assert bad.total == 11 and len(bad.bad) == 10
    problems = [problem for _, problem in bad.bad.items()]
    assert "answer 'cat' does not stand at character 5 of the context, but 'at '" in problems[0]
    assert "second time" in problems[5]
    assert "10 of 11 rows are bad" in refused(read_questions, path)
    assert "no questions" in refused(read_questions, write("none.json", '{"data": []}'))
    assert "not JSON" in refused(read_questions, write("cut.json", '{"data": ['))
    assert "not SQuAD's format" in refused(read_questions, write("other.json", "[1]"))
    assert "expected .json" in refused(read_questions, write("a.csv", ""))
    holes = write("holes.json", '{"data": [{"title": "x"}, 3]}')
    message = refused(read_questions, holes)
    assert f"2 of 2 rows are bad: {holes}: data[0]: expected an object with a list" in message


# ---------------------------------------------------------------------------------------------
# Choices.


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


def test_bad_choices_are_named(write):
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
            row(endings=["b"] * (MOST_CHOICES + 1)),
            row(endings="b c"),
            row(endings=["b", 3]),
            row(ending0="b", ending2="c"),
            row(),
            {"sent1": "A", "endings": ["b", "c"]},
            row(**{f"ending{i}": "b" for i in range(MOST_CHOICES + 5)}),
        ),
    )
    bad = BadRows(skip=True)
    assert len(read_choices(path, bad=bad)) == 1
    assert bad.total == 12
    problems = {int(place.rsplit(":", 1)[1]): problem for place, problem in bad.bad.items()}
    assert sorted(problems) == list(range(2, 13))
    assert problems[2] == "label 2 is not among its 2 choices, 0 to 1"
    assert "expected the number of a choice" in problems[3]
    assert problems[6] == problems[12] == "expected 2 to 32 choices, found 33"
    assert problems[9] == "choices are missing among ending0, ending2"
    assert problems[11] == "no key 'label' among 'sent1', 'endings'"
    assert "no column 'label'" in refused(read_choices, write("a.csv", "sent1,ending0\na,b\n"))


def test_one_collector_over_several_files_tells_all_at_once(write):
    first = write("a.tsv", "text\tlabel\nx\n")
    second = write("b.tsv", "text\tlabel\ny\nfine\t1\n")
    bad = BadRows()
    read_examples(first, text="text", label="label", bad=bad)
    read_examples(second, text="text", label="label", bad=bad)
    message = refused(bad.settle)
    assert "2 of 3 rows are bad" in message and str(first) in message and str(second) in message
    assert BadRows().summary == "0 of 0 rows are bad"


# ---------------------------------------------------------------------------------------------
# Streams.


class Slow(io.RawIOBase):
    """Standard input: bytes that are read once, and how many were."""

    def __init__(self, data):
        self.data, self.given = io.BytesIO(data), 0

    def readable(self):
        return True

    def read(self, size=-1):
        chunk = self.data.read(size)
        self.given += len(chunk)
        return chunk


def test_rows_come_as_they_are_read_from_any_stream():
    data = "".join(f"line {i}\n" for i in range(500_000)).encode()
    source = Slow(data)
    bad = BadRows()
    examples = stream_examples("stdin.txt", "text", bad, file=source)
    assert next(examples) == ("stdin.txt:1", "line 0", None, None)
    assert source.given < len(data) / 4, "not read to the end"
    assert sum(1 for _ in examples) == 499_999 == bad.total - 1
    assert not source.closed, "the caller's to close"

    rows = json_lines({"text": "a", "tokens": ["a"]}, {"text": 3, "tokens": []}).encode()
    bad = BadRows(skip=True)
    named = list(stream_examples("in.jsonl.gz", "text", bad, file=Slow(gzip.compress(rows))))
    assert [e.text for e in named] == ["a"] and list(bad.bad) == ["in.jsonl.gz:2"]
    bad = BadRows(skip=True)
    words = list(stream_sentences("in.jsonl", bad, tagged=False, file=Slow(rows)))
    assert [s.words for s in words] == [["a"]] and words[0].tags is None
    columns = list(stream_sentences("-", bad, file=Slow(b"EU I-ORG\nsaid O\n")))
    assert columns[0].tags == ["I-ORG", "O"], "as they stand: one sentence tells no scheme"
    asked = json_lines({"question": "Who?", "context": "x"}).encode()
    (question,) = stream_questions("in.jsonl", bad, answered=False, file=Slow(asked))
    assert question.answers is None and question.id == "1"
    choice = json_lines({"sent1": "a", "endings": ["b", "c"]}).encode()
    (example,) = stream_choices("in.jsonl", bad, label=None, file=Slow(choice))
    assert example.choices == ["b", "c"] and example.place == "in.jsonl:1"
    (csv_row,) = stream_table("in.csv", ["a"], bad, file=Slow(b"\xef\xbb\xbfa,b\n1,2\n"))
    assert csv_row.values == {"a": "1"}


def test_text_files_are_a_text_a_line(write):
    path = write("a.txt", 'one\ttab, "quote\n\n two \n')
    assert [e.text for e in read_examples(path, text="text")] == ['one\ttab, "quote', " two "]
    assert len(read_examples(path, text=0)) == 2
    assert "no column 'label'" in refused(read_examples, path, text="text", label="label")


# ---------------------------------------------------------------------------------------------
# Anything at all.

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
    ".csv": lambda path, bad: read_examples(path, 0, label=1, bad=bad),
    ".tsv": lambda path, bad: read_examples(path, "a", label="b", bad=bad),
    ".txt": lambda path, bad: read_examples(path, 0, bad=bad),
    ".jsonl": lambda path, bad: read_examples(path, "text", label="label", bad=bad),
    "words.jsonl": lambda path, bad: read_sentences(path, bad=bad).examples,
    ".conll": lambda path, bad: read_sentences(path, bad=bad).examples,
    ".conllu": lambda path, bad: read_sentences(path, bad=bad).examples,
    ".json": lambda path, bad: read_questions(path, bad=bad),
    "asked.jsonl": lambda path, bad: read_questions(path, bad=bad),
    "mc.jsonl": lambda path, bad: read_choices(path, bad=bad),
    "mc.csv": lambda path, bad: read_choices(path, bad=bad),
}


@pytest.mark.parametrize("name", READERS)
def test_whatever_a_file_holds_each_row_is_read_or_named(name, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / f"file{name}"

    @settings(max_examples=80, deadline=None)
    @given(CONTENTS)
    def check(content):
        path.write_bytes(content)
        bad = BadRows(skip=True)
        try:
            found = READERS[name](path, bad)
        except InputError as error:
            assert str(path) in str(error)
            return
        assert len(found) + len(bad.bad) == bad.total > 0, "lost, or counted twice"
        assert all(str(path) in place for place in bad.bad)

    check()

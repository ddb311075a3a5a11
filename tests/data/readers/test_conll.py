"""Tagged sentences: CoNLL columns, CoNLL-U and JSON Lines."""

from prelnroberta.data.readers.conll import read_sentences, tag_names
from prelnroberta.data.readers.row_errors import RowErrors
from tests.helpers.raw_files import error_message, json_lines, lines


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
    assert found.scheme == "IOB1" and found.num_repaired == 0
    first, second = found.examples
    assert first.words == ["EU", "rejects", "German", "Boers"]
    assert first.tags == ["B-ORG", "O", "B-MISC", "B-MISC"]
    assert second.tags == ["B-PER", "I-PER"]
    assert [first.document, second.document] == [1, 2]
    assert [first.location, second.location] == [f"{path}:3", f"{path}:11"]
    names = ("O", "B-MISC", "I-MISC", "B-ORG", "I-ORG", "B-PER", "I-PER")
    assert tag_names(found.examples) == names
    chunks = read_sentences(path, tag=2)
    assert chunks.scheme == "IOB1" and chunks.examples[1].tags == ["B-NP", "I-NP"]
    words = read_sentences(path, tagged=False)
    assert words.scheme is None and words.examples[0].tags is None


def test_wnut_tabs_hashes_and_blank_lines(write):
    path = write("wnut.conll", "#photography\tO\n\u3000\x0b a\tO\n\t\nRick\tB-creative-work\r\n")
    found = read_sentences(path)
    assert [s.words for s in found.examples] == [["#photography", "a"], ["Rick"]]
    assert found.scheme == "IOB2"


def test_bioes_and_bilou_convert_to_iob2_and_invalid_tags_are_counted(write):
    good = lines("a S-X", "b B-Y", "c I-Y", "d E-Y", "e O", "")
    path = write("bioes.conll", good + lines("a I-X", "b E-X", "", "c B-X", "d O"))
    found = read_sentences(path)
    assert found.scheme == "IOBES" and found.num_repaired == 2
    assert [s.tags for s in found.examples] == [
        ["B-X", "B-Y", "I-Y", "I-Y", "O"],
        ["B-X", "I-X"],
        ["B-X", "O"],
    ]
    bilou = write("bilou.conll", good.replace("S-", "U-").replace("E-", "L-"))
    found = read_sentences(bilou)
    assert (found.scheme, found.num_repaired) == ("IOBES", 0)
    assert found.examples[0].tags == ["B-X", "B-Y", "I-Y", "I-Y", "O"]


def test_conllu_reads_syntactic_words(write):
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
    message = error_message(read_sentences, broken)
    assert f"2 of 3 rows are bad: {broken}:12: expected 10 columns, found 3" in message
    assert f"{broken}:14: 'x' is not the id of a word" in message


def test_bad_sentences_are_skipped_whole_and_counted(write):
    path = write(
        "a.conll", lines("good\tO", "", "one\tO", "two", "three\tO", "", "\tO", "", "x\tO")
    )
    message = error_message(read_sentences, path)
    assert f"2 of 4 rows are bad: {path}:4: expected at least 2 columns, found 1" in message
    assert f"{path}:7: no word in column 0" in message
    bad = RowErrors(skip=True)
    assert [s.words for s in read_sentences(path, row_errors=bad).examples] == [["good"], ["x"]]
    assert "no sentences" in error_message(read_sentences, write("empty.conll", "\n\n"))
    assert "expected numbers" in error_message(read_sentences, path, word="form")


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
    bad = RowErrors(skip=True)
    found = read_sentences(path, row_errors=bad)
    assert found.scheme == "IOB1" and found.examples[0].tags == ["B-ORG", "O"]
    assert bad.num_rows == 6 and len(bad.problems) == 5
    assert bad.problems[f"{path}:2"] == "expected 2 tags under 'ner_tags', found 1 tags"
    numbers = write("b.jsonl", json_lines({"tokens": ["a", "b"], "ner_tags": [0, 3]}))
    assert read_sentences(numbers).examples[0].tags == ["0", "3"]

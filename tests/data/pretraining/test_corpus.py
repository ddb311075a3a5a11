"""Corpora of files: how text and JSON Lines become documents, and how documents are split."""

import gzip
import hashlib
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelnroberta.data.pretraining import corpus as module
from prelnroberta.data.pretraining.corpus import FileCorpus, in_validation_split
from prelnroberta.errors import InputError


def texts(corpus):
    return [document.text for document in corpus.documents()]


def test_split_depends_only_on_key_and_has_requested_share():
    keys = [f"package/module{i}" for i in range(4000)]
    held_out = [in_validation_split(key, 0.1) for key in keys]
    assert held_out == [in_validation_split(key, 0.1) for key in keys]
    assert 0.08 < sum(held_out) / len(keys) < 0.12
    assert not any(in_validation_split(key, 0.0) for key in keys)
    assert all(in_validation_split(key, 1.0) for key in keys)
    # A larger fraction only adds keys.
    assert all(in_validation_split(key, 0.2) for key in keys if in_validation_split(key, 0.1))


def write(path, text):
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_blank_lines_end_documents(tmp_path, suffix):
    path = write(tmp_path / f"a.txt{suffix}", b"\xef\xbb\xbfone\r\n  two\r\n \t\r\n\n  three\n\n")
    documents = list(FileCorpus([path]).documents())
    assert [d.text for d in documents] == ["one\n  two", "  three"]
    assert documents[0].key == hashlib.sha256(b"one\n  two").hexdigest()


@settings(deadline=None)
@given(
    st.lists(st.text(st.sampled_from(list("ab \n\t")), max_size=9), max_size=9), st.integers(3, 9)
)
def test_documents_do_not_depend_on_chunk_size(chunks, piece):
    whole = "".join(chunks)
    groups = itertools.groupby(whole.split("\n"), key=lambda line: bool(line.strip()))
    documents = ["\n".join(lines).rstrip() for is_text, lines in groups if is_text]
    assert list(module._plain_documents(chunks)) == documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_DOCUMENT_CHARS", piece)
        found = list(module._plain_documents(chunks))
    assert all(0 < len(text) <= piece for text in found)
    assert "".join("".join(found).split()) == "".join(whole.split())


def test_jsonl_has_one_document_per_line(tmp_path):
    lines = [{"body": "first\n\nstill first", "n": 1}, {"body": "second"}, {"body": " "}]
    text = "\n\n".join(json.dumps(line) for line in lines)
    path = write(tmp_path / "a.jsonl.gz", text.encode())
    assert texts(FileCorpus([path], text_field="body")) == ["first\n\nstill first", "second"]


def test_long_documents_are_split_at_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_DOCUMENT_CHARS", 100)
    long = "\n".join(f"line {i} of a document" for i in range(50))
    path = write(tmp_path / "a.txt", long.encode())
    found = texts(FileCorpus([path]))
    assert "\n".join(found) == long
    assert all(len(text) <= 100 for text in found)
    assert texts(FileCorpus([write(tmp_path / "b.txt", b"x" * 250)])) == [
        "x" * 100,
        "x" * 100,
        "x" * 50,
    ]


def test_folders_globs_and_repeated_names(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.txt", b"b")
    write(tmp_path / "a.md", b"a")
    write(tmp_path / "sub" / "c.text.gz", b"c")
    write(tmp_path / "sub" / "picture.png", b"\xff")
    assert texts(FileCorpus([str(tmp_path)])) == ["a", "b", "c"]
    assert texts(FileCorpus([str(tmp_path / "b.txt"), str(tmp_path / "*")])) == ["b", "a"]
    assert texts(FileCorpus([str(tmp_path / "**" / "*.gz")])) == ["c"]


def test_manifest_changes_with_the_files(tmp_path):
    path = write(tmp_path / "a.txt", b"one")
    before = FileCorpus([path]).manifest()
    assert before["text_bytes"] == 3
    assert json.loads(json.dumps(before)) == before
    write(tmp_path / "a.txt", b"four")
    assert FileCorpus([path]).manifest() != before
    assert FileCorpus([write(tmp_path / "a.gz", b"x")]).manifest()["text_bytes"] is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", r"none\.txt does not exist"),
        ("*.csv", r"pattern '.*\*\.csv' matches no file"),
        ("empty", r"folder .*empty holds no \.txt"),
    ],
)
def test_missing_paths_raise_immediately(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        FileCorpus([str(tmp_path / name)])


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", [0, 5, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 2_500_000])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x82"])  # never a character; a cut one
def test_invalid_utf8_raises_with_position(tmp_path, suffix, place, bad):
    good = "é".encode() * (place // 2) + b"a" * (place % 2)
    path = write(tmp_path / f"a.txt{suffix}", good + bad + b" and more")
    with pytest.raises(InputError, match=rf"a\.txt{suffix}: not UTF-8 at byte {place} "):
        texts(FileCorpus([path]))
    path = write(tmp_path / f"end.txt{suffix}", good + bad)
    with pytest.raises(InputError, match=rf"not UTF-8 at byte {place} "):
        texts(FileCorpus([path]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a\.jsonl:3: not a line of JSON"),
        (b'{"body": "a", "id": 1}', r"a\.jsonl:3: expected text under 'text', found keys body, id"),
        (b'{"text": 5}', r"a\.jsonl:3: expected text under 'text', found keys text"),
        (b"[1]", r"a\.jsonl:3: expected text under 'text', found \[1\]"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:3: lone surrogate"),
    ],
)
def test_bad_json_lines_raise_with_line_number(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        texts(FileCorpus([path]))


def test_truncated_gzip_empty_text_and_no_paths_raise(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some text " * 1000)[:-20])
    with pytest.raises(InputError, match=r"a\.txt\.gz: cannot be read"):
        texts(FileCorpus([str(path)]))
    path.write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"a\.txt\.gz: cannot be read"):
        texts(FileCorpus([str(path)]))
    with pytest.raises(InputError, match=r"corpus is empty: no text in 1 file"):
        texts(FileCorpus([write(tmp_path / "a.txt", b" \n\n \t\n")]))
    with pytest.raises(InputError, match=r"no corpus files given"):
        FileCorpus([])

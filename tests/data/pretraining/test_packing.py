"""Packing: no token is lost, repeated or joined across a boundary; positions restart."""

import hashlib
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelnroberta.data.pretraining import packing as packing_module
from prelnroberta.data.pretraining.packing import open_rows
from prelnroberta.data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from prelnroberta.errors import InputError

NEWLINE = 10
VOCABULARY = 50
LINE_ENDS = np.arange(VOCABULARY) == NEWLINE


def corpus(directory, documents):
    """A stand-in for TokenFiles: documents are lists of ids without specials."""
    closed = [[*document, EOS_ID] for document in documents]
    tokens = np.concatenate([*map(np.array, closed), []]).astype(np.uint16)
    tokens.tofile(directory / "tokens.bin")
    return SimpleNamespace(
        tokens=np.memmap(directory / "tokens.bin", np.uint16, mode="r"),
        document_ends=np.cumsum([len(document) for document in closed]).astype(np.int64),
        manifest={"text": {"sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}},
        directory=directory,
    )


def segments(row):
    """The row's segments as lists of ids, after checking everything that holds for each row."""
    ids, segment_ids, position_ids = row
    for array in row:
        assert array.dtype == np.int32 and array.shape == ids.shape
    used = int((segment_ids > 0).sum())
    assert (segment_ids[:used] > 0).all(), "padding is only at the end"
    assert (ids[used:] == PAD_ID).all() and (position_ids[used:] == PAD_ID).all()
    assert not (ids[:used] == PAD_ID).any()
    found = []
    for number in range(1, segment_ids.max() + 1):
        at = np.flatnonzero(segment_ids == number)
        assert (np.diff(at) == 1).all(), "a segment is contiguous"
        np.testing.assert_array_equal(position_ids[at], PAD_ID + 1 + np.arange(len(at)))
        assert ids[at[0]] == BOS_ID and not (ids[at[1:]] == BOS_ID).any()
        found.append(ids[at].tolist())
    return found


def expected_segments(units, length):
    """The module's rule, written the slow way."""
    found = []
    for unit in units:
        tokens = [*unit, EOS_ID]
        for at in range(0, len(tokens), length - 1):
            piece = tokens[at : at + length - 1]
            if len(piece) > 1:
                found.append([BOS_ID, *piece])
    return sorted(found)


def lines(documents):
    for document in documents:
        line = []
        for token in document:
            if token == NEWLINE:
                yield line
                line = []
            else:
                line.append(token)
        yield line


DOCUMENTS = st.lists(
    st.lists(st.integers(4, 20) | st.just(NEWLINE), max_size=40), min_size=1, max_size=30
)


@settings(max_examples=60, deadline=None)
@given(
    documents=DOCUMENTS,
    length=st.integers(3, 24),
    packing=st.sampled_from(["documents", "sentences"]),
    chunk=st.sampled_from([1, 7, packing_module._CHUNK]),
)
def test_packed_rows_hold_every_piece_once(tmp_path_factory, documents, length, packing, chunk):
    units = documents if packing == "documents" else list(lines(documents))
    expected = expected_segments(units, length)
    files = corpus(tmp_path_factory.mktemp("corpus"), documents)
    with mock.patch.object(packing_module, "_CHUNK", chunk):
        if not expected:
            with pytest.raises(InputError, match="no text"):
                open_rows(files, length, packing, LINE_ENDS)
            return
        rows = open_rows(files, length, packing, LINE_ENDS)
    packed = [segments(rows[i]) for i in range(len(rows))]
    assert all(packed), "no row is empty"
    assert sorted(segment for row in packed for segment in row) == expected
    real = sum(map(len, expected))
    assert rows.fill_ratio == pytest.approx(real / (len(rows) * length))


@settings(max_examples=30, deadline=None)
@given(documents=DOCUMENTS, length=st.integers(3, 24))
def test_contiguous_rows_concatenate_to_the_stream(tmp_path_factory, documents, length):
    files = corpus(tmp_path_factory.mktemp("corpus"), documents)
    whole = len(files.tokens) // (length - 1)
    if not whole:
        with pytest.raises(InputError, match=f"{len(files.tokens)} tokens.* {length}"):
            open_rows(files, length, "contiguous")
        return
    rows = open_rows(files, length, "contiguous")
    assert len(rows) == whole
    stream = []
    for i in range(len(rows)):
        (row,) = segments(rows[i])
        assert len(row) == length
        stream += row[1:]
    assert stream == files.tokens[: whole * (length - 1)].tolist()
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_best_fit_leaves_little_padding(tmp_path):
    generator = np.random.default_rng(0)
    documents = [[5] * n for n in generator.geometric(1 / 90, 30_000)]
    rows = open_rows(corpus(tmp_path, documents), 128, "documents")
    assert rows.fill_ratio > 0.99


def test_long_document_is_split_and_only_its_last_row_ends_with_eos(tmp_path):
    rows = open_rows(corpus(tmp_path, [list(range(4, 16))]), 6, "documents")
    found = sorted(segment for i in range(len(rows)) for segment in segments(rows[i]))
    assert found == [
        [BOS_ID, 4, 5, 6, 7, 8],
        [BOS_ID, 9, 10, 11, 12, 13],
        [BOS_ID, 14, 15, EOS_ID],
    ]


def test_final_newline_is_replaced_by_eos(tmp_path):
    rows = open_rows(corpus(tmp_path, [[4, 5, NEWLINE, 6, NEWLINE]]), 9, "sentences", LINE_ENDS)
    assert segments(rows[0]) == [[BOS_ID, 4, 5, EOS_ID], [BOS_ID, 6, EOS_ID]]


def test_plan_is_cached_until_corpus_changes(tmp_path):
    def plans():
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("packing-*")}

    files = corpus(tmp_path, [[5] * 10, [6] * 10])
    open_rows(files, 16, "documents")
    kept = plans()
    assert len(kept) == 1
    open_rows(files, 16, "documents")
    assert plans() == kept
    again = corpus(tmp_path, [[5] * 6, [6] * 14])  # as many tokens and documents as before
    rows = open_rows(again, 16, "documents")
    lengths = [len(segment) for i in range(len(rows)) for segment in segments(rows[i])]
    assert sorted(lengths) == [8, 16]
    for ending in (5, 6):
        rows = open_rows(again, 16, "sentences", np.arange(VOCABULARY) == ending)
        lengths = [len(segment) for i in range(len(rows)) for segment in segments(rows[i])]
        assert sum(lengths) == {5: 16, 6: 8}[ending]


def test_packing_is_deterministic_with_plan_in_other_folder(tmp_path):
    generator = np.random.default_rng(1)
    files = corpus(tmp_path, [[7] * n for n in generator.integers(1, 60, 3000)])
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
    one, two = (open_rows(files, 64, "documents", directory=home) for home in homes)
    assert len(one) == len(two)
    for i in range(len(one)):
        np.testing.assert_array_equal(one[i], two[i])
    assert not list(tmp_path.glob("packing-*"))


def test_failed_plan_leaves_no_files(tmp_path):
    files = corpus(tmp_path, [[], []])
    with pytest.raises(InputError, match="no text"):
        open_rows(files, 16, "documents")
    assert {path.name for path in tmp_path.iterdir()} == {"tokens.bin"}
    with pytest.raises(InputError, match=r"missing.*packing plan"):
        open_rows(corpus(tmp_path, [[5, 6]]), 16, "documents", directory=tmp_path / "missing")


@pytest.mark.parametrize(
    ("length", "packing", "message"),
    [(2, "documents", "sequence length=2"), (8, "lines", "packing='lines'")],
)
def test_bad_arguments_raise(tmp_path, length, packing, message):
    with pytest.raises(InputError, match=message):
        open_rows(corpus(tmp_path, [[5, 6]]), length, packing)


def test_data_files_import_numpy_only():
    heavy = "jax flax orbax grain tensorflow torch keras tokenizers absl"
    code = (
        "import sys, prelnroberta.data.pretraining.loader\n"
        f"print(*[name for name in {heavy.split()} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []

"""Rows of one static length from token files, read at random and never held in memory.

A row is `input_ids`, `segment_ids` and `position_ids`, each int32 [L]. Segment ids count 1, 2, ..
along the row and are 0 on padding; attention is limited to a segment. Positions start at
`PAD_ID + 1` in every segment and are `PAD_ID` on padding, as RoBERTa counts them.

Three ways to pack a row:

contiguous
    `<s>` and L - 1 consecutive tokens of the stream, across document ends, as fairseq trains
    RoBERTa (`sample_break_mode=none`, block size `tokens_per_sample - 1`, PrependTokenDataset:
    fairseq/data/token_block_dataset.py, fairseq/tasks/masked_lm.py). One segment. fairseq keeps a
    shorter last block; shapes here are static, so up to L - 2 trailing tokens are dropped.
documents
    Whole documents, `<s> document </s>`, several to a row. A document that does not fit is split
    into pieces of L - 1 tokens, each a segment `<s> piece`; only the last piece ends in `</s>`,
    because only there does the text end.
sentences
    The same with the lines of documents as units. The newline that closes a line becomes `</s>`,
    so a segment is `<s> line </s>`, the form of a single sentence in fine-tuning.

A unit or piece that is nothing but `</s>` (an empty document or line) is left out.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from prelnroberta.data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

PACKINGS = ("contiguous", "documents", "sentences")

# Rows that are open for further pieces: enough to fill nearly every row, few enough for any memory.
_MAX_OPEN_ROWS = 1024
_SMALLEST_SEGMENT = 3  # `<s>`, one token, `</s>`
_CHUNK = 1 << 20  # tokens, documents or pieces processed together


class Row(NamedTuple):
    """One training example before masking; each field is int32 [L]."""

    input_ids: np.ndarray
    segment_ids: np.ndarray
    position_ids: np.ndarray


class TokenizedCorpus(Protocol):
    """The part of `token_files.TokenFiles` that packing reads."""

    tokens: np.ndarray  # uint16 or uint32 [U]: documents in sequence, each followed by `</s>`
    document_ends: np.ndarray  # int64 [documents]: exclusive ends, after the `</s>`
    manifest: dict  # identifies the text
    directory: Path


class Rows(Protocol):
    """Rows of one length, with random access."""

    @property
    def fill_ratio(self) -> float:
        """Share of the rows' positions that hold tokens, not padding."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


def open_rows(
    corpus: TokenizedCorpus,
    length: int,
    packing: str,
    newline_mask: np.ndarray | None = None,
    directory: Path | None = None,
) -> Rows:
    """Opens rows of `length` tokens; makes or reuses a packing plan if one is needed.

    Args:
        corpus: token stream and document ends.
        length: L, the row length in tokens, including special tokens.
        packing: 'contiguous', 'documents' or 'sentences', see the module docstring.
        newline_mask: bool [V], ids whose text holds a newline; needed for 'sentences' only.
        directory: the folder of packing plans, by default that of the token files. Unused for
            'contiguous', which needs no plan.

    Raises:
        InputError: an unknown packing, a length too short to hold text, or a corpus with less text
            than one row needs.
    """
    if packing not in PACKINGS:
        raise InputError(f"packing={packing!r}: expected one of {', '.join(PACKINGS)}")
    if length < _SMALLEST_SEGMENT:
        raise InputError(
            f"sequence length={length}: a row holds <s>, text and </s>, so give at least "
            f"{_SMALLEST_SEGMENT}"
        )
    if packing == "contiguous":
        return ContiguousRows(corpus, length)
    if packing == "sentences" and newline_mask is None:
        raise InputError(
            "packing='sentences' needs newline_mask, the ids whose text holds a newline"
        )
    newline_mask = newline_mask if packing == "sentences" else None
    plan = _open_plan(corpus, length, newline_mask, directory or corpus.directory)
    return PackedRows(corpus, length, newline_mask, plan)


class ContiguousRows:
    """Row i is `<s>` and the stream's tokens i * (L - 1) to (i + 1) * (L - 1)."""

    def __init__(self, corpus: TokenizedCorpus, length: int):
        self._tokens = np.asarray(corpus.tokens)
        self._block = length - 1
        self._num_rows = len(self._tokens) // self._block
        if not self._num_rows:
            raise InputError(
                f"the corpus has {len(self._tokens)} tokens, but a row of sequence length {length} "
                f"takes {self._block}: give more text or a shorter sequence length"
            )
        self._segment_ids = np.ones(length, np.int32)
        self._position_ids = np.arange(PAD_ID + 1, PAD_ID + 1 + length, dtype=np.int32)

    @property
    def fill_ratio(self) -> float:
        return 1.0

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._num_rows:
            raise IndexError(index)
        input_ids = np.empty(self._block + 1, np.int32)
        input_ids[0] = BOS_ID
        input_ids[1:] = self._tokens[index * self._block : (index + 1) * self._block]
        return Row(input_ids, self._segment_ids.copy(), self._position_ids.copy())


class PackingPlan(NamedTuple):
    """Which pieces of the stream share a row; the arrays are memory-mapped."""

    pieces: np.ndarray  # int64 [pieces, 2]: start and length in the stream, row by row
    row_ends: np.ndarray  # int64 [rows]: exclusive end of each row's pieces


class PackedRows:
    """Rows of several segments `<s> piece`, padded at the end."""

    def __init__(
        self,
        corpus: TokenizedCorpus,
        length: int,
        newline_mask: np.ndarray | None,
        plan: PackingPlan,
    ):
        self._tokens = np.asarray(corpus.tokens)
        self._length = length
        self._line_ends = newline_mask
        self._plan = plan

    @property
    def fill_ratio(self) -> float:
        pieces, row_ends = self._plan
        return float(pieces[:, 1].sum() + len(pieces)) / (len(row_ends) * self._length)

    def __len__(self) -> int:
        return len(self._plan.row_ends)

    def __getitem__(self, index: int) -> Row:
        pieces, row_ends = self._plan
        if not 0 <= index < len(row_ends):
            raise IndexError(index)
        first = row_ends[index - 1] if index else 0
        starts, sizes = pieces[first : row_ends[index]].T
        sizes = sizes + 1  # `<s>`
        used = sizes.sum()
        segment_starts = np.cumsum(sizes) - sizes
        position_in_segment = np.arange(used) - np.repeat(segment_starts, sizes)

        input_ids = np.full(self._length, PAD_ID, np.int32)
        segment_ids = np.zeros(self._length, np.int32)
        position_ids = np.full(self._length, PAD_ID, np.int32)
        # `<s>` is not in the stream: its position reads a neighbouring token and is overwritten.
        text = self._tokens[np.repeat(starts - 1, sizes) + position_in_segment]
        if self._line_ends is not None:
            text = np.where(self._line_ends[text], EOS_ID, text)
        input_ids[:used] = text
        input_ids[segment_starts] = BOS_ID
        segment_ids[:used] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        position_ids[:used] = position_in_segment + (PAD_ID + 1)
        return Row(input_ids, segment_ids, position_ids)


def _open_plan(
    corpus: TokenizedCorpus, length: int, newline_mask: np.ndarray | None, directory: Path
) -> PackingPlan:
    """The packing plan: found in `directory`, or computed and written there.

    Its name includes a digest of everything it depends on, so a plan is never used for another
    corpus. If two processes write the same plan at the same time, either one is kept.
    """
    digest = hashlib.sha256(json.dumps(corpus.manifest, sort_keys=True).encode())
    digest.update(f"{len(corpus.tokens)} {len(corpus.document_ends)} {_MAX_OPEN_ROWS}".encode())
    if newline_mask is not None:
        digest.update(np.packbits(newline_mask).tobytes())
    unit = "documents" if newline_mask is None else "sentences"
    plan_dir = directory / f"packing-{unit}-{length}-{digest.hexdigest()[:16]}"
    if not plan_dir.is_dir():
        try:
            with atomic_write(plan_dir) as partial:
                partial.mkdir()
                pieces = _split_units(_unit_ends(corpus, newline_mask), length)
                _write_plan(pieces, length, partial)
        except OSError as error:
            if not plan_dir.is_dir():
                raise InputError(
                    f"{directory}: the packing plan cannot be written ({error.strerror}); make "
                    "room or give a writable directory"
                ) from error
    return PackingPlan(
        np.memmap(plan_dir / "pieces.int64", np.int64, mode="r").reshape(-1, 2),
        np.memmap(plan_dir / "row_ends.int64", np.int64, mode="r"),
    )


def _unit_ends(corpus: TokenizedCorpus, newline_mask: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yields the exclusive ends of documents or lines in stream order, in chunks."""
    if newline_mask is None:
        for start in range(0, len(corpus.document_ends), _CHUNK):
            yield np.asarray(corpus.document_ends[start : start + _CHUNK])
        return
    ends_unit = newline_mask.copy()
    ends_unit[EOS_ID] = True
    for start in range(0, len(corpus.tokens), _CHUNK):
        yield start + 1 + np.flatnonzero(ends_unit[corpus.tokens[start : start + _CHUNK]])


def _split_units(unit_ends: Iterator[np.ndarray], length: int) -> Iterator[tuple[list, list]]:
    """Yields units, split into pieces of at most L - 1 tokens: (starts, sizes), in chunks."""
    longest = length - 1
    previous = 0
    for ends in unit_ends:
        if not len(ends):
            continue
        starts = np.concatenate([[previous], ends[:-1]])
        previous = ends[-1]
        counts = -((starts - ends) // longest)
        index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        piece_starts = np.repeat(starts, counts) + index * longest
        sizes = np.minimum(np.repeat(ends, counts) - piece_starts, longest)
        keep = sizes > 1  # a piece of one token is only the end of its unit
        yield piece_starts[keep].tolist(), sizes[keep].tolist()


def _write_plan(pieces: Iterator[tuple[list, list]], length: int, directory: Path) -> None:
    with (
        open(directory / "pieces.int64", "wb") as pieces_file,
        open(directory / "row_ends.int64", "wb") as row_ends_file,
    ):
        flat: list[int] = []
        row_ends: list[int] = []
        written = 0

        def flush() -> None:
            np.array(flat, np.int64).tofile(pieces_file)
            np.array(row_ends, np.int64).tofile(row_ends_file)
            flat.clear()
            row_ends.clear()

        for row in _best_fit_rows(pieces, length):
            flat += row
            written += len(row) // 2
            row_ends.append(written)
            if len(row_ends) >= _CHUNK // 16:
                flush()
        flush()
    if not written:
        raise InputError("the corpus has no text: every document is empty; give other files")


def _best_fit_rows(pieces: Iterator[tuple[list, list]], length: int) -> Iterator[list[int]]:
    """Yields packed rows, each as a flat list start, size, start, size, ..

    Online best fit: a piece goes to the open row that it fills most tightly, or opens a new one. If
    too many rows are open, the fullest is closed. Open rows are kept in one stack per free space.
    Bit s of `spaces` is set if the stack of free space s is not empty, so finding the tightest row
    takes a shift and a lowest set bit.
    """
    stacks: list[list[list[int]]] = [[] for _ in range(length)]
    spaces = num_open = 0
    for starts, sizes in pieces:
        for start, size in zip(starts, sizes, strict=True):
            needed = size + 1  # with `<s>`
            fitting = spaces >> needed
            if fitting:
                space = needed + (fitting & -fitting).bit_length() - 1
                stack = stacks[space]
                row = stack.pop()
                num_open -= 1
                if not stack:
                    spaces ^= 1 << space
            else:
                row, space = [], length
            row += (start, size)
            space -= needed
            if space < _SMALLEST_SEGMENT:
                yield row
                continue
            stacks[space].append(row)
            spaces |= 1 << space
            num_open += 1
            if num_open > _MAX_OPEN_ROWS:
                space = (spaces & -spaces).bit_length() - 1
                yield stacks[space].pop()
                num_open -= 1
                if not stacks[space]:
                    spaces ^= 1 << space
    for stack in stacks:
        yield from stack


class _EvenSubset:
    """`count` rows of another source, evenly spaced."""

    def __init__(self, rows: Rows, count: int):
        self._rows = rows
        self._count = count

    @property
    def fill_ratio(self) -> float:
        return self._rows.fill_ratio

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._rows[index * len(self._rows) // self._count]


def subsample_evenly(rows: Rows, count: int) -> Rows:
    """At most `count` rows, evenly spaced over all, to represent the whole."""
    return rows if len(rows) <= count else _EvenSubset(rows, count)

"""Token files to rows of one static length, read at random and never held in memory.

A row is `input_ids`, `segment_ids` and `position_ids`, each int32 [L]. Segment ids count 1, 2, ..
along the row and are 0 on padding; attention stays inside a segment. Positions start at
`PAD_ID + 1` in every segment and are `PAD_ID` on padding, as RoBERTa counts them.

Three ways to fill a row:

contiguous
    L - 1 consecutive tokens of the stream after one `<s>`, across document ends, as fairseq trains
    RoBERTa (`sample_break_mode=none`, block size `tokens_per_sample - 1`, PrependTokenDataset:
    fairseq/data/token_block_dataset.py, fairseq/tasks/masked_lm.py). One segment. fairseq keeps the
    shorter last block; shapes here are static, so fewer than L - 1 trailing tokens are dropped.
documents
    Whole documents, `<s> document </s>`, several to a row. A document that does not fit is cut
    into pieces of L - 1 tokens, each a segment `<s> piece`; only its last piece carries `</s>`,
    because only there does the text end.
sentences
    The same with the lines of documents as units. The newline that closes a line becomes `</s>`,
    so a segment reads `<s> line </s>`, the form a lone sentence has in fine-tuning.

A unit or rest of one that is nothing but its `</s>` (an empty document or line) is left out.
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

# Rows that wait for a unit that fills them. Wide enough that nearly every gap finds its unit,
# small enough that what waits fits any memory.
_WAITING_ROWS = 1024
_SMALLEST_SEGMENT = 3  # `<s>`, one token, `</s>`
_CHUNK = 1 << 20  # tokens, documents or pieces handled at once


class Row(NamedTuple):
    """One training example before masking; each field is int32 [L]."""

    input_ids: np.ndarray
    segment_ids: np.ndarray
    position_ids: np.ndarray


class Tokens(Protocol):
    """What packing reads of a tokenized corpus (`token_files.TokenFiles`)."""

    tokens: np.ndarray  # uint16 or uint32 [T]: documents one after another, each closed by `</s>`
    document_ends: np.ndarray  # int64 [documents]: exclusive ends, past the `</s>`
    manifest: dict  # what the text is, by digest
    directory: Path


class Rows(Protocol):
    """Rows of one length, read at random."""

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold real tokens."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


def open_rows(
    corpus: Tokens,
    length: int,
    packing: str,
    newline_mask: np.ndarray | None = None,
    directory: Path | None = None,
) -> Rows:
    """Rows of `length` tokens, with `len(rows)` and `rows[i]`.

    Args:
        corpus: token stream and document ends.
        length: L, row length in tokens, specials included.
        packing: 'contiguous', 'documents' or 'sentences' (module docstring).
        newline_mask: bool [V], ids whose text holds a newline; read for 'sentences' only.
        directory: where the packing plan is kept and found again, by default beside the token
            files. Unread for 'contiguous', which needs no plan.

    Raises:
        InputError: unknown packing, rows too short to hold text, or a corpus with less text than
            one row needs.
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
    closing = newline_mask if packing == "sentences" else None
    plan = _plan(corpus, length, closing, directory or corpus.directory)
    return PackedRows(corpus, length, closing, plan)


class ContiguousRows:
    """Row i is `<s>` and the stream's tokens i * (L - 1) to (i + 1) * (L - 1)."""

    def __init__(self, corpus: Tokens, length: int):
        self._tokens = np.asarray(corpus.tokens)
        self._block = length - 1
        self._length = len(self._tokens) // self._block
        if not self._length:
            raise InputError(
                f"the corpus has {len(self._tokens)} tokens, but a row of sequence length {length} "
                f"takes {self._block}: give more text or a shorter sequence length"
            )
        self._segment_ids = np.ones(length, np.int32)
        self._position_ids = np.arange(PAD_ID + 1, PAD_ID + 1 + length, dtype=np.int32)

    @property
    def fill(self) -> float:
        return 1.0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._length:
            raise IndexError(index)
        input_ids = np.empty(self._block + 1, np.int32)
        input_ids[0] = BOS_ID
        input_ids[1:] = self._tokens[index * self._block : (index + 1) * self._block]
        return Row(input_ids, self._segment_ids.copy(), self._position_ids.copy())


class Plan(NamedTuple):
    """Which pieces of the stream share a row; both arrays are memory-mapped."""

    pieces: np.ndarray  # int64 [pieces, 2]: start in the stream and tokens, row after row
    row_ends: np.ndarray  # int64 [rows]: exclusive end of each row's pieces


class PackedRows:
    """Rows of several segments `<s> piece`, padded at the end."""

    def __init__(self, corpus: Tokens, length: int, newline_mask: np.ndarray | None, plan: Plan):
        self._tokens = np.asarray(corpus.tokens)
        self._length = length
        self._line_ends = newline_mask
        self._plan = plan

    @property
    def fill(self) -> float:
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
        opens = np.cumsum(sizes) - sizes
        inside = np.arange(used) - np.repeat(opens, sizes)

        input_ids = np.full(self._length, PAD_ID, np.int32)
        segment_ids = np.zeros(self._length, np.int32)
        position_ids = np.full(self._length, PAD_ID, np.int32)
        # `<s>` has no place in the stream: its slot reads a neighbour and is then overwritten.
        text = self._tokens[np.repeat(starts - 1, sizes) + inside]
        if self._line_ends is not None:
            text = np.where(self._line_ends[text], EOS_ID, text)
        input_ids[:used] = text
        input_ids[opens] = BOS_ID
        segment_ids[:used] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        position_ids[:used] = inside + (PAD_ID + 1)
        return Row(input_ids, segment_ids, position_ids)


def _plan(corpus: Tokens, length: int, newline_mask: np.ndarray | None, directory: Path) -> Plan:
    """The packing plan: found in `directory`, or made and kept there.

    Its name is a digest of all that it depends on, so that another corpus never meets it. Of two
    processes that make the same plan at once either may win.
    """
    digest = hashlib.sha256(json.dumps(corpus.manifest, sort_keys=True).encode())
    digest.update(f"{len(corpus.tokens)} {len(corpus.document_ends)} {_WAITING_ROWS}".encode())
    if newline_mask is not None:
        digest.update(np.packbits(newline_mask).tobytes())
    unit = "documents" if newline_mask is None else "sentences"
    home = directory / f"packing-{unit}-{length}-{digest.hexdigest()[:16]}"
    if not home.is_dir():
        try:
            with atomic_write(home) as partial:
                partial.mkdir()
                _write_plan(_pieces(_unit_ends(corpus, newline_mask), length), length, partial)
        except OSError as error:
            if not home.is_dir():
                raise InputError(
                    f"{directory}: the packing plan cannot be written ({error.strerror}); make "
                    "room or give a writable directory"
                ) from error
    return Plan(
        np.memmap(home / "pieces.int64", np.int64, mode="r").reshape(-1, 2),
        np.memmap(home / "row_ends.int64", np.int64, mode="r"),
    )


def _unit_ends(corpus: Tokens, newline_mask: np.ndarray | None) -> Iterator[np.ndarray]:
    """Exclusive ends of documents or lines in stream order, a chunk at a time."""
    if newline_mask is None:
        for at in range(0, len(corpus.document_ends), _CHUNK):
            yield np.asarray(corpus.document_ends[at : at + _CHUNK])
        return
    closes = newline_mask.copy()
    closes[EOS_ID] = True
    for at in range(0, len(corpus.tokens), _CHUNK):
        yield at + 1 + np.flatnonzero(closes[corpus.tokens[at : at + _CHUNK]])


def _pieces(unit_ends: Iterator[np.ndarray], length: int) -> Iterator[tuple[list, list]]:
    """Units cut to at most L - 1 tokens: (starts, tokens), a chunk at a time."""
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
        tokens = np.minimum(np.repeat(ends, counts) - piece_starts, longest)
        keep = tokens > 1  # what is one token long is only the mark that closes the unit
        yield piece_starts[keep].tolist(), tokens[keep].tolist()


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

        for row in _best_fit(pieces, length):
            flat += row
            written += len(row) // 2
            row_ends.append(written)
            if len(row_ends) >= _CHUNK // 16:
                flush()
        flush()
    if not written:
        raise InputError("the corpus has no text: every document is empty; give other files")


def _best_fit(pieces: Iterator[tuple[list, list]], length: int) -> Iterator[list[int]]:
    """Full rows, each as a flat list start, tokens, start, tokens, ..

    Online best fit: a piece goes to the waiting row it fills most tightly, or opens one. When too
    many wait, the fullest leaves. Rows wait in one stack a free space; the bits of `spaces` say
    which stacks hold any, so that the tightest is a shift and a lowest bit away.
    """
    stacks: list[list[list[int]]] = [[] for _ in range(length)]
    spaces = waiting = 0
    for starts, tokens in pieces:
        for start, size in zip(starts, tokens, strict=True):
            needed = size + 1  # `<s>`
            fitting = spaces >> needed
            if fitting:
                space = needed + (fitting & -fitting).bit_length() - 1
                stack = stacks[space]
                row = stack.pop()
                waiting -= 1
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
            waiting += 1
            if waiting > _WAITING_ROWS:
                space = (spaces & -spaces).bit_length() - 1
                yield stacks[space].pop()
                waiting -= 1
                if not stacks[space]:
                    spaces ^= 1 << space
    for stack in stacks:
        yield from stack


class _EvenSubset:
    """`count` rows of another source, evenly spaced over it."""

    def __init__(self, rows: Rows, count: int):
        self._rows = rows
        self._count = count

    @property
    def fill(self) -> float:
        return self._rows.fill

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._rows[index * len(self._rows) // self._count]


def subsample_evenly(rows: Rows, count: int) -> Rows:
    """At most `count` rows, taken evenly from all over, so that a few stand for the whole."""
    return rows if len(rows) <= count else _EvenSubset(rows, count)

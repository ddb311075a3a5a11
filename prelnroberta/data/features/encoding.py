"""What all tasks ask of a tokenizer: many texts at once, rows of one or two, and windows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prelnroberta.data.tokenizer import BOS_ID, EOS_ID
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers

PAIR_SPECIALS = 4  # <s> A </s></s> B </s>

_CHUNK = 1024  # texts encoded in parallel; bounds the memory of their encodings


def plain(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer, or, where it pads or cuts, a copy that does not."""
    if tokenizer.padding is None and tokenizer.truncation is None:
        return tokenizer
    copy = _copied(tokenizer)
    copy.no_padding()
    copy.no_truncation()
    return copy


def with_prefix_space(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that reads each word of a split text as if a space stood before it.

    A byte-level piece holds the space before its word, so split words need it back, the first one
    too: transformers' `add_prefix_space=True`.
    """
    from tokenizers import pre_tokenizers

    copy = _copied(plain(tokenizer))
    copy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return copy


def _copied(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.to_str())


def encodings(
    tokenizer: tokenizers.Tokenizer, inputs: Iterable[Any], **options: Any
) -> Iterator[tokenizers.Encoding]:
    """Encodings of inputs of any number, without specials, in bounded memory."""
    inputs = iter(inputs)
    while chunk := list(itertools.islice(inputs, _CHUNK)):
        yield from tokenizer.encode_batch(chunk, add_special_tokens=False, **options)


def token_ids(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """int32 [tokens] of each text, without specials."""
    for encoding in encodings(plain(tokenizer), texts):
        yield np.array(encoding.ids, np.int32)


def single_row(ids: np.ndarray, max_length: int) -> tuple[np.ndarray, bool]:
    """`<s> A </s>` of at most `max_length` tokens, and whether A was cut."""
    kept = ids[: max_length - 2]
    return np.concatenate([[BOS_ID], kept, [EOS_ID]], dtype=np.int32), len(kept) < len(ids)


def pair_row(first: np.ndarray, second: np.ndarray, max_length: int) -> tuple[np.ndarray, bool]:
    """`<s> A </s></s> B </s>` of at most `max_length` tokens, and whether one was cut.

    The longer one is cut first, then both to halves, as by transformers' `truncation=True`
    (tokenizers, utils/truncation.rs, LongestFirst).
    """
    room = max_length - PAIR_SPECIALS
    short, long = sorted((len(first), len(second)))
    if short + long > room:
        long = max(short, room - short)
        if short + long > room:
            short, long = room // 2, room - room // 2
    one, two = (long, short) if len(first) > len(second) else (short, long)
    parts = [[BOS_ID], first[:one], [EOS_ID, EOS_ID], second[:two], [EOS_ID]]
    cut = one < len(first) or two < len(second)
    return np.concatenate(parts, dtype=np.int32), cut


def check_max_length(max_length: int) -> None:
    """Raises InputError where the specials of a pair alone do not fit."""
    if max_length < PAIR_SPECIALS:
        raise InputError(f"max_length={max_length}: expected {PAIR_SPECIALS} or more tokens a row")


def windows(tokens: int, room: int, doc_stride: int) -> Sequence[tuple[int, int]]:
    """(start, end) of the windows of at most `room` of `tokens`, `doc_stride` in common.

    As tokenizers' overflow: the last window ends with the text, and begins where it begins.

    Raises:
        InputError: doc_stride leaves no step.
    """
    if not 0 <= doc_stride < room:
        raise InputError(
            f"doc_stride={doc_stride}: expected 0 to {room - 1} for windows of {room} tokens"
        )
    step = room - doc_stride
    starts = range(0, max(tokens - doc_stride, 1), step)
    return [(start, min(start + room, tokens)) for start in starts]

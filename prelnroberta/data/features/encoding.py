"""Tokenization shared by all tasks: encoding in bounded memory, rows of texts, windows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prelnroberta.data.tokenizer import BOS_ID, EOS_ID
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers

NUM_PAIR_SPECIALS = 4  # <s> A </s></s> B </s>

_CHUNK = 1024  # texts encoded in parallel; bounds the memory of their encodings


def without_padding(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer if it neither pads nor truncates, else a copy that does not."""
    if tokenizer.padding is None and tokenizer.truncation is None:
        return tokenizer
    copy = _copy(tokenizer)
    copy.no_padding()
    copy.no_truncation()
    return copy


def with_prefix_space(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that reads each word of a pre-split text as if a space preceded it.

    A byte-level token includes the space before its word, so pre-split words need that space, the
    first word too. This is transformers' `add_prefix_space=True`.
    """
    from tokenizers import pre_tokenizers

    copy = _copy(without_padding(tokenizer))
    copy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return copy


def _copy(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.to_str())


def encode_in_chunks(
    tokenizer: tokenizers.Tokenizer, inputs: Iterable[Any], **options: Any
) -> Iterator[tokenizers.Encoding]:
    """Encodings of any number of inputs, without special tokens, in bounded memory."""
    inputs = iter(inputs)
    while chunk := list(itertools.islice(inputs, _CHUNK)):
        yield from tokenizer.encode_batch(chunk, add_special_tokens=False, **options)


def encode_texts(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """int32 [tokens] of each text, without special tokens."""
    for encoding in encode_in_chunks(without_padding(tokenizer), texts):
        yield np.array(encoding.ids, np.int32)


def build_single_row(ids: np.ndarray, max_length: int) -> tuple[np.ndarray, bool]:
    """`<s> A </s>` of at most `max_length` tokens, and whether A was truncated."""
    kept = ids[: max_length - 2]
    return np.concatenate([[BOS_ID], kept, [EOS_ID]], dtype=np.int32), len(kept) < len(ids)


def build_pair_row(
    first: np.ndarray, second: np.ndarray, max_length: int
) -> tuple[np.ndarray, bool]:
    """`<s> A </s></s> B </s>` of at most `max_length` tokens, and whether a text was truncated.

    The longer text is truncated first, down to the length of the shorter, then both to half of the
    row each, as with transformers' `truncation=True` (tokenizers, utils/truncation.rs,
    LongestFirst).
    """
    room = max_length - NUM_PAIR_SPECIALS
    short, long = sorted((len(first), len(second)))
    if short + long > room:
        long = max(short, room - short)
        if short + long > room:
            short, long = room // 2, room - room // 2
    len_first, len_second = (long, short) if len(first) > len(second) else (short, long)
    parts: list[Any] = [
        [BOS_ID],
        first[:len_first],
        [EOS_ID, EOS_ID],
        second[:len_second],
        [EOS_ID],
    ]
    truncated = len_first < len(first) or len_second < len(second)
    return np.concatenate(parts, dtype=np.int32), truncated


def check_max_length(max_length: int) -> None:
    """Raises InputError if a row has no room for the special tokens of a pair."""
    if max_length < NUM_PAIR_SPECIALS:
        raise InputError(
            f"max_length={max_length}: expected {NUM_PAIR_SPECIALS} or more tokens a row"
        )


def window_ranges(num_tokens: int, max_tokens: int, doc_stride: int) -> Sequence[tuple[int, int]]:
    """(start, end) of windows of at most `max_tokens` that overlap by `doc_stride` tokens.

    As tokenizers' overflow: every window but the last is full, and the last ends with the text.

    Raises:
        InputError: doc_stride is outside [0, max_tokens).
    """
    if not 0 <= doc_stride < max_tokens:
        raise InputError(
            f"doc_stride={doc_stride}: expected 0 to {max_tokens - 1} for windows of {max_tokens} "
            "tokens"
        )
    step = max_tokens - doc_stride
    starts = range(0, max(num_tokens - doc_stride, 1), step)
    return [(start, min(start + max_tokens, num_tokens)) for start in starts]

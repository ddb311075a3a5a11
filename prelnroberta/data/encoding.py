"""What all tasks ask of a tokenizer: a copy with its own settings, and many texts at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tokenizers

_CHUNK = 1024  # texts encoded in parallel; bounds the memory of their encodings


def copied(tokenizer: tokenizers.Tokenizer, max_length: int | None = None) -> tokenizers.Tokenizer:
    """A tokenizer of the same vocabulary that neither pads nor, without `max_length`, cuts.

    With it, rows are cut to that many tokens, specials included, and of a pair the longer text
    first, as transformers' `truncation=True` does. What is cut stands in `overflowing`.
    """
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    if max_length is not None:
        copy.enable_truncation(max_length, strategy="longest_first")
    return copy


def with_prefix_space(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that reads each word of a split text as if a space stood before it.

    A byte-level piece holds the space before its word, so split words need it back, the first one
    too: transformers' `add_prefix_space=True`.
    """
    from tokenizers import pre_tokenizers

    copy = copied(tokenizer)
    copy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return copy


def encodings(
    tokenizer: tokenizers.Tokenizer, inputs: Iterable[Any], **options: Any
) -> Iterator[tokenizers.Encoding]:
    """`encode_batch` of inputs of any number, in bounded memory."""
    inputs = list(inputs)
    for start in range(0, len(inputs), _CHUNK):
        yield from tokenizer.encode_batch(inputs[start : start + _CHUNK], **options)


def windows(tokens: int, room: int, stride: int) -> Sequence[tuple[int, int]]:
    """(start, end) of the windows of at most `room` tokens over `tokens`, overlapping by `stride`.

    As tokenizers' overflow: the last window ends with the text, and begins where it begins.
    """
    if not 0 <= stride < room:
        raise ValueError(f"stride={stride}: expected 0 to {room - 1} for windows of {room}")
    step = room - stride
    starts = range(0, max(tokens - stride, 1), step)
    return [(start, min(start + room, tokens)) for start in starts]


def ids_of(encoding: tokenizers.Encoding) -> np.ndarray:
    return np.array(encoding.ids, np.int32)

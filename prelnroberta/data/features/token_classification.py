"""Token classification: sentences -> features -> batches -> a tag for each word, entities.

A batch, B rows of L tokens:
    input_ids, attention_mask    int32 [B, L]
    labels                       int32 [B, L], -100 at tokens without a label
    weights                      float32 [B], 1 for a row of words, 0 for a padding row
If the sentences have no tags, `labels` is absent.

Words are tokenized as if a space preceded each (`add_prefix_space`). A sentence longer than a row
becomes several overlapping windows; each word is labelled and predicted in the window in which it
has the most context, so every word gets exactly one prediction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prelnroberta.config import IGNORE_INDEX
from prelnroberta.data.features.base import Features, collate_tokens, pad_rows
from prelnroberta.data.features.encoding import (
    check_max_length,
    encode_in_chunks,
    window_ranges,
    with_prefix_space,
)
from prelnroberta.data.readers.bio_tags import conlleval_spans, is_entity_tag
from prelnroberta.data.readers.conll import Sentence
from prelnroberta.data.readers.labels import LabelIds
from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.shuffle import Batch
from prelnroberta.data.tokenizer import BOS_ID, EOS_ID
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers


@dataclasses.dataclass(frozen=True)
class TokenFeatures(Features):
    """Rows `<s> words </s>`: one for each sentence, or several overlapping windows of a long one.

    Attributes:
        examples: the usable sentences, in order.
        example_indices: int [rows], the sentence of each row.
        input_ids: int32 [tokens] of each row.
        labels: int32 [tokens] of each row, or None.
        word_positions: int [words, 2] of each row: the position of a word's first token, and the
            word's index in the sentence, for each word that is predicted in this row.
    """

    per_token_arrays = ("labels",)

    examples: list[Sentence]
    example_indices: np.ndarray
    input_ids: list[np.ndarray]
    labels: list[np.ndarray] | None
    word_positions: list[np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.input_ids], np.int64)

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        """The batch of the rows at `indices` [B], see the module docstring."""
        batch = collate_tokens(self.input_ids, indices, length)
        if self.labels is not None:
            batch["labels"] = pad_rows(self.labels, indices, length, IGNORE_INDEX)
        return batch

    def gather_words(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Values [L, ...] of each row, for example logits -> [words, ...] of each sentence."""
        gathered: list[np.ndarray | None] = [None] * len(self.examples)
        rows = zip(self.example_indices, self.word_positions, values, strict=True)
        for example, word_positions, row in rows:
            if gathered[example] is None:
                words = len(self.examples[example].words)
                gathered[example] = np.empty((words, *row.shape[1:]), row.dtype)
            gathered[example][word_positions[:, 1]] = row[word_positions[:, 0]]
        return gathered  # type: ignore[return-value]


def token_features(
    sentences: Sequence[Sentence],
    tokenizer: tokenizers.Tokenizer,
    max_length: int,
    labels: Sequence[str] = (),
    label_all_tokens: bool = False,
    doc_stride: int | None = None,
    row_errors: RowErrors | None = None,
) -> TokenFeatures:
    """Tokenizes sentences and converts their tags to the ids of the names `labels`.

    The token ids are those of transformers' `tokenizer(words, is_split_into_words=True)` with
    `add_prefix_space=True`, in windows as with `return_overflowing_tokens=True`.

    Args:
        max_length: maximal number of tokens of a row, including `<s>` and `</s>`.
        labels: tag names in the order of their ids (`conll.tag_names`). Ignored for sentences
            without tags.
        label_all_tokens: label every token of a word, continuing B- with I-; by default only the
            first token of a word has a label.
        doc_stride: tokens that neighbouring windows share; by default a quarter of a row.
        row_errors: collects sentences with a tag that is not in `labels`; they are left out.

    Raises:
        InputError: there are no usable sentences; or some are unusable and `row_errors` is None.
    """
    check_max_length(max_length)
    row_errors, is_owner = ensure_collector(row_errors)
    row_errors.ensure_row_count(len(sentences))
    tagged = bool(sentences) and sentences[0].tags is not None
    ids = LabelIds(labels) if tagged else None
    kept, word_labels = _label_words(sentences, ids, row_errors)
    if is_owner:
        row_errors.raise_if_any()
    if not kept:
        raise InputError(f"no sentences left: {row_errors.summary}")

    max_tokens = max_length - 2
    doc_stride = max_tokens // 4 if doc_stride is None else doc_stride
    continuation = _continuation_labels(ids.names) if label_all_tokens and ids else None
    example_indices, input_ids, row_labels, word_positions = [], [], [], []
    encodings = encode_in_chunks(
        with_prefix_space(tokenizer),
        (sentence.words for sentence in kept),
        is_pretokenized=True,
    )
    for example, encoding in enumerate(encodings):
        tokens = np.array(encoding.ids, np.int32)
        word_ids = np.array(encoding.word_ids)
        first_tokens = np.flatnonzero(np.diff(word_ids, prepend=-1))
        windows = window_ranges(len(tokens), max_tokens, doc_stride)
        best_windows = _windows_with_most_context(first_tokens, windows)
        for number, window in enumerate(windows):
            predicted = first_tokens[best_windows == number]
            row = np.concatenate([[BOS_ID], tokens[slice(*window)], [EOS_ID]])
            example_indices.append(example)
            input_ids.append(row.astype(np.int32))
            word_positions.append(np.stack([predicted - window[0] + 1, word_ids[predicted]], 1))
            if tagged:
                row_labels.append(
                    _window_labels(window, predicted, word_ids, word_labels[example], continuation)
                )
    return TokenFeatures(
        kept,
        np.array(example_indices),
        input_ids,
        row_labels if tagged else None,
        word_positions,
    )


def _label_words(
    sentences: Sequence[Sentence], ids: LabelIds | None, row_errors: RowErrors
) -> tuple[list[Sentence], list[np.ndarray]]:
    """(sentences whose tags are all known, int32 [words] label ids of each)."""
    kept, word_labels = [], []
    for sentence in sentences:
        found = [ids.find(tag) for tag in sentence.tags] if ids is not None else []
        problem = next((f"word {i}: {f}" for i, f in enumerate(found) if isinstance(f, str)), None)
        if problem:
            row_errors.add(sentence.location, problem)
            continue
        # Tags become names, even if the file has the numbers of the labels.
        tags = [ids.names[i] for i in found if isinstance(i, int)] if ids else sentence.tags
        kept.append(sentence._replace(tags=tags))
        word_labels.append(np.array(found, np.int32))
    return kept, word_labels


def _window_labels(
    window: tuple[int, int],
    predicted: np.ndarray,
    word_ids: np.ndarray,
    word_labels: np.ndarray,
    continuation: np.ndarray | None,
) -> np.ndarray:
    """int32 [tokens of the row]: labels of the words whose first tokens are `predicted`.

    Args:
        window: start and end in the sentence's tokens.
        word_ids: int [tokens of the sentence], the word of each token.
        continuation: int32 [C], the label of a word's further tokens; None: they have no label.
    """
    start, end = window
    labels = np.full(end - start + 2, IGNORE_INDEX, np.int32)
    labels[predicted - start + 1] = word_labels[word_ids[predicted]]
    if continuation is not None:
        is_first = np.diff(word_ids, prepend=-1) != 0
        further = start + np.flatnonzero(~is_first[start:end])
        further = further[np.isin(word_ids[further], word_ids[predicted])]
        labels[further - start + 1] = continuation[word_labels[word_ids[further]]]
    return labels


def _windows_with_most_context(
    positions: np.ndarray, windows: Sequence[tuple[int, int]]
) -> np.ndarray:
    """int [k]: for each position, the window in which its shorter side of context is longest."""
    if len(windows) == 1:
        return np.zeros(len(positions), int)
    starts, ends = np.array(windows).T[:, :, None]
    context = np.minimum(positions - starts, ends - 1 - positions)  # negative outside
    return context.argmax(axis=0)


def _continuation_labels(names: Sequence[str]) -> np.ndarray:
    """int32 [C]: the label of a word's further tokens: I- for B-, otherwise the word's own."""
    ids = {name: i for i, name in enumerate(names)}
    return np.array(
        [ids.get("I" + name[1:], i) if name[:2] == "B-" else i for i, name in enumerate(names)],
        np.int32,
    )


class Entity(NamedTuple):
    """Words `start` to `end` (exclusive) of a sentence; `score` is their mean tag probability."""

    type: str
    start: int
    end: int
    text: str
    score: float


def decode_entities(
    sentence: Sentence, tags: Sequence[str], scores: Sequence[float]
) -> list[Entity]:
    """The entities of a sentence, from a predicted tag and its probability for each word.

    Tags are read as conlleval reads them, so an I- without a preceding B- also opens an entity.
    Returns no entities if a tag is not an entity tag.
    """
    if not all(is_entity_tag(tag) for tag in tags):
        return []
    return [
        Entity(
            span.type,
            span.start,
            span.end,
            " ".join(sentence.words[span.start : span.end]),
            float(np.mean(scores[span.start : span.end])),
        )
        for span in conlleval_spans(tags)
    ]

"""Token classification: sentences -> features -> batches -> a tag a word, entities.

A batch, B rows of L tokens:
    input_ids, attention_mask    int32 [B, L]
    labels                       int32 [B, L], -100 where nothing is asked
    weights                      float32 [B], 1 for a row of words, 0 for a filling row
Without tags in the sentences there is no `labels`.

Words are tokenized as if a space stood before each (`add_prefix_space`). A sentence longer than a
row becomes several windows that overlap, and each word is asked, and answered, in the one where it
has most context: no word goes without a prediction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prelnroberta.config import IGNORE_INDEX
from prelnroberta.data.features.base import Features, collate_tokens, padded
from prelnroberta.data.features.encoding import (
    check_max_length,
    encodings,
    windows,
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
    """Rows `<s> words </s>`: one a sentence, or several overlapping windows of a long one.

    Attributes:
        examples: the sentences that are left, in order.
        owners: int [rows], the sentence of each row.
        input_ids: int32 [tokens] each.
        labels: int32 [tokens] each, or None.
        asked: int [k, 2] each: position in the row and number of the word that is answered there.
    """

    by_token = ("labels",)

    examples: list[Sentence]
    owners: np.ndarray
    input_ids: list[np.ndarray]
    labels: list[np.ndarray] | None
    asked: list[np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.input_ids], np.int64)

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        """The module's batch of the rows at `indices` [B]; -1 fills up."""
        batch = collate_tokens(self.input_ids, indices, length)
        if self.labels is not None:
            batch["labels"] = padded(self.labels, indices, length, IGNORE_INDEX)
        return batch

    def gather_words(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """From values [L, ...] of each row (logits, say) to [words, ...] of each sentence."""
        found: list[np.ndarray | None] = [None] * len(self.examples)
        for owner, asked, row in zip(self.owners, self.asked, values, strict=True):
            if found[owner] is None:
                words = len(self.examples[owner].words)
                found[owner] = np.empty((words, *row.shape[1:]), row.dtype)
            found[owner][asked[:, 1]] = row[asked[:, 0]]
        return found  # type: ignore[return-value]


def token_features(
    sentences: Sequence[Sentence],
    tokenizer: tokenizers.Tokenizer,
    max_length: int,
    labels: Sequence[str] = (),
    label_all_tokens: bool = False,
    doc_stride: int | None = None,
    bad: RowErrors | None = None,
) -> TokenFeatures:
    """Features of sentences, tags as ids of the names `labels`.

    The ids are those of transformers' `tokenizer(words, is_split_into_words=True)` with
    `add_prefix_space=True`, in windows as by `return_overflowing_tokens=True`.

    Args:
        max_length: longest row, with `<s>` and `</s>`.
        labels: names of the tags, id by id (`conll.tag_names`). Unread for sentences without tags.
        label_all_tokens: label every token of a word, B- continued by I-, or only the first.
        doc_stride: tokens that neighbouring windows share; by default a quarter of a row.
        bad: takes sentences with a tag that is not among `labels`; they are left out.

    Raises:
        InputError: no sentences (left), or bad ones where `bad` is None.
    """
    check_max_length(max_length)
    room = max_length - 2
    doc_stride = room // 4 if doc_stride is None else doc_stride
    bad, own = ensure_collector(bad)
    bad.ensure_row_count(len(sentences))
    tagged = bool(sentences) and sentences[0].tags is not None
    ids = LabelIds(labels) if tagged else None
    kept, word_labels = [], []
    for sentence in sentences:
        found = [ids.find(tag) for tag in sentence.tags] if ids is not None else []
        problem = next((f"word {i}: {f}" for i, f in enumerate(found) if isinstance(f, str)), None)
        if problem:
            bad.add(sentence.place, problem)
            continue
        # By their names from here on, also where the file has numbers.
        kept.append(sentence._replace(tags=[ids.names[i] for i in found]) if ids else sentence)
        word_labels.append(np.array(found, np.int32))
    if own:
        bad.raise_if_any()
    if not kept:
        raise InputError(f"no sentences left: {bad.summary}")

    continued = _continued(ids.names) if ids is not None else None
    owners, input_ids, row_labels, asked = [], [], [], []
    encoded = encodings(
        with_prefix_space(tokenizer),
        (sentence.words for sentence in kept),
        is_pretokenized=True,
    )
    for owner, encoding in enumerate(encoded):
        tokens = np.array(encoding.ids, np.int32)
        word_of = np.array(encoding.word_ids)
        first = np.flatnonzero(np.diff(word_of, prepend=-1))
        where = windows(len(tokens), room, doc_stride)
        at_home = _homes(first, where)
        for number, (start, end) in enumerate(where):
            mine = first[at_home == number]
            owners.append(owner)
            input_ids.append(np.concatenate([[BOS_ID], tokens[start:end], [EOS_ID]]))
            asked.append(np.stack([mine - start + 1, word_of[mine]], axis=1))
            if continued is not None:
                row = np.full(end - start + 2, IGNORE_INDEX, np.int32)
                row[mine - start + 1] = word_labels[owner][word_of[mine]]
                if label_all_tokens:
                    inside = np.setdiff1d(np.arange(start, end), first)
                    inside = inside[np.isin(word_of[inside], word_of[mine])]
                    row[inside - start + 1] = continued[word_labels[owner][word_of[inside]]]
                row_labels.append(row)
    return TokenFeatures(
        kept,
        np.array(owners),
        [row.astype(np.int32) for row in input_ids],
        row_labels if continued is not None else None,
        asked,
    )


def _homes(positions: np.ndarray, where: Sequence[tuple[int, int]]) -> np.ndarray:
    """int [k]: for each token position, the window where its shorter side of context is longest."""
    if len(where) == 1:
        return np.zeros(len(positions), int)
    starts, ends = np.array(where).T[:, :, None]
    context = np.minimum(positions - starts, ends - 1 - positions)  # negative outside
    return context.argmax(axis=0)


def _continued(names: Sequence[str]) -> np.ndarray:
    """int32 [C]: the label of a word's further pieces: I- for B-, otherwise the word's own."""
    ids = {name: i for i, name in enumerate(names)}
    return np.array(
        [ids.get("I" + name[1:], i) if name[:2] == "B-" else i for i, name in enumerate(names)],
        np.int32,
    )


class Entity(NamedTuple):
    """Words start to end (exclusive) of a sentence, and how sure the model is: mean over them."""

    type: str
    start: int
    end: int
    text: str
    score: float


def decode_entities(
    sentence: Sentence, tags: Sequence[str], scores: Sequence[float]
) -> list[Entity]:
    """Entities of a sentence from a predicted tag and its probability for each word.

    Tags are read as conlleval reads them, so that an I- without its B- is not lost.
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

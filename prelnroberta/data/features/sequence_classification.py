"""Sequence classification and regression: tables -> examples -> features -> batches.

A batch, B rows of L tokens and C classes:
    input_ids, attention_mask    int32 [B, L]
    labels                       int32 [B], -100 in filling rows (single label);
                                 float32 [B, C] in {0, 1} (multi-label); float32 [B] (regression)
    weights                      float32 [B], 1 for an example, 0 for a filling row
Without labels in the examples there is no `labels`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prelnroberta.config import IGNORE_INDEX, REGRESSION, SINGLE_LABEL
from prelnroberta.data.features.base import PADDING_INDEX, Features, collate_tokens
from prelnroberta.data.features.encoding import check_max_length, pair_row, single_row, token_ids
from prelnroberta.data.readers.classification import TextExample, split_labels
from prelnroberta.data.readers.labels import LabelIds
from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.shuffle import Batch
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers


@dataclasses.dataclass(frozen=True)
class TextFeatures(Features):
    """Token ids of each example, `<s> A </s>` or `<s> A </s></s> B </s>`, and its label.

    Attributes:
        examples: those that are left, in order.
        input_ids: int32 [tokens] each.
        labels: int32 [n], float32 [n, C] or [n] (regression), or None.
        truncated: how many examples were cut to the greatest length.
    """

    examples: list[TextExample]
    input_ids: list[np.ndarray]
    labels: np.ndarray | None
    truncated: int

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.input_ids], np.int64)

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        """The module's batch of the examples at `indices` [B]; -1 fills up."""
        batch = collate_tokens(self.input_ids, indices, length)
        if self.labels is not None:
            batch["labels"] = labels = self.labels[indices]
            labels[np.asarray(indices) == PADDING_INDEX] = (
                IGNORE_INDEX if labels.dtype == np.int32 else 0
            )
        return batch


def text_features(
    examples: Sequence[TextExample],
    tokenizer: tokenizers.Tokenizer,
    max_length: int,
    problem_type: str = SINGLE_LABEL,
    labels: Sequence[str] = (),
    bad: RowErrors | None = None,
) -> TextFeatures:
    """Features of examples, with labels as ids of the names `labels` or, in regression, numbers.

    The ids are those of transformers' `tokenizer(text, pair, truncation=True)`.

    Args:
        max_length: rows are cut to so many tokens, the longer text of a pair first.
        problem_type: the config's. Unread where the examples have no labels.
        labels: the names of the classes, id by id (`labels.discover_labels`).
        bad: takes examples whose label is no name or number; they are left out.

    Raises:
        InputError: no examples (left), or bad ones where `bad` is None.
    """
    check_max_length(max_length)
    bad, own = ensure_collector(bad)
    bad.ensure_row_count(len(examples))
    labelled = bool(examples) and examples[0].label is not None
    kept, values = [], []
    to_value = _label_reader(problem_type, labels) if labelled else lambda label: 0
    for example in examples:
        value = to_value(example.label)
        if isinstance(value, str):
            bad.add(example.place, value)
            continue
        kept.append(example)
        values.append(value)
    if own:
        bad.raise_if_any()
    if not kept:
        raise InputError(f"no examples left: {bad.summary}")
    firsts = token_ids(tokenizer, (e.text for e in kept))
    seconds = token_ids(tokenizer, (e.pair for e in kept if e.pair is not None))
    input_ids, truncated = [], 0
    for example, ids in zip(kept, firsts, strict=True):
        if example.pair is None:
            row, cut = single_row(ids, max_length)
        else:
            row, cut = pair_row(ids, next(seconds), max_length)
        input_ids.append(row)
        truncated += cut
    dtype = np.int32 if problem_type == SINGLE_LABEL else np.float32
    return TextFeatures(kept, input_ids, np.array(values, dtype) if labelled else None, truncated)


def _label_reader(problem_type: str, labels: Sequence[str]) -> Any:
    """label -> its value in the batch, or what is wrong with it, as str."""
    if problem_type == REGRESSION:
        return _number
    ids = LabelIds(labels)
    if problem_type == SINGLE_LABEL:
        return ids.find

    def sides(label: Any) -> np.ndarray | str:
        row = np.zeros(len(ids.names), np.float32)
        for name in split_labels(label):
            found = ids.find(name)
            if isinstance(found, str):
                return found
            row[found] = 1
        return row

    return sides


def _number(label: Any) -> float | str:
    try:
        value = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError):
        value = math.nan
    return value if math.isfinite(value) else f"expected a number as label, found {label!r:.40}"

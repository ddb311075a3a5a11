"""Sequence classification and regression: text examples -> features -> batches.

A batch, B rows of L tokens and C classes:
    input_ids, attention_mask    int32 [B, L]
    labels                       single label: int32 [B], -100 in padding rows;
                                 multi-label: float32 [B, C] in {0, 1}; regression: float32 [B]
    weights                      float32 [B], 1 for an example, 0 for a padding row
If the examples have no labels, `labels` is absent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prelnroberta.config import IGNORE_INDEX, REGRESSION, SINGLE_LABEL
from prelnroberta.data.features.base import PADDING_INDEX, Features, collate_tokens
from prelnroberta.data.features.encoding import (
    build_pair_row,
    build_single_row,
    check_max_length,
    encode_texts,
)
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
        examples: the usable examples, in order.
        input_ids: int32 [tokens] of each example.
        labels: int32 [n], float32 [n, C] (multi-label) or [n] (regression), or None.
        num_truncated: number of examples truncated to the maximal length.
    """

    examples: list[TextExample]
    input_ids: list[np.ndarray]
    labels: np.ndarray | None
    num_truncated: int

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.input_ids], np.int64)

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        """The batch of the examples at `indices` [B], see the module docstring."""
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
    row_errors: RowErrors | None = None,
) -> TextFeatures:
    """Tokenizes examples and converts their labels to ids or, in regression, to numbers.

    The token ids are those of transformers' `tokenizer(text, pair, truncation=True)`.

    Args:
        max_length: maximal number of tokens of a row. The longer text of a pair is truncated first.
        problem_type: the config's. Ignored if the examples have no labels.
        labels: class names in the order of their ids (`labels.discover_labels`).
        row_errors: collects examples with an unknown class name or an invalid number; they are
            left out.

    Raises:
        InputError: there are no usable examples; or some are unusable and `row_errors` is None.
    """
    check_max_length(max_length)
    row_errors, is_owner = ensure_collector(row_errors)
    row_errors.ensure_row_count(len(examples))
    labelled = bool(examples) and examples[0].label is not None
    kept, targets = [], []
    to_target = _target_function(problem_type, labels) if labelled else lambda label: 0
    for example in examples:
        target = to_target(example.label)
        if isinstance(target, str):
            row_errors.add(example.location, target)
            continue
        kept.append(example)
        targets.append(target)
    if is_owner:
        row_errors.raise_if_any()
    if not kept:
        raise InputError(f"no examples left: {row_errors.summary}")
    input_ids, num_truncated = _encode(kept, tokenizer, max_length)
    dtype = np.int32 if problem_type == SINGLE_LABEL else np.float32
    label_array = np.array(targets, dtype) if labelled else None
    return TextFeatures(kept, input_ids, label_array, num_truncated)


def _encode(
    examples: Sequence[TextExample], tokenizer: tokenizers.Tokenizer, max_length: int
) -> tuple[list[np.ndarray], int]:
    """(int32 [tokens] of each example, number of truncated examples)."""
    texts = encode_texts(tokenizer, (e.text for e in examples))
    pairs = encode_texts(tokenizer, (e.pair for e in examples if e.pair is not None))
    input_ids, num_truncated = [], 0
    for example, ids in zip(examples, texts, strict=True):
        if example.pair is None:
            row, truncated = build_single_row(ids, max_length)
        else:
            row, truncated = build_pair_row(ids, next(pairs), max_length)
        input_ids.append(row)
        num_truncated += truncated
    return input_ids, num_truncated


def _target_function(problem_type: str, labels: Sequence[str]) -> Callable[[Any], Any]:
    """A function from a label as read to its value in the batch, or to an error message (str)."""
    if problem_type == REGRESSION:
        return _parse_number
    ids = LabelIds(labels)
    if problem_type == SINGLE_LABEL:
        return ids.find

    def to_multi_hot(label: Any) -> np.ndarray | str:
        target = np.zeros(len(ids.names), np.float32)
        for name in split_labels(label):
            found = ids.find(name)
            if isinstance(found, str):
                return found
            target[found] = 1
        return target

    return to_multi_hot


def _parse_number(label: Any) -> float | str:
    try:
        value = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError):
        value = math.nan
    return value if math.isfinite(value) else f"expected a number as label, found {label!r:.40}"

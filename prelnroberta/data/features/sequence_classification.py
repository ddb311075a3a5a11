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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from prelnroberta.data.batches.buckets import IGNORE, NOTHING, Features, row_batch
from prelnroberta.data.features.encoding import check_max_length, pair_row, single_row, token_ids
from prelnroberta.data.pretraining.loader import Batch
from prelnroberta.data.readers.labels import LabelIds
from prelnroberta.data.readers.row_errors import BadRows, settled
from prelnroberta.data.readers.tables import Column, stream_table, text_problem
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


class TextExample(NamedTuple):
    """A text or pair of texts; `label` is a cell or JSON value as read, None where there is none.

    Of several labels, `label` is a list of names.
    """

    place: str
    text: str
    pair: str | None = None
    label: Any = None


def read_examples(
    path: str | Path,
    text: Column,
    pair: Column | None = None,
    label: Column | Sequence[Column] | None = None,
    header: bool | None = None,
    bad: BadRows | None = None,
) -> list[TextExample]:
    """Every example of a file; arguments as of `stream_examples`.

    Raises:
        InputError: the file's, and bad rows where `bad` is None.
    """
    bad, own = settled(bad)
    found = list(stream_examples(path, text, bad, pair, label, header))
    if own:
        bad.settle()
    return found


def stream_examples(
    path: str | Path,
    text: Column,
    bad: BadRows,
    pair: Column | None = None,
    label: Column | Sequence[Column] | None = None,
    header: bool | None = None,
    file: BinaryIO | None = None,
) -> Iterator[TextExample]:
    """Examples of a CSV, TSV, JSON-lines or text file as they are read (`tables.stream_table`).

    Args:
        text, pair: columns of the first text, and of the second if there are pairs.
        bad: takes the table's bad rows, texts that are none, and rows without a label.
        label: column of the label. Several columns are several labels, each cell 0 or 1, and the
            columns' names are those of the labels. None: there are none to read.
    """
    several = label is not None and not isinstance(label, str | int)
    wanted = [text] + ([] if pair is None else [pair])
    label_columns = list(label) if several else [] if label is None else [label]
    records = stream_table(path, [*wanted, *label_columns], bad, header=header, file=file)
    for place, values in records:
        problem = next(filter(None, (text_problem(name, values[name]) for name in wanted)), None)
        value = None if label is None else values[label_columns[0]]
        if several:
            sides = {column: str(values[column]).strip().lower() for column in label_columns}
            wrong = [c for c, side in sides.items() if side not in _SIDES]
            if wrong:
                problem = (
                    problem or f"expected 0 or 1 under {wrong[0]!r}, found {sides[wrong[0]]!r}"
                )
            value = [str(column) for column, side in sides.items() if _SIDES.get(side)]
        elif label is not None and value is None:
            problem = problem or f"no label under {label!r}"
        if problem:
            bad.add(place, problem)
        else:
            second = None if pair is None else values[pair]
            yield TextExample(place, values[text], second, value)


_SIDES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


def label_names(label: Any) -> list[Any]:
    """The labels of a multi-label example: a JSON list, or text parted by commas."""
    if isinstance(label, str):
        return [name.strip() for name in label.split(",") if name.strip()]
    return list(label) if isinstance(label, list | tuple) else [label]


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
        batch = row_batch(self.input_ids, indices, length)
        if self.labels is not None:
            batch["labels"] = labels = self.labels[indices]
            labels[np.asarray(indices) == NOTHING] = IGNORE if labels.dtype == np.int32 else 0
        return batch


def text_features(
    examples: Sequence[TextExample],
    tokenizer: tokenizers.Tokenizer,
    max_length: int,
    problem_type: str = SINGLE,
    labels: Sequence[str] = (),
    bad: BadRows | None = None,
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
    bad, own = settled(bad)
    bad.at_least(len(examples))
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
        bad.settle()
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
    dtype = np.int32 if problem_type == SINGLE else np.float32
    return TextFeatures(kept, input_ids, np.array(values, dtype) if labelled else None, truncated)


def _label_reader(problem_type: str, labels: Sequence[str]) -> Any:
    """label -> its value in the batch, or what is wrong with it, as str."""
    if problem_type == REGRESSION:
        return _number
    ids = LabelIds(labels)
    if problem_type == SINGLE:
        return ids.find

    def sides(label: Any) -> np.ndarray | str:
        row = np.zeros(len(ids.names), np.float32)
        for name in label_names(label):
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

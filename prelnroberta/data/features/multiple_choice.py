"""Multiple choice: a context and its possible continuations -> features -> batches.

A batch, B rows of C choices of L tokens:
    input_ids, attention_mask    int32 [B, C, L]
    choice_mask                  bool [B, C], which choices there are: rows may have fewer than C
    labels                       int32 [B], -100 in filling rows
    weights                      float32 [B], 1 for an example, 0 for a filling row
Without labels in the examples there is no `labels`. Logits [B, C] go through `masked_logits` before
the loss and before the argmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from prelnroberta.data.batches.buckets import IGNORE, NOTHING, Features
from prelnroberta.data.features.encoding import check_max_length, pair_row, token_ids
from prelnroberta.data.pretraining.loader import Batch
from prelnroberta.data.readers.row_errors import BadRows, settled
from prelnroberta.data.readers.tables import stream_table, text_problem
from prelnroberta.data.tokenizer import PAD_ID
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers

MOST_CHOICES = 32  # more are rather a mistake in the file than a question
# One more than there may be, so that too many are noticed.
_ENDINGS = [f"ending{i}" for i in range(MOST_CHOICES + 1)]


class ChoiceExample(NamedTuple):
    """`choices` follow `context`, each after `prefix`; `label` is the right one's number."""

    place: str
    context: str
    prefix: str
    choices: list[str]
    label: int | None


def read_choices(
    path: str | Path,
    context: str = "sent1",
    prefix: str | None = "sent2",
    choices: str = "endings",
    label: str | None = "label",
    bad: BadRows | None = None,
) -> list[ChoiceExample]:
    """Every example of a file; arguments as of `stream_choices`.

    Raises:
        InputError: the file's, and bad rows where `bad` is None.
    """
    bad, own = settled(bad)
    found = list(stream_choices(path, bad, context, prefix, choices, label))
    if own:
        bad.settle()
    return found


def stream_choices(
    path: str | Path,
    bad: BadRows,
    context: str = "sent1",
    prefix: str | None = "sent2",
    choices: str = "endings",
    label: str | None = "label",
    file: BinaryIO | None = None,
) -> Iterator[ChoiceExample]:
    """Examples from SWAG's columns or from JSON lines as they are read.

    Args:
        path: CSV or TSV with a header, or JSON lines (`tables.stream_table`).
        bad: takes the table's bad rows, and those without 2 to `MOST_CHOICES` choices or whose
            label is none of them.
        context, prefix: columns of the first text and of what stands before every choice; without
            such a prefix (None, or none in the file) the choices stand alone.
        choices: key of a list of choices. Where there is none, the choices are in the columns
            ending0, ending1, ..; empty ones at the end are no choices.
        label: column of the right choice's number, from 0; None: not known.
        file: read in the path's place, which is then only a name (standard input, say).
    """
    optional = [*([prefix] if prefix else []), choices, *_ENDINGS]
    needed = [context, *([label] if label else [])]
    for place, values in stream_table(path, needed, bad, optional, True, file):
        found, problem = _choices(values, choices)
        number = None
        before = values.get(prefix, "") if prefix else ""
        problem = text_problem(context, values[context]) or problem
        problem = problem or (text_problem(prefix, before) if prefix else None)
        if label and not problem:
            number, problem = _number(values[label], len(found))
        if problem:
            bad.add(place, problem)
        else:
            yield ChoiceExample(place, values[context], before, found, number)


def _choices(values: dict[Any, Any], key: str) -> tuple[list[str], str | None]:
    """The choices of a row, and what is wrong with them."""
    if key in values:
        found = values[key]
        if not isinstance(found, list):
            return [], f"expected a list of choices under {key!r}"
    else:
        columns = [name for name in _ENDINGS if name in values]
        if columns != _ENDINGS[: len(columns)]:
            return [], f"choices are missing among {', '.join(columns)}"
        found = [values[name] for name in columns]
        while found and found[-1] in ("", None):
            found.pop()
    problems = (text_problem(f"choice {i}", choice) for i, choice in enumerate(found))
    if problem := next(filter(None, problems), None):
        return [], problem
    if not 2 <= len(found) <= MOST_CHOICES:
        return [], f"expected 2 to {MOST_CHOICES} choices, found {len(found)}"
    return found, None


def _number(value: Any, choices: int) -> tuple[int | None, str | None]:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal():
        return None, f"expected the number of a choice as label, found {text[:40]!r}"
    if int(text) >= choices:
        return None, f"label {text} is not among its {choices} choices, 0 to {choices - 1}"
    return int(text), None


@dataclasses.dataclass(frozen=True)
class ChoiceFeatures(Features):
    """Rows `<s> context </s></s> prefix choice </s>`, one a choice.

    Attributes:
        examples: in order.
        input_ids: int32 [tokens] of each choice of each example.
        labels: int32 [n], or None.
        choices: C, the most choices of an example.
        truncated: how many examples were cut to the greatest length.
    """

    examples: list[ChoiceExample]
    input_ids: list[list[np.ndarray]]
    labels: np.ndarray | None
    choices: int
    truncated: int

    @property
    def lengths(self) -> np.ndarray:
        return np.array([max(map(len, rows)) for rows in self.input_ids], np.int64)

    @property
    def sizes(self) -> np.ndarray:
        return np.array([sum(map(len, rows)) for rows in self.input_ids], np.int64)

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        """The module's batch of the examples at `indices` [B]; -1 fills up."""
        real = np.asarray(indices) != NOTHING
        input_ids = np.full((len(indices), self.choices, length), PAD_ID, np.int32)
        attention_mask = np.zeros_like(input_ids)
        choice_mask = np.zeros(input_ids.shape[:2], bool)
        for i in np.flatnonzero(real):
            rows = self.input_ids[indices[i]]
            choice_mask[i, : len(rows)] = True
            for c, ids in enumerate(rows):
                input_ids[i, c, : len(ids)] = ids
                attention_mask[i, c, : len(ids)] = 1
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "choice_mask": choice_mask,
            "weights": real.astype(np.float32),
        }
        if self.labels is not None:
            batch["labels"] = np.where(real, self.labels[indices], IGNORE).astype(np.int32)
        return batch


def choice_features(
    examples: Sequence[ChoiceExample], tokenizer: tokenizers.Tokenizer, max_length: int
) -> ChoiceFeatures:
    """Features of examples: the ids of transformers' `tokenizer(context, f"{prefix} {choice}",
    truncation=True)` for each choice, regrouped.

    Args:
        max_length: rows are cut to so many tokens, the longer of the two texts first.

    Raises:
        InputError: no examples.
    """
    if not examples:
        raise InputError("no examples to make features of")
    check_max_length(max_length)
    contexts = token_ids(tokenizer, (e.context for e in examples))
    choices = token_ids(
        tokenizer, (f"{e.prefix} {c}" if e.prefix else c for e in examples for c in e.choices)
    )
    input_ids, truncated = [], 0
    for example, context in zip(examples, contexts, strict=True):
        rows = [pair_row(context, next(choices), max_length) for _ in example.choices]
        input_ids.append([ids for ids, _ in rows])
        truncated += any(cut for _, cut in rows)
    known = examples[0].label is not None
    return ChoiceFeatures(
        list(examples),
        input_ids,
        np.array([e.label for e in examples], np.int32) if known else None,
        max(len(e.choices) for e in examples),
        truncated,
    )


def masked_logits(logits: Any, choice_mask: Any) -> Any:
    """Logits [B, C] with 1e30 taken off where there is no choice; for numpy and jax arrays alike.

    Not -inf: over a filling row, which has no choice at all, a softmax of it would be NaN.
    """
    return logits - 1e30 * (1 - choice_mask.astype(logits.dtype))

"""The task, and how its files are read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.flags.field import flag
from experiments.tasks.task_names import TASK_NAMES
from experiments.tasks.task_settings import TaskSettings
from prelnroberta.config import PROBLEM_TYPES, SINGLE_LABEL, RobertaPreLayerNormConfig
from prelnroberta.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFlags:
    """Fields that are None or () are not set: task.json, the task or the model decides."""

    task: str | None = flag(
        None, "The task. Default: the task that --model was trained for.", choices=TASK_NAMES
    )
    max_length: int | None = flag(
        None, "Maximum number of tokens in a row. Default: the maximum of the model."
    )
    skip_bad_rows: bool = flag(False, "Skip rows that cannot be used, and report their number.")
    length_buckets: int = flag(
        4, "Number of lengths that evaluation pads to; each is compiled once."
    )
    eval_positions: int = flag(8192, "Tokens in an evaluation batch, padding included.")
    text_column: str | None = flag(
        None,
        "Column of the (first) text: a name, or a number from 0. Default: text; sent1 for multiple "
        "choice; the first column of CoNLL files, or tokens in JSON lines, for words.",
    )
    pair_column: str | None = flag(
        None, "Column of the second text of a pair, or of the text before the choices."
    )
    label_column: tuple[str, ...] = flag(
        (),
        "Column of the label; several columns of 0 and 1 for multi-label classification. Default: "
        "label; the last column of CoNLL files, or ner_tags in JSON lines, for words.",
    )
    labels: tuple[str, ...] = flag(
        (), "Class names in the order of their ids. Default: those found in --train_file."
    )
    problem_type: str | None = flag(
        None,
        f"Kind of label in sequence classification. Default: {SINGLE_LABEL}.",
        choices=PROBLEM_TYPES,
    )
    label_all_tokens: bool | None = flag(
        None, "Label every token of a word. Default: only its first token."
    )
    doc_stride: int | None = flag(
        None,
        "Tokens by which the windows over a long context overlap. Default: a third of a row.",
    )
    n_best_size: int | None = flag(None, "Number of candidate answers. Default: 20.")
    max_answer_length: int | None = flag(
        None, "Maximum number of tokens in an answer. Default: 30."
    )
    null_score_diff_threshold: float | None = flag(
        None,
        "Predict no answer when its score exceeds that of the best answer by more than this. "
        "Default: 0.",
    )
    mask_rate: float | None = flag(None, "Share of tokens to predict in masked_lm. Default: 0.15.")

    def task_settings(
        self, config: RobertaPreLayerNormConfig, folder: Path | None = None
    ) -> TaskSettings:
        """The settings of the task, for a model of this config.

        Args:
            folder: of a fine-tuned model, whose task.json holds unless a flag is given.

        Raises:
            InputError: no task is given, another one than the model was trained for, or a
                --max_length that the model cannot take.
        """
        values = self._saved(config, folder)
        fields = [field.name for field in dataclasses.fields(TaskSettings)]
        given = {name: getattr(self, name) for name in fields if hasattr(self, name)}
        given |= {name: _column(given[name]) for name in ("text_column", "pair_column")}
        given |= {"label_columns": tuple(map(_column, self.label_column))}
        values |= {name: value for name, value in given.items() if value not in (None, ())}
        longest = config.max_length
        values = {"max_length": longest, **values}
        if not 8 <= values["max_length"] <= longest:
            raise InputError(
                f"--max_length={self.max_length}, expected 8 to {longest}, the maximum of the model"
            )
        for name in ("labels", "label_columns"):
            values[name] = tuple(values.get(name, ()))
        return TaskSettings(**values)

    def _saved(self, config: RobertaPreLayerNormConfig, folder: Path | None) -> dict[str, Any]:
        """What a model folder says of its task."""
        path = folder / "task.json" if folder else None
        if path and path.exists():
            values = read_task_json(path)
            if self.task not in (None, values["task"]):
                raise InputError(f"--task={self.task}: {folder} was trained for {values['task']}")
            return values
        if self.task is None:
            raise InputError(f"--task is missing, expected one of {', '.join(TASK_NAMES)}")
        if folder is None:
            return {}
        labels = tuple(config.id2label.values())
        return {"labels": labels, "problem_type": config.problem_type or SINGLE_LABEL}


def read_task_json(path: Path) -> dict[str, Any]:
    """The fields of TaskSettings in a task.json.

    Raises:
        InputError: a key is not a field, as in files of older versions.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(TaskSettings)}
    if unknown := sorted(values.keys() - known):
        raise InputError(
            f"{path}: unknown keys {', '.join(unknown)}, expected those of {', '.join(known)}; the "
            "file is of an older version of prelnroberta: fine-tune again, or rename the keys"
        )
    return values


def _column(value: str | None) -> str | int | None:
    return int(value) if value is not None and value.lstrip("-").isdecimal() else value

"""The settings of a task; loads no JAX."""

from __future__ import annotations

import dataclasses

from prelnroberta.config import SINGLE_LABEL


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """How files become batches and logits become answers; saved with a model as `task.json`.

    The fields are named after the flags that set them.

    Attributes:
        task: one of `TASK_NAMES`.
        max_length: maximum tokens in a row.
        text_column, pair_column, label_columns: column names, or numbers from 0; None or (): the
            task's default.
        labels: class names in order of their ids; (): those found in the training file.
        problem_type: of sequence classification, as in config.json.
        label_all_tokens: whether every token of a word has its label, or only the first.
        doc_stride: tokens by which windows over a long input overlap; None: the task's default.
        may_be_null: whether questions may have no answer.
        n_best_size, max_answer_length, null_score_diff_threshold: see
            `question_answering.predict_answers`.
        mask_rate: share of tokens to predict, in masked language modeling.
    """

    task: str
    max_length: int
    text_column: str | int | None = None
    pair_column: str | int | None = None
    label_columns: tuple[str | int, ...] = ()
    labels: tuple[str, ...] = ()
    problem_type: str = SINGLE_LABEL
    label_all_tokens: bool = False
    doc_stride: int | None = None
    may_be_null: bool = False
    n_best_size: int = 20
    max_answer_length: int = 30
    null_score_diff_threshold: float = 0.0
    mask_rate: float = 0.15

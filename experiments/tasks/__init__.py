"""The six tasks; `base.py` says what a task is."""

from experiments.tasks.base import Answer, Measured, Row, Task, TaskSettings, cut
from experiments.tasks.classification import (
    MultipleChoice,
    SequenceClassification,
    TokenClassification,
)
from experiments.tasks.language import CausalLM, MaskedLM
from experiments.tasks.questions import QuestionAnswering

__all__ = ["TASKS", "Answer", "Measured", "Row", "Task", "TaskSettings", "cut"]

TASKS: dict[str, type[Task]] = {
    task.model: task
    for task in (
        SequenceClassification,
        TokenClassification,
        QuestionAnswering,
        MultipleChoice,
        CausalLM,
        MaskedLM,
    )
}

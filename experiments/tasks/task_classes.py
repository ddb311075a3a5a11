"""Name of a task -> its class."""

from experiments.tasks.base import Task
from experiments.tasks.classification import (
    MultipleChoice,
    SequenceClassification,
    TokenClassification,
)
from experiments.tasks.language_modeling import CausalLM, MaskedLM
from experiments.tasks.question_answering import QuestionAnswering

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

"""Name of a task -> its class."""

from experiments.tasks.base import Task
from experiments.tasks.language_modeling import CausalLM, MaskedLM
from experiments.tasks.multiple_choice import MultipleChoice
from experiments.tasks.question_answering import QuestionAnswering
from experiments.tasks.sequence_classification import SequenceClassification
from experiments.tasks.token_classification import TokenClassification

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

"""The names of the tasks; imports nothing, so that flags can list them without loading JAX."""

TASK_NAMES = (
    "sequence_classification",
    "token_classification",
    "question_answering",
    "multiple_choice",
    "causal_lm",
    "masked_lm",
)

"""The six tasks; `base.py` defines what a task is.

Loaded on first use, since `--help` imports `task_names` and `task_settings` and must not load JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.tasks.base import EvalResult, Prediction, RowOutputs, Task, truncation_message
    from experiments.tasks.task_classes import TASKS
    from experiments.tasks.task_settings import TaskSettings

__all__ = [
    "TASKS",
    "EvalResult",
    "Prediction",
    "RowOutputs",
    "Task",
    "TaskSettings",
    "truncation_message",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {"TASKS": "task_classes", "TaskSettings": "task_settings"}.get(name, "base")
    return getattr(import_module(f"{__name__}.{module}"), name)

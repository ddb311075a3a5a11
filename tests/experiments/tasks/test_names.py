"""The names of the tasks, which flags list without loading JAX."""

import subprocess
import sys

from experiments.tasks import TASKS
from experiments.tasks.task_names import TASK_NAMES


def test_task_names_are_the_keys_of_tasks():
    assert tuple(TASKS) == TASK_NAMES


def test_names_and_settings_load_no_jax():
    code = (
        "import sys\n"
        "from experiments.tasks.task_names import TASK_NAMES\n"
        "from experiments.tasks import TaskSettings\n"
        "print({'jax', 'numpy', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""The Python code blocks of README run, on a model of a finished run."""

import re
import subprocess
import sys

import pytest

from tests.helpers.programs import ENVIRONMENT, ROOT, finished_run

pytestmark = [pytest.mark.torch, pytest.mark.tensorflow, pytest.mark.oracle]

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_block_runs(number, tmp_path):
    code = BLOCKS[number].replace("runs/demo", str(finished_run()))
    code = code.replace("runs/", f"{tmp_path}/")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_number_of_code_blocks():
    assert len(BLOCKS) == 3

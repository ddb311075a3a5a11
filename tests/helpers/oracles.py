"""Runs the scripts of tests/oracle with transformers 4, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.programs import ROOT

TRANSFORMERS_4 = Path(sys.prefix) / "transformers4"


def run_oracle(script: str, *args: Path) -> None:
    """Runs a script of tests/oracle with transformers 4.57.6, in a process of its own."""
    assert TRANSFORMERS_4.is_dir(), f"{TRANSFORMERS_4} is missing: run `make test`, which makes it"
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    # Scripts that want TensorFlow say so themselves: it takes seconds to load.
    keras = {"USE_TF": "0", "TF_USE_LEGACY_KERAS": "1"}
    subprocess.run(
        [sys.executable, ROOT / "tests/oracle" / script, *args],
        check=True,
        timeout=600,
        env=os.environ | quiet | keras | {"PYTHONPATH": str(TRANSFORMERS_4)},
    )

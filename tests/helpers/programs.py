"""Runs the programs of `experiments` as a user does, in processes of their own."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from experiments.common.run_report import TIMING_FIELDS, read_records

_SCRATCH = tempfile.TemporaryDirectory(prefix="prelnroberta-tests-")
SCRATCH = Path(_SCRATCH.name)
ROOT = Path(__file__).parents[2]
# The extra `viz`: where it is missing, programs write no pictures and no TensorBoard events.
VIZ = importlib.util.find_spec("matplotlib") is not None
# One compilation for all runs of the same shapes.
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(SCRATCH / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def command(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.{program}", *map(str, arguments)]


def call(program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess:
    """Runs a program to its end, with text as its input and outputs."""
    options = {"capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run(command(program, *arguments), cwd=ROOT, env=ENVIRONMENT, **options)


@functools.cache
def corpus_file() -> Path:
    """450 KB of English: the documentation topics that Python includes."""
    path = SCRATCH / "corpus.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def tiny_flags(**changes: Any) -> list[str]:
    """Flags of a run of seconds, with intervals that share no factor."""
    values = {
        "preset": "tiny",
        "vocab_size": 300,
        "sequence_length": 32,
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
        "corpus": corpus_file(),
        "cache_dir": SCRATCH / "cache",
        "validation_fraction": 0.1,
        "steps": 40,
        "warmup_steps": 5,
        "log_every": 7,
        "eval_every": 9,
        "save_every": 4,
        "eval_rows": 16,
    }
    return [f"--{name}={value}" for name, value in (values | changes).items()]


@functools.cache
def finished_run() -> Path:
    """The folder of an uninterrupted run of `tiny_flags()`."""
    run_dir = SCRATCH / "finished"
    done = call("pretrain", *tiny_flags(), f"--run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


def error_line(*arguments, code=2, program="pretrain", **options):
    """Runs a program that must fail and returns its one line of standard error."""
    done = call(program, *arguments, **options)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    assert "compiled" not in done.stdout and "step" not in done.stdout
    lines = [x for x in done.stderr.splitlines() if not x.startswith("token files: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def records(run_dir):
    """The records of a run without times."""
    return [
        {name: value for name, value in record.items() if name not in TIMING_FIELDS}
        for record in read_records(run_dir / "metrics.jsonl")
    ]

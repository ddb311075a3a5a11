"""What tests share: random trees, batches with pads on every side, and how errors are measured."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig

TINY = RobertaPreLayerNormConfig.preset("tiny")
# Odd on purpose: two token types, another pad id, sizes that share no factor with the defaults.
ODD = RobertaPreLayerNormConfig(
    vocab_size=101,
    hidden_size=42,
    num_hidden_layers=3,
    num_attention_heads=7,
    intermediate_size=37,
    hidden_act="gelu_new",
    max_position_embeddings=33,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    pad_token_id=3,
    tie_word_embeddings=False,
)


def random_params(
    config: RobertaPreLayerNormConfig, model: str = "masked_lm", seed: int = 0, scale: float = 0.3
) -> parameters.Tree:
    """A tree in which no parameter has its initial value: norms and biases are random as well."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, shape in parameters.shapes(config, model).items():
        value = scale * rng.standard_normal(shape)
        leaves[path] = (value + 1.0 if path.endswith("/scale") else value).astype(np.float32)
    return parameters.unflatten(leaves)


def ragged_batch(
    config: RobertaPreLayerNormConfig, B: int = 5, L: int = 16, seed: int = 0
) -> dict[str, np.ndarray]:
    """input_ids, attention_mask, token_type_ids and labels: no pads, pads right, left, in the
    middle, and a row of one token."""
    rng = np.random.default_rng(seed)
    pad = config.pad_token_id
    ids = rng.integers(4, config.vocab_size, (B, L))
    ids[1, L - 5 :] = pad
    ids[2, : L // 3] = pad
    ids[3, 4:7] = pad
    ids[4, 1:] = pad
    mask = (ids != pad).astype(np.int64)
    labels = np.where(
        (rng.random((B, L)) < 0.4) & (mask == 1), rng.integers(4, config.vocab_size, (B, L)), -100
    )
    labels[0, 0] = 5
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, config.type_vocab_size, (B, L)),
        "labels": labels,
    }


def with_tokens(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows in which something is seen. In others, kernels of softmax differ from each other."""
    mask = batch["attention_mask"]
    kept = mask.any(-1) if mask.ndim == 2 else mask.any(-1).all(-1)
    return {name: rows[kept] for name, rows in batch.items()}


def rms_relative(found: np.ndarray, expected: np.ndarray) -> float:
    """rms of the difference over rms of the expected values."""
    found, expected = np.float64(found), np.float64(expected)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def max_relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over rms of the expected values."""
    found, expected = np.float64(found), np.float64(expected)
    return float(np.abs(found - expected).max() / np.sqrt(np.mean(expected**2)))


def assert_close(
    found: np.ndarray, expected: np.ndarray, name: str, rms: float = 2e-6, largest: float = 2e-5
) -> None:
    """The parity ladder's bounds (design, section 6): torch's own float32 shows half of them."""
    assert np.shape(found) == np.shape(expected), f"{name}: {np.shape(found)}"
    measured = rms_relative(found, expected), max_relative(found, expected)
    assert measured[0] <= rms and measured[1] <= largest, f"{name}: rms, max = {measured}"


# ---------------------------------------------------------------------------------------------
# Programs, run as people run them.

_SCRATCH = tempfile.TemporaryDirectory(prefix="prelnroberta-tests-")
SCRATCH = Path(_SCRATCH.name)
ROOT = Path(__file__).parents[2]
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
    """Runs a program to its end; text in, text out."""
    options = {"capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run(command(program, *arguments), cwd=ROOT, env=ENVIRONMENT, **options)


@functools.cache
def corpus_file() -> Path:
    """450 KB of English that Python brings along."""
    path = SCRATCH / "corpus.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def tiny_flags(**changes: Any) -> list[str]:
    """A run of seconds: dropout, accumulation, and cadences that share no factor."""
    values = {
        "preset": "tiny",
        "vocab_size": 300,
        "sequence_length": 32,
        "batch_size": 8,
        "accumulate": 2,
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
    """A run of `tiny_flags()` that nothing interrupted."""
    run_dir = SCRATCH / "finished"
    done = call("pretrain", *tiny_flags(), f"--run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


@dataclasses.dataclass
class Disk:
    path: Path
    _filler: str = "filler"

    def fill(self) -> None:
        """Leaves less than a page."""
        with (self.path.parent / self._filler).open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
            with contextlib.suppress(OSError):
                while file.write(bytes(512)):
                    pass

    def empty(self) -> None:
        (self.path.parent / self._filler).unlink()


@contextlib.contextmanager
def filled_disk(mount: Path, size: str = "16m") -> Iterator[Disk]:
    """A file system of its own, small, to be filled. Only root may make one."""
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system, to fill it")
    try:
        yield Disk(mount / "content")
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


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

"""Contenders side by side: one process each, all kept alive, timed in turn.

Ratios are taken inside each round, between neighbours in time, so that a machine that is busy for a
while is busy for all of them; their median is the result, their quartiles the spread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark.cases import Case
from prelnroberta.errors import InputError

# transformers 4.57.6, the last with Flax and TensorFlow classes, is laid over our own environment.
TRANSFORMERS_4 = Path(sys.prefix) / "transformers4"
_OVERLAY = {"PYTHONPATH": str(TRANSFORMERS_4), "TF_USE_LEGACY_KERAS": "1"}
# All on the CPU, and all with huge pages: which allocator's defaults are better is nobody's merit.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Contenders that share a process: a framework is in memory once, and lies the same for all of
    them. Of two processes with the same kernels one may be a third slower, for as long as it lives.

    Attributes:
        module: of this package.
        ours, peers: this project's and others'; mode -> the name it is reported by.
        own_weights: the file it reads them from, if not model.safetensors; it makes it first.
        overlay: whether it runs on transformers 4.57.6.
    """

    module: str
    ours: dict[str, str] = dataclasses.field(default_factory=dict)
    peers: dict[str, str] = dataclasses.field(default_factory=dict)
    own_weights: str | None = None
    overlay: bool = False

    @property
    def modes(self) -> dict[str, str]:
        return self.ours | self.peers


FLAX = "transformers 4.57 Flax"
TORCH_SDPA = "transformers 5 torch SDPA"


def families(case: Case) -> list[Family]:
    """Who can do the case."""
    ours = {"padded": "ours"}
    if case.ragged:
        ours = {"packed": "ours packed", "padded": "ours padded"}
    twin = {"twin": "our PyTorch"}
    if case.ragged and case.model != "question_answering":  # whose loss runs over pads, too
        twin = {"skip_padding": "our PyTorch, padding skipped"} | twin
    torch = {"sdpa": TORCH_SDPA, "eager": "transformers 5 torch eager"}
    tensorflow = {"graph": "transformers 4.57 TF", "xla": "transformers 4.57 TF XLA"}
    flax = [Family("peer_flax", {}, {"flax": FLAX}, "flax_model.msgpack", overlay=True)]
    if case.work == "generate":
        del tensorflow["xla"]  # its loop is traced by itself
        flax = []  # its causal model drops the cache without cross-attention, and fails on shapes
    found = [
        Family("ours_flax", ours=ours),
        *flax,
        Family("peer_torch", twin, torch),
        Family("peer_tensorflow", {}, tensorflow, "tf_model.h5", overlay=True),
    ]
    if case.work == "forward":
        ours_tf = {"twin graph": "our TensorFlow", "twin xla": "our TensorFlow XLA"}
        found.append(Family("peer_tensorflow", ours=ours_tf))
    return found


@dataclasses.dataclass
class Result:
    """One contender in one case.

    Attributes:
        difference: of its checked numbers from ours, rms over rms.
        first: seconds of checking its numbers and of the first run, compiling included: a forward
            pass is compiled for the one, a training step for the other.
        imported: seconds until its libraries are loaded.
        peak_bytes: largest resident memory, if it had a process to itself until then.
        seconds: of each round.
    """

    name: str
    peer: bool
    difference: float
    first: float
    imported: float
    peak_bytes: int | None
    seconds: list[float] = dataclasses.field(default_factory=list)


def race(
    case: Case,
    weights: Path,
    folder: Path,
    rounds: int,
    names: set[str] | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> list[Result]:
    """Times every contender of the case in turn, in another order each round.

    Args:
        rounds: the least; a case of short runs is given more, up to five times as many.
        names: of those that take part; all by default.
        tell: is told what goes on.

    Raises:
        InputError: contenders that do not compute the same function: their times say nothing.
    """
    chosen = [f for f in families(case) if names is None or names & set(f.modes.values())]
    for family in chosen:
        if family.own_weights and not (weights / family.own_weights).exists():
            with Worker(family, weights, folder, []) as preparing:
                preparing.finish()
    with contextlib.ExitStack() as running:
        results: dict[str, Result] = {}
        turns, again = [], []
        reference = None
        for family in chosen:
            worker = running.enter_context(Worker(family, weights, folder, list(family.modes)))
            for mode, name in family.modes.items():
                tell(f"{name} gets ready")
                told = worker.answer()
                again.append(told.pop("again"))
                checked = np.load(told.pop("checked")).astype(np.float64)
                reference = checked if reference is None else reference
                difference = _difference(case, name, checked, reference)
                peer = mode in family.peers
                results[name] = Result(name, peer, difference=difference, **told)
                turns.append((worker, mode, results[name]))
        # Long enough for the clock and the scheduler, whatever the case.
        times = max(1, round(_LEAST_SECONDS / min(again)))
        rounds = max(rounds, min(5 * rounds, round(_CASE_SECONDS / (times * sum(again)))))
        order = np.random.default_rng(0)
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            for index in order.permutation(len(turns)):
                worker, mode, result = turns[index]
                time.sleep(_REST)
                result.seconds.append(worker.run(mode, times))
    return list(results.values())


_LEAST_SECONDS = 0.3
_CASE_SECONDS = 60.0
_REST = 0.1  # idle threads of the one before stop spinning


def _difference(case: Case, name: str, checked: np.ndarray, reference: np.ndarray) -> float:
    if checked.shape != reference.shape:
        raise InputError(
            f"{case.name}: {name} gives an array of {list(checked.shape)}, ours of "
            f"{list(reference.shape)}"
        )
    scale = np.sqrt(np.mean(reference**2))
    difference = float(np.sqrt(np.mean((checked - reference) ** 2)) / max(scale, 1e-30))
    if not difference <= _LARGEST_DIFFERENCE:
        raise InputError(
            f"{case.name}: {name} differs from ours by {difference:.1e}, expected "
            f"{_LARGEST_DIFFERENCE:.0e} or less: its time would say nothing"
        )
    return difference


_LARGEST_DIFFERENCE = 1e-4


class Worker:
    """A family's process (`worker.py`); ended on leaving the `with` block.

    Without modes it only makes the weights readable to the family.
    """

    def __init__(self, family: Family, weights: Path, folder: Path, modes: list[str]):
        self._name = f"{family.module} {' '.join(modes)}"
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed with the process
        program = "experiments.benchmark.worker"
        overlay = _OVERLAY if family.overlay else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", program, family.module, str(weights), str(folder), *modes],
            env=os.environ | overlay | _ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def run(self, mode: str, times: int) -> float:
        """Seconds of one of `times` runs."""
        self._process.stdin.write(json.dumps({"mode": mode, "times": times}) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            self.finish()
            raise InputError(f"benchmark: {self._name} ended early")
        return json.loads(line)

    def finish(self) -> None:
        """Waits for the end; raises InputError with its last line if it failed."""
        if self._process.wait() != 0:
            self._log.seek(0)
            said = [line for line in self._log if line.strip()] or ["without a word"]
            raise InputError(f"benchmark: {self._name} failed: {said[-1].strip()}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def ratios(of: Result, over: Result) -> np.ndarray:
    """How many times as fast `of` is as `over`, round by round."""
    return np.array(over.seconds) / np.array(of.seconds)


def best_peer(ours: Result, results: list[Result]) -> Result:
    """The one of the others that ours leads by least; Flax is reported by itself."""
    peers = [r for r in results if r.peer and r.name != FLAX]
    return min(peers, key=lambda r: float(np.median(ratios(ours, r))))


def ceiling() -> Iterator[float]:
    """GFLOP/s of the machine's best matrix product, one measurement after the other: 1024 x 768
    by 768 x 2304, float32, by torch's MKL."""
    import torch

    torch.set_num_threads(2)
    a, b = torch.randn(1024, 768), torch.randn(768, 2304)
    while True:
        begin = time.perf_counter()
        for _ in range(10):
            a @ b
        yield 10 * 2 * 1024 * 768 * 2304 / (time.perf_counter() - begin) / 1e9

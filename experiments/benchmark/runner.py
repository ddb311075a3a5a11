"""Times contenders in turn, each in a process that lives for the whole case.

Ratios are taken within a round, so that other load on the machine slows all contenders alike. The
result is the median over rounds, the spread its quartiles.
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
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmark.cases import Case
from prelnroberta.errors import InputError

# transformers 4.57.6, the last version with Flax and TensorFlow classes, is put in front of the
# packages of this environment.
TRANSFORMERS_4 = Path(sys.prefix) / "transformers4"
_TRANSFORMERS_4_ENVIRONMENT = {"PYTHONPATH": str(TRANSFORMERS_4), "TF_USE_LEGACY_KERAS": "1"}
# All run on the CPU, with huge pages: the defaults of allocators are not to be compared.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclasses.dataclass(frozen=True)
class ContenderGroup:
    """Contenders of one framework, which share a process. Of two processes with the same kernels
    one may be a third slower during its whole life, depending on where its memory is.

    Attributes:
        module: in `experiments.benchmark.contenders`.
        ours, peers: this project's and others' variants -> the names in the report.
        weights_file: the file that it converts the weights to, if it does not read
            model.safetensors.
        transformers_4: whether it needs transformers 4.57.6.
    """

    module: str
    ours: dict[str, str] = dataclasses.field(default_factory=dict)
    peers: dict[str, str] = dataclasses.field(default_factory=dict)
    weights_file: str | None = None
    transformers_4: bool = False

    @property
    def variants(self) -> dict[str, str]:
        return self.ours | self.peers


FLAX = "transformers 4.57 Flax"
TORCH_SDPA = "transformers 5 torch SDPA"


def contender_groups(case: Case) -> list[ContenderGroup]:
    """The contenders that can compute the case."""
    ours = {"padded": "ours"}
    if case.ragged:
        ours = {"packed": "ours packed", "padded": "ours padded"}
    twin = {"twin": "our PyTorch"}
    if case.ragged and case.model != "question_answering":  # its loss includes padding
        twin = {"skip_padding": "our PyTorch, padding skipped"} | twin
    torch = {"sdpa": TORCH_SDPA, "eager": "transformers 5 torch eager"}
    tensorflow = {"graph": "transformers 4.57 TF", "xla": "transformers 4.57 TF XLA"}
    flax = [
        ContenderGroup(
            "transformers_flax", {}, {"flax": FLAX}, "flax_model.msgpack", transformers_4=True
        )
    ]
    if case.operation == "generate":
        del tensorflow["xla"]  # generate compiles its own loop
        flax = []  # without cross-attention its causal model drops the cache and fails on shapes
    groups = [
        ContenderGroup("prelnroberta_flax", ours=ours),
        *flax,
        ContenderGroup("torch_models", twin, torch),
        ContenderGroup("tensorflow_models", {}, tensorflow, "tf_model.h5", transformers_4=True),
    ]
    if case.operation == "forward":
        ours_tf = {"twin graph": "our TensorFlow", "twin xla": "our TensorFlow XLA"}
        groups.append(ContenderGroup("tensorflow_models", ours=ours_tf))
    return groups


@dataclasses.dataclass
class Result:
    """The times of a contender in a case.

    Attributes:
        is_peer: whether it is not this project's.
        difference: of its outputs from ours, rms of the difference over rms of ours.
        first_seconds: of computing the outputs and of the first run, with compilation.
        import_seconds: until its libraries are loaded.
        peak_bytes: peak resident memory; None if another variant ran in its process before.
        seconds: of a run, in each round.
    """

    name: str
    is_peer: bool
    difference: float
    first_seconds: float
    import_seconds: float
    peak_bytes: int | None
    seconds: list[float] = dataclasses.field(default_factory=list)


def run_case(
    case: Case,
    weights: Path,
    folder: Path,
    rounds: int,
    names: set[str] | None = None,
    on_progress: Callable[[str], None] = lambda message: None,
) -> list[Result]:
    """Times every contender of a case in turn, in another order each round.

    Args:
        rounds: the minimum; short cases get up to five times as many.
        names: of the contenders that take part; None: all.
        on_progress: called with a message at every stage.

    Raises:
        InputError: two contenders do not compute the same function.
    """
    groups = [
        group
        for group in contender_groups(case)
        if names is None or names & set(group.variants.values())
    ]
    for group in groups:
        if group.weights_file and not (weights / group.weights_file).exists():
            with Worker(group, weights, folder, []) as converter:
                converter.wait()
    with contextlib.ExitStack() as running:
        contenders: list[_Contender] = []
        reference = None
        for group in groups:
            worker = running.enter_context(Worker(group, weights, folder, list(group.variants)))
            for variant, name in group.variants.items():
                on_progress(f"{name} is compiling")
                answer = worker.answer()
                run_seconds = answer.pop("run_seconds")
                outputs = np.load(answer.pop("outputs")).astype(np.float64)
                reference = outputs if reference is None else reference
                difference = _difference(case, name, outputs, reference)
                result = Result(name, variant in group.peers, difference=difference, **answer)
                contenders.append(_Contender(worker, variant, result, run_seconds))
        _time_in_turn(contenders, rounds, on_progress)
    return [contender.result for contender in contenders]


class _Contender(NamedTuple):
    """A variant in its running process; `run_seconds` is the time of its second run."""

    worker: Worker
    variant: str
    result: Result
    run_seconds: float


def _time_in_turn(
    contenders: list[_Contender], rounds: int, on_progress: Callable[[str], None]
) -> None:
    # Long enough for the clock and the scheduler, whatever the case.
    seconds = [contender.run_seconds for contender in contenders]
    repeats = max(1, round(_MIN_SECONDS / min(seconds)))
    rounds = max(rounds, min(5 * rounds, round(_CASE_SECONDS / (repeats * sum(seconds)))))
    rng = np.random.default_rng(0)
    for number in range(rounds):
        on_progress(f"round {number + 1} of {rounds}")
        for index in rng.permutation(len(contenders)):
            worker, variant, result, _ = contenders[index]
            time.sleep(_PAUSE_SECONDS)
            result.seconds.append(worker.run(variant, repeats))


_MIN_SECONDS = 0.3
_CASE_SECONDS = 60.0
_PAUSE_SECONDS = 0.1  # until the idle threads of the previous contender stop spinning


def _difference(case: Case, name: str, outputs: np.ndarray, reference: np.ndarray) -> float:
    if outputs.shape != reference.shape:
        raise InputError(
            f"{case.name}: {name} returns shape {list(outputs.shape)}, ours {list(reference.shape)}"
        )
    scale = np.sqrt(np.mean(reference**2))
    difference = float(np.sqrt(np.mean((outputs - reference) ** 2)) / max(scale, 1e-30))
    if not difference <= _MAX_DIFFERENCE:
        raise InputError(
            f"{case.name}: {name} differs from ours by {difference:.1e}, expected "
            f"{_MAX_DIFFERENCE:.0e} or less: they do not compute the same function"
        )
    return difference


_MAX_DIFFERENCE = 1e-4


class Worker:
    """The process of a contender group (`worker.py`); killed at the end of the `with` block.

    Without variants it only converts the weights.
    """

    def __init__(self, group: ContenderGroup, weights: Path, folder: Path, variants: list[str]):
        self._name = f"{group.module} {' '.join(variants)}"
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed with the process
        program = "experiments.benchmark.worker"
        overlay = _TRANSFORMERS_4_ENVIRONMENT if group.transformers_4 else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", program, group.module, str(weights), str(folder), *variants],
            env=os.environ | overlay | _ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def run(self, variant: str, repeats: int) -> float:
        """Seconds per run, over `repeats` runs."""
        self._process.stdin.write(json.dumps({"variant": variant, "repeats": repeats}) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next line that the process writes."""
        line = self._process.stdout.readline()
        if not line:
            self.wait()
            raise InputError(f"benchmark: {self._name} ended early")
        return json.loads(line)

    def wait(self) -> None:
        """Waits for the process; raises InputError with its last line if it failed."""
        if self._process.wait() != 0:
            self._log.seek(0)
            lines = [line for line in self._log if line.strip()] or ["no message"]
            raise InputError(f"benchmark: {self._name} failed: {lines[-1].strip()}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def speedups(ours: Result, other: Result) -> np.ndarray:
    """[rounds]: how many times as fast `ours` is as `other` in each round."""
    return np.array(other.seconds) / np.array(ours.seconds)


def best_peer(ours: Result, results: list[Result]) -> Result:
    """The fastest peer in the median of ratios; Flax, which has a column of its own, excluded."""
    peers = [r for r in results if r.is_peer and r.name != FLAX]
    return min(peers, key=lambda r: float(np.median(speedups(ours, r))))


def matrix_product_gflops() -> Iterator[float]:
    """Measures the GFLOP/s of a matrix product by torch's MKL again and again: 1024 x 768 by
    768 x 2304, float32."""
    import torch

    torch.set_num_threads(2)
    a, b = torch.randn(1024, 768), torch.randn(768, 2304)
    while True:
        begin = time.perf_counter()
        for _ in range(10):
            a @ b
        yield 10 * 2 * 1024 * 768 * 2304 / (time.perf_counter() - begin) / 1e9

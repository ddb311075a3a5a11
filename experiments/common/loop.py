"""The training loop that every program shares: step, report, evaluate, save, stop when asked."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from experiments.common.report import NoReport, Report, describe_time
from prelnroberta.distributed import multihost
from prelnroberta.distributed.hardware import chip_of
from prelnroberta.errors import InputError
from prelnroberta.training.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint
from prelnroberta.training.train_step import Batch, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cadence:
    """When things happen, in optimizer steps; everything happens at the last one as well."""

    steps: int
    log_every: int
    eval_every: int
    save_every: int

    def due(self, every: int, step: int) -> bool:
        return step % every == 0 or step == self.steps


class Interruption:
    """While entered, SIGINT and SIGTERM ask the loop to stop after its step. A second one kills."""

    signal: signal.Signals | None = None

    def __enter__(self) -> Interruption:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for s in self._before:
            signal.signal(s, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)


def resume(checkpoints: Checkpoints, state: TrainState, set_damaged_aside: bool) -> TrainState:
    """The latest checkpoint in the shape of `state`, or `state` itself where there is none.

    Args:
        set_damaged_aside: go on from the step before a damaged one. Several hosts end instead, once
            it is out of the way, to be started again: they may not all have seen the damage.

    Raises:
        CheckpointError: it cannot be read.
    """
    while (step := checkpoints.latest()) is not None:
        try:
            return checkpoints.restore(state, step)[0]
        except DamagedCheckpoint as error:
            if not set_damaged_aside:
                raise
            checkpoints.set_aside(step)
            print(f"set aside: {error}", file=sys.stderr, flush=True)
            if jax.process_count() > 1:
                multihost.leave(multihost.TRY_AGAIN)
    return state


def compiled(step: Callable, state: TrainState, batch: Batch) -> tuple[Callable, float]:
    """The step (`train.parallel`'s) compiled for these shapes, and the seconds that it took, told.

    A batch of another shape is then refused. What the compiler needed is given back before the
    first step allocates its own: glibc would keep it (0.5 GB of roberta-base's 4.2 at 8 x 128).
    """
    print("compiling the step: ", end="", flush=True)
    begin = time.monotonic()
    program = step.lower(state, batch).compile()
    seconds = time.monotonic() - begin
    print(f"{seconds:.1f} s", flush=True)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return program, seconds


def train(
    state: TrainState,
    step: Callable,
    batches: Iterator[Batch],
    *,
    cadence: Cadence,
    report: Report | NoReport,
    checkpoints: Checkpoints,
    validate: Callable[[TrainState], dict[str, float]],
    learning_rate: Callable[[int], Any],
    tokens_per_step: float,
    objective: Callable[[dict[str, float]], float] = itemgetter("loss"),
    enough: Callable[[], bool] = lambda: False,
    flops_per_step: float = 0.0,
    compile_seconds: float = 0.0,
    failed_save: str = "stop",
    profile_steps: tuple[int, int] | None = None,
) -> tuple[TrainState, signal.Signals | None]:
    """Takes steps from `state.step` to `cadence.steps`, or until an evaluation is `enough`.

    One step is dispatched ahead of the one that is waited for, so that the device never waits for
    the host. Returns the last state, and the signal that ended the loop early, if one did: the
    state is on disk in either case.

    Args:
        step: (state, batch) -> (state, scores), `compiled`.
        objective: validation metrics -> what is least for the best.
        enough: whether the evaluations so far are, asked after each.
        tokens_per_step, flops_per_step: of all devices; the model's own FLOPs, for MFU.
        compile_seconds: spent on the step before this call, for the account of time.
        failed_save: "continue" tells of a checkpoint that could not be written, and goes on.
        profile_steps: the first and last step to trace, into the folder `profile` of the run.

    Raises:
        InputError: the loss is no longer finite, or a checkpoint could not be written.
    """

    def save(state: TrainState, loss: float | None) -> None:
        for _ in range(2):  # the first failure may be that of the step before, told now
            try:
                return checkpoints.save(state, {}, loss)
            except CheckpointError as error:
                if failed_save == "stop":
                    raise
                report.say(f"warning: step {int(state.step):,}: {error}")

    clock = _Clock()
    clock.buckets["compiling"] = compile_seconds
    compilations = _Compilations()
    profile = _Profile(profile_steps, checkpoints.directory.parent / "profile")
    warm, ran = None, set()  # how much had been compiled once everything had run
    vote = multihost.Vote()
    running = stopped = None
    with Interruption() as interruption:
        for number in range(int(state.step) + 1, cadence.steps + 1):
            batch = clock.waiting(lambda: next(batches))
            profile.before(number)
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, scores = step(state, batch)
            jax.block_until_ready(running)
            profile.after(number, scores)
            running = scores
            report.advance()
            # A signal to any host stops all, after the same step.
            asked = vote(interruption.signal or 0)
            stopped = signal.Signals(asked) if asked else None
            validation = None
            if cadence.due(cadence.log_every, number):
                state = _report_window(
                    state,
                    number,
                    report,
                    clock.lap(tokens_per_step, flops_per_step),
                    learning_rate(number - 1),
                )
                ran.add("report")
            # Even when asked to stop: the resumed run goes on after this step, and would miss it.
            if cadence.due(cadence.eval_every, number):
                validation = clock.paused("evaluation", lambda state=state: validate(state))
                report.record("validation", number, **validation)
            if stopped or validation or cadence.due(cadence.save_every, number):
                _check_finite(state, number)
                loss = objective(validation) if validation else None
                clock.paused("checkpoints", lambda state=state, loss=loss: save(state, loss))
            if validation:
                ran.add("validation")
            if warm is None and ran == {"report", "validation"}:
                warm = compilations.count
            elif warm is not None and compilations.count > warm:
                report.say(
                    f"warning: step {number:,}: something was compiled again; shapes should not "
                    "change in a run"
                )
                warm = compilations.count
            if stopped or (validation and enough()):
                break
        clock.paused("checkpoints", checkpoints.wait)
    profile.close()
    compilations.close()
    clock.end()
    report.say(describe_time(clock.buckets))
    return state, stopped


def _report_window(
    state: TrainState,
    number: int,
    report: Report | NoReport,
    lap: dict[str, float],
    learning_rate: Any,
) -> TrainState:
    _check_finite(state, number)
    window = jax.device_get(state.window)
    report.record(
        "train",
        number,
        loss=float(window.loss / max(window.weight, 1.0)),
        accuracy=float(window.correct / max(window.weight, 1.0)),
        learning_rate=float(learning_rate),
        gradient_norm=float(state.gradient_norm),
        **lap,
    )
    return state.new_window()


def _check_finite(state: TrainState, number: int) -> None:
    loss, norm = float(state.window.loss), float(state.gradient_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(
            f"step {number}: the training loss is {loss}, the gradient's norm {norm}; nothing of "
            "this step is saved. Lower --learning_rate, lengthen --warmup_steps or set "
            "--clip_norm, in another --run_dir"
        )


class _Clock:
    """Where the time went, since the last report and in all: steps, waiting for input, compiling,
    and what is no part of a step."""

    def __init__(self) -> None:
        self.buckets: defaultdict[str, float] = defaultdict(float)
        self._start()

    def _start(self) -> None:
        self._begin = time.monotonic()
        self._waited = self._paused = 0.0
        self._steps = 0

    def waiting(self, action: Callable[[], Any]) -> Any:
        """Runs what brings a step its input."""
        begin = time.monotonic()
        result = action()
        self._waited += time.monotonic() - begin
        self._steps += 1
        return result

    def paused(self, bucket: str, action: Callable[[], Any]) -> Any:
        """Runs what is no part of a step: evaluation, saving."""
        begin = time.monotonic()
        result = action()
        seconds = time.monotonic() - begin
        self._paused += seconds
        self.buckets[bucket] += seconds
        return result

    def lap(self, tokens_per_step: float, flops_per_step: float) -> dict[str, float]:
        """Tokens per second, the share of time spent waiting for input, seconds; starts anew. Of
        chips that the table knows, MFU; of devices that tell, the peak of their memory in bytes."""
        seconds = self.end()
        speed = self._steps / seconds
        device = jax.local_devices()[0]
        lap = {
            "tokens_per_second": speed * tokens_per_step,
            "tokens_per_second_per_chip": speed * tokens_per_step / jax.device_count(),
            "input_wait": self._waited / seconds,
            "seconds": seconds,
        }
        if flops_per_step and (chip := chip_of(device.device_kind)):
            lap["mfu"] = speed * flops_per_step / (jax.device_count() * chip.flops)
        if memory := device.memory_stats():
            lap["memory_peak"] = memory["peak_bytes_in_use"]
        self._start()
        return lap

    def end(self) -> float:
        """Seconds of steps since the last report, put where they belong."""
        seconds = time.monotonic() - self._begin - self._paused
        self.buckets["input"] += self._waited
        self.buckets["steps"] += seconds - self._waited
        return seconds


class _Compilations:
    """Counts what XLA compiles in this process from now on."""

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_: Any) -> None:
        self.count += event == self._EVENT

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)


class _Profile:
    """A trace of the steps first to last, on the first host, for xprof or Perfetto."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps = steps if multihost.is_first() else None
        self._directory = directory
        self._running = False

    def before(self, step: int) -> None:
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        if self._running and step >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

"""The training loop: step, report, evaluate, save, and stop on a signal."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
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

from experiments.common.run_report import NullReport, Report, format_time_breakdown
from prelnroberta.distributed import multihost
from prelnroberta.distributed.hardware import find_chip_spec
from prelnroberta.errors import InputError
from prelnroberta.training.checkpoint import (
    CheckpointError,
    CheckpointManager,
    CorruptCheckpointError,
)
from prelnroberta.training.train_step import Batch, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cadence:
    """Steps between events; every event happens at the last step too."""

    steps: int
    log_every: int
    eval_every: int
    save_every: int

    def is_due(self, every: int, step: int) -> bool:
        return step % every == 0 or step == self.steps


class StopSignal:
    """As a context manager, records SIGINT and SIGTERM so that the loop stops after its step. A
    second signal kills the process."""

    received: signal.Signals | None = None

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._record) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for s in self._before:
            signal.signal(s, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)


def restore_latest(
    checkpoints: CheckpointManager, state: TrainState, skip_corrupt: bool
) -> TrainState:
    """The latest checkpoint in the structure of `state`, or `state` itself if there is none.

    Args:
        skip_corrupt: move a corrupt checkpoint aside and restore the one before it. With several
            hosts the process exits once it is moved, to be restarted: not every host may have seen
            that it is corrupt.

    Raises:
        CheckpointError: it cannot be read.
    """
    while (step := checkpoints.latest_step()) is not None:
        try:
            return checkpoints.restore(state, step)[0]
        except CorruptCheckpointError as error:
            if not skip_corrupt:
                raise
            checkpoints.move_aside(step)
            print(f"moved aside: {error}", file=sys.stderr, flush=True)
            if jax.process_count() > 1:
                multihost.exit_immediately(multihost.RETRY_EXIT_CODE)
    return state


def compile_step(step: Callable, state: TrainState, batch: Batch) -> tuple[Callable, float]:
    """Compiles the step for these shapes, ahead of time; returns it and the seconds that it took.

    The compiled step refuses a batch of another shape. The memory of the compiler is returned to
    the system before the first step allocates: glibc would keep it (0.5 GB of roberta-base's 4.2 at
    8 x 128).
    """
    print("compiling the step: ", end="", flush=True)
    begin = time.monotonic()
    compiled = step.lower(state, batch).compile()
    seconds = time.monotonic() - begin
    print(f"{seconds:.1f} s", flush=True)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return compiled, seconds


def train(
    state: TrainState,
    step: Callable,
    batches: Iterator[Batch],
    *,
    cadence: Cadence,
    report: Report | NullReport,
    checkpoints: CheckpointManager,
    validate: Callable[[TrainState], dict[str, float]],
    learning_rate: Callable[[int], Any],
    tokens_per_step: float,
    objective: Callable[[dict[str, float]], float] = itemgetter("loss"),
    should_stop_early: Callable[[], bool] = lambda: False,
    flops_per_step: float = 0.0,
    compile_seconds: float = 0.0,
    on_save_error: str = "stop",
    profile_steps: tuple[int, int] | None = None,
) -> tuple[TrainState, signal.Signals | None]:
    """Runs steps from `state.step` to `cadence.steps`, or until `should_stop_early`.

    One step is dispatched before the previous one is waited for, so that the device never waits
    for the host. Returns the last state, and the signal that ended the loop early, if one did; the
    state is saved in either case.

    Args:
        step: (state, batch) -> (state, scores), from `compile_step`.
        objective: validation metrics -> a number that is smallest for the best checkpoint.
        should_stop_early: called after each evaluation.
        tokens_per_step, flops_per_step: of all devices; the FLOPs of the model, for MFU.
        compile_seconds: time to compile the step, for the breakdown of time.
        on_save_error: "continue" reports a checkpoint that could not be written, and goes on.
        profile_steps: the first and last step to trace, into the folder `profile` of the run.

    Raises:
        InputError: the loss is no longer finite, or a checkpoint could not be written.
    """
    clock = _Clock(compile_seconds)
    recompilations = _RecompilationWarning(report)
    profile = _Profile(profile_steps, checkpoints.directory.parent / "profile")
    max_over_hosts = multihost.AsyncMaxOverHosts()
    in_flight = stopped = None
    with StopSignal() as stop_signal:
        for number in range(int(state.step) + 1, cadence.steps + 1):
            batch = clock.waiting(lambda: next(batches))
            profile.before(number)
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, scores = step(state, batch)
            jax.block_until_ready(in_flight)
            profile.after(number, scores)
            in_flight = scores
            report.advance()
            # A signal to any host stops all of them after the same step.
            agreed = max_over_hosts(stop_signal.received or 0)
            stopped = signal.Signals(agreed) if agreed else None
            validation = None
            if cadence.is_due(cadence.log_every, number):
                lap = clock.lap(tokens_per_step, flops_per_step)
                state = _report_window(state, number, report, lap, learning_rate(number - 1))
                recompilations.has_run("report")
            # Even when stopping: the resumed run starts after this step and would not evaluate it.
            if cadence.is_due(cadence.eval_every, number):
                validation = clock.paused("evaluation", lambda state=state: validate(state))
                report.record("validation", number, **validation)
                recompilations.has_run("validation")
            if stopped or validation or cadence.is_due(cadence.save_every, number):
                _check_finite(state, number)
                loss = objective(validation) if validation else None
                save = functools.partial(_save, checkpoints, state, loss, on_save_error, report)
                clock.paused("checkpoints", save)
            recompilations.check(number)
            if stopped or (validation and should_stop_early()):
                break
        clock.paused("checkpoints", checkpoints.wait_until_finished)
    profile.close()
    recompilations.close()
    clock.end()
    report.print(format_time_breakdown(clock.buckets))
    return state, stopped


def _save(
    checkpoints: CheckpointManager,
    state: TrainState,
    loss: float | None,
    on_save_error: str,
    report: Report | NullReport,
) -> None:
    for _ in range(2):  # the first failure may belong to the save before, whose error comes now
        try:
            return checkpoints.save(state, {}, loss)
        except CheckpointError as error:
            if on_save_error == "stop":
                raise
            report.print(f"warning: step {int(state.step):,}: {error}")


def _report_window(
    state: TrainState,
    number: int,
    report: Report | NullReport,
    lap: dict[str, float],
    learning_rate: Any,
) -> TrainState:
    """Reports the mean loss since the last report, and starts a new mean."""
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
    return state.reset_window()


def _check_finite(state: TrainState, number: int) -> None:
    loss, norm = float(state.window.loss), float(state.gradient_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(
            f"step {number}: the training loss is {loss}, the gradient norm {norm}; nothing of "
            "this step is saved. Lower --learning_rate, raise --warmup_steps or set --clip_norm, "
            "in another --run_dir"
        )


class _Clock:
    """Measures where the time goes, since the last report and in total: steps, waiting for input,
    compiling, and what is not part of a step."""

    def __init__(self, compile_seconds: float) -> None:
        self.buckets: defaultdict[str, float] = defaultdict(float, compiling=compile_seconds)
        self._start()

    def _start(self) -> None:
        self._begin = time.monotonic()
        self._waited = self._paused = 0.0
        self._steps = 0

    def waiting(self, action: Callable[[], Any]) -> Any:
        """Runs what fetches the input of a step."""
        begin = time.monotonic()
        result = action()
        self._waited += time.monotonic() - begin
        self._steps += 1
        return result

    def paused(self, bucket: str, action: Callable[[], Any]) -> Any:
        """Runs what is not part of a step: evaluation, saving."""
        begin = time.monotonic()
        result = action()
        seconds = time.monotonic() - begin
        self._paused += seconds
        self.buckets[bucket] += seconds
        return result

    def lap(self, tokens_per_step: float, flops_per_step: float) -> dict[str, float]:
        """Ends a lap: tokens per second, the share of time spent waiting for input, and seconds;
        MFU for known chips; peak memory in bytes where the device reports it."""
        seconds = self.end()
        speed = self._steps / seconds
        device = jax.local_devices()[0]
        lap = {
            "tokens_per_second": speed * tokens_per_step,
            "tokens_per_second_per_chip": speed * tokens_per_step / jax.device_count(),
            "input_wait": self._waited / seconds,
            "seconds": seconds,
        }
        if flops_per_step and (chip := find_chip_spec(device.device_kind)):
            lap["mfu"] = speed * flops_per_step / (jax.device_count() * chip.peak_flops)
        if memory := device.memory_stats():
            lap["memory_peak"] = memory["peak_bytes_in_use"]
        self._start()
        return lap

    def end(self) -> float:
        """Adds the time since the last report to its buckets; returns the seconds of steps."""
        seconds = time.monotonic() - self._begin - self._paused
        self.buckets["input"] += self._waited
        self.buckets["steps"] += seconds - self._waited
        return seconds


class _RecompilationWarning:
    """Warns when XLA compiles something after a report and an evaluation have both run once."""

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self, report: Report | NullReport) -> None:
        self._report = report
        self._count = 0
        self._missing = {"report", "validation"}
        self._expected: int | None = None
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, seconds: float, **_: Any) -> None:
        self._count += event == self._EVENT

    def has_run(self, part: str) -> None:
        self._missing.discard(part)

    def check(self, number: int) -> None:
        """Called after each step."""
        if self._missing:
            return
        if self._expected is not None and self._count > self._expected:
            self._report.print(
                f"warning: step {number:,}: something was compiled again; shapes should not change "
                "in a run"
            )
        self._expected = self._count

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)


class _Profile:
    """Traces the first to the last of these steps on the first host, for xprof or Perfetto."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps = steps if multihost.is_primary_host() else None
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

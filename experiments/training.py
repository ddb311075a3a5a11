"""The training loop that every program shares: step, report, evaluate, save, stop when asked."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from operator import itemgetter
from types import FrameType
from typing import Any

import jax

from experiments.report import NoReport, Report
from prelnroberta import hosts
from prelnroberta.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint
from prelnroberta.errors import InputError
from prelnroberta.train import Batch, TrainState, TrainStep


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
                hosts.leave(hosts.TRY_AGAIN)
    return state


def train(
    state: TrainState,
    step: TrainStep,
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
    failed_save: str = "stop",
) -> tuple[TrainState, signal.Signals | None]:
    """Takes steps from `state.step` to `cadence.steps`, or until an evaluation is `enough`.

    The checkpoint of the evaluation whose `objective` is the least is kept.

    One step is dispatched ahead of the one that is waited for, so that the device never waits for
    the host. Returns the last state, and the signal that ended the loop early, if one did: the
    state is on disk in either case.

    Args:
        failed_save: "continue" tells of a checkpoint that could not be written, and goes on.

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
    vote = hosts.Vote()
    running = stopped = None
    with Interruption() as interruption:
        for number in range(int(state.step) + 1, cadence.steps + 1):
            batch = clock.waiting(lambda: next(batches))
            state, scores = step(state, batch)
            jax.block_until_ready(running)
            running = scores
            report.advance()
            # A signal to any host stops all, after the same step.
            asked = vote(interruption.signal or 0)
            stopped = signal.Signals(asked) if asked else None
            validation = None
            if cadence.due(cadence.log_every, number):
                state = _report_window(
                    state, number, report, clock, learning_rate(number - 1), tokens_per_step
                )
            # Even when asked to stop: the resumed run goes on after this step, and would miss it.
            if cadence.due(cadence.eval_every, number):
                validation = clock.paused(lambda state=state: validate(state))
                report.record("validation", number, **validation)
            if stopped or validation or cadence.due(cadence.save_every, number):
                _check_finite(state, number)
                loss = objective(validation) if validation else None
                clock.paused(lambda state=state, loss=loss: save(state, loss))
            if stopped or (validation and enough()):
                break
        checkpoints.wait()
    return state, stopped


def _report_window(
    state: TrainState,
    number: int,
    report: Report | NoReport,
    clock: _Clock,
    learning_rate: Any,
    tokens_per_step: float,
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
        **clock.lap(tokens_per_step),
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
    """Where the time since the last report went: steps, waiting for input, and what is neither."""

    def __init__(self) -> None:
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

    def paused(self, action: Callable[[], Any]) -> Any:
        """Runs what is no part of a step: evaluation, saving."""
        begin = time.monotonic()
        result = action()
        self._paused += time.monotonic() - begin
        return result

    def lap(self, tokens_per_step: float) -> dict[str, float]:
        """Tokens per second, the share of time spent waiting for input, seconds; starts anew."""
        seconds = time.monotonic() - self._begin - self._paused
        lap = {
            "tokens_per_second": self._steps * tokens_per_step / seconds,
            "input_wait": self._waited / seconds,
            "seconds": seconds,
        }
        self._start()
        return lap

"""A training run: initial state or checkpoint -> compiled step -> loop -> last state.

pretrain and finetune give it their model's loss, their batches and their evaluation; everything
else of a run is here, once.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

from experiments.common.run_report import NullReport, Report, format_validation
from experiments.common.training_loop import Cadence, compile_step, restore_latest, train
from prelnroberta.distributed import multihost
from prelnroberta.training.checkpoint import CheckpointManager
from prelnroberta.training.optimizer import OptimizerConfig, learning_rate_schedule
from prelnroberta.training.train_step import (
    ScoreFn,
    TrainState,
    compile_train_step,
    make_train_step,
)

if TYPE_CHECKING:
    import numpy as np
    import optax

    from experiments.flags.programs import TrainingSettings
    from prelnroberta.distributed.sharding import Layout


class Loader(Protocol):
    """Batches by their step: `num_rows` is the number of rows of a batch."""

    @property
    def num_rows(self) -> int: ...
    def describe(self) -> str: ...
    def batch(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]: ...
    def prefetch(self, start_step: int, *, rows: np.ndarray) -> Any: ...


@dataclasses.dataclass(kw_only=True)
class TrainingRun:
    """Use as a context manager, inside `layout.use_mesh()`.

    Attributes:
        score: (params, batch, dropout_rngs) -> Scores, the loss of a batch.
        tokens_per_step, flops_per_step: of all devices; the FLOPs of the model, for MFU.
        eval_every, save_every: in steps.
        format_validation: formats a validation record as a line.
    """

    settings: TrainingSettings
    layout: Layout
    optimizer_config: OptimizerConfig
    optimizer: optax.GradientTransformation
    score: ScoreFn
    loader: Loader
    tokens_per_step: float
    eval_every: int
    save_every: int
    flops_per_step: float = 0.0
    format_validation: Callable[[dict[str, Any]], str] = format_validation

    def __enter__(self) -> TrainingRun:
        self.checkpoints = CheckpointManager(
            self.settings.run_path / "checkpoints", self.settings.keep_checkpoints
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoints.close()

    def resume(self, state: TrainState) -> TrainState:
        """The state of the run's latest checkpoint; `state` if it has none."""
        if self.checkpoints.latest_step() is None:
            return state
        state = restore_latest(self.checkpoints, state, self.settings.skip_corrupt_checkpoints)
        print(
            f"resuming {self.settings.run_path} at step {int(state.step):,} of "
            f"{self.optimizer_config.steps:,}, bit for bit: data order, masks, dropout, optimizer "
            "and reports continue as if the run had never stopped"
        )
        return state

    def train(
        self,
        state: TrainState,
        validate: Callable[[TrainState], dict[str, float]],
        *,
        objective: Callable[[dict[str, float]], float] = itemgetter("loss"),
        should_stop_early: Callable[[], bool] = lambda: False,
    ) -> tuple[TrainState, signal.Signals | None]:
        """Compiles the step and runs the loop; arguments and result are those of `loop.train`."""
        settings, steps = self.settings, self.optimizer_config.steps
        rows = self.layout.local_batch_rows(self.loader.num_rows)
        step = make_train_step(
            self.score, self.optimizer, settings.seed, settings.gradient_accumulation_steps
        )
        start = int(state.step)
        first_batch = self.layout.shard_batch(self.loader.batch(start, rows))
        compiled, compile_seconds = compile_step(
            compile_train_step(step, self.layout), state, first_batch
        )
        # Made after compiling: it estimates the remaining time from its own start.
        report = (
            Report(settings.run_path, steps, start, self.format_validation)
            if multihost.is_primary_host()
            else NullReport()
        )
        try:
            with self.loader.prefetch(start, rows=rows) as batches:
                return train(
                    state,
                    compiled,
                    map(self.layout.shard_batch, batches),
                    cadence=Cadence(
                        steps=steps,
                        log_every=settings.log_every,
                        eval_every=self.eval_every,
                        save_every=self.save_every,
                    ),
                    report=report,
                    checkpoints=self.checkpoints,
                    validate=validate,
                    learning_rate=learning_rate_schedule(self.optimizer_config),
                    tokens_per_step=self.tokens_per_step,
                    objective=objective,
                    should_stop_early=should_stop_early,
                    flops_per_step=self.flops_per_step,
                    compile_seconds=compile_seconds,
                    on_save_error=settings.on_save_error,
                    profile_steps=settings.check_profile_steps(),
                )
        finally:
            report.close()

    def exit_code(self, stopped: signal.Signals, state: TrainState) -> int:
        """Prints where the run stopped, and returns the exit code of the signal."""
        print(
            f"{stopped.name}: saved step {int(state.step):,} of {self.optimizer_config.steps:,} in "
            f"{self.settings.run_path}; run the same command to resume"
        )
        return 128 + stopped

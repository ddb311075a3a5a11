"""The run directory, and what happens every so many steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.flags.checks import check_positive
from experiments.flags.field import flag, required
from prelnroberta.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    run_dir: str = required(
        "Directory of the run. The same command again resumes it.", on_resume="free"
    )
    seed: int = flag(0, "Seed of initial values, data order, masks and dropout.")
    log_every: int = flag(10, "Steps between reports of the training loss.")
    eval_every: int | None = flag(
        500, "Steps between evaluations; a checkpoint is saved after each."
    )
    save_every: int | None = flag(500, "Steps between checkpoints.")
    keep_checkpoints: int = flag(
        2, "Latest checkpoints to keep, in addition to the best one.", on_resume="free"
    )
    skip_corrupt_checkpoints: bool = flag(
        False,
        "If the newest checkpoint is corrupt, move it aside and resume from the previous one.",
        on_resume="free",
    )
    on_save_error: str = flag(
        "stop",
        "What to do when a checkpoint cannot be written, for example on a full disk.",
        choices=["stop", "continue"],
        on_resume="free",
    )

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir)

    def check_run(self) -> None:
        """Raises InputError for a --seed or a cadence that no run can use."""
        check_positive(self, "log_every", "eval_every", "save_every", "keep_checkpoints")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed={self.seed}, expected 0 or more, below 2^63")

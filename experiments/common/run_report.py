"""Reports the progress of a run: a progress bar, `metrics.jsonl` and TensorBoard events.

`metrics.jsonl` has one JSON object a line, written without a buffer. A resumed
run continues the file, so a run has a single history.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

# Fields that depend on the clock or the machine. All others are reproduced by a resumed run.
TIMING_FIELDS = (
    "tokens_per_second",
    "tokens_per_second_per_chip",
    "mfu",
    "memory_peak",
    "input_wait",
    "seconds",
)


def format_validation(record: dict[str, Any]) -> str:
    gain = record["unigram_loss"] - record["loss"]
    return (
        f"step {record['step']:,}  validation loss {record['loss']:.3f} "
        f"({abs(gain):.3f} nats {'below' if gain > 0 else 'above'} the unigram baseline "
        f"{record['unigram_loss']:.3f})  perplexity {record['perplexity']:,.1f}  accuracy "
        f"{record['accuracy']:.1%} (most frequent token: {record['most_frequent_accuracy']:.1%})"
    )


class Report:
    """Writes and prints the records of a run.

    Args:
        run_dir: has `metrics.jsonl` and `events/`.
        steps: of the whole run.
        start: the step from which the run is resumed. Later records are dropped, since their steps
            are repeated.
        format_record: formats a validation record as a line.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: int,
        start: int,
        format_record: Callable[[dict[str, Any]], str] = format_validation,
    ):
        from tqdm import tqdm

        self.run_dir = run_dir
        self._format_record = format_record
        self.path = run_dir / "metrics.jsonl"
        earlier = [record for record in read_records(self.path) if record["step"] <= start]
        with atomic_write(self.path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in earlier))
        # Unbuffered, so that a full disk raises here, and not again on closing.
        self._file = self.path.open("ab", buffering=0)
        self._event_writer = _open_event_writer(run_dir / "events", start)
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            initial=start,
            disable=not self._is_terminal,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps "
            "[{elapsed}<{remaining}]{postfix}",
        )
        self._steps, self._start, self._start_time = steps, start, time.monotonic()

    def advance(self) -> None:
        self._bar.update()

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Writes and prints a record.

        Raises:
            InputError: the disk is full, or another error of writing.
        """
        record = {"kind": kind, "step": step, **values}
        try:
            self._file.write((json.dumps(record) + "\n").encode())
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}; free space and run the "
                "same command again to resume from the last checkpoint"
            ) from error
        for name, value in values.items():
            self._event_writer.add_scalar(f"{kind}/{name}", value, step)
        if kind == "train":
            self._bar.set_postfix_str(
                f"loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tokens/s"
            )
            if not self._is_terminal:
                seconds_per_step = (time.monotonic() - self._start_time) / (step - self._start)
                self.print(
                    f"step {step:,}/{self._steps:,}  loss {values['loss']:.3f}  "
                    f"{values['tokens_per_second']:,.0f} tokens/s  "
                    f"{format_duration(seconds_per_step * (self._steps - step))} left"
                )
        else:
            self.print(self._format_record(record))

    def print(self, line: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        with suppress(OSError):  # a full disk; `record` has reported it
            self._event_writer.close()


class NullReport:
    """A report that does nothing, for every host but the first."""

    def advance(self) -> None:
        pass

    def record(self, kind: str, step: int, **values: Any) -> None:
        pass

    def print(self, line: str) -> None:
        pass

    def close(self) -> None:
        pass


def format_time_breakdown(buckets: dict[str, float]) -> str:
    """Seconds and share of each kind of work, and the goodput: the share of steps."""
    total = sum(buckets.values())
    parts = ", ".join(
        f"{name} {format_duration(seconds)} ({seconds / total:.0%})"
        for name, seconds in sorted(buckets.items(), key=lambda item: -item[1])
    )
    return f"time: {parts}; goodput {buckets['steps'] / total:.0%}"


def format_duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a line that a kill left incomplete is skipped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class _NullEventWriter:
    def add_scalar(self, name: str, value: float, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def _open_event_writer(directory: Path, start: int) -> Any:
    """A TensorBoard writer that drops events after `start`; does nothing without tensorboardX."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return _NullEventWriter()
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)
    return SummaryWriter(str(directory), purge_step=start + 1)

"""What a run tells: a live bar, `metrics.jsonl`, TensorBoard events and the loss picture.

`metrics.jsonl` is the record: one JSON object a line, flushed as it is made. The other forms are
drawn from it, so that a resumed run has one unbroken history.
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
from prelnroberta.files import written_whole

# What a clock or the machine says; every other number of a record is the same in a resumed run.
TIMES = (
    "tokens_per_second",
    "tokens_per_second_per_chip",
    "mfu",
    "memory_peak",
    "input_wait",
    "seconds",
)


def describe_validation(record: dict[str, Any]) -> str:
    gain = record["unigram_loss"] - record["loss"]
    return (
        f"step {record['step']:,}  validation loss {record['loss']:.3f} "
        f"({abs(gain):.3f} nats {'below' if gain > 0 else 'above'} the unigram baseline "
        f"{record['unigram_loss']:.3f})  perplexity {record['perplexity']:,.1f}  accuracy "
        f"{record['accuracy']:.1%} (most frequent token: {record['most_frequent_accuracy']:.1%})"
    )


class Report:
    """The records of one run directory.

    Args:
        run_dir: where `metrics.jsonl`, `events/` and `loss.png` stand.
        steps: of the whole run.
        start: the step that this part of the run goes on from. Later records are dropped: their
            steps are about to be run again.
        describe: puts a validation record in words.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: int,
        start: int,
        describe: Callable[[dict[str, Any]], str] = describe_validation,
    ):
        from tqdm import tqdm

        self.run_dir = run_dir
        self._describe = describe
        self.path = run_dir / "metrics.jsonl"
        kept = [record for record in read_records(self.path) if record["step"] <= start]
        with written_whole(self.path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        # Unbuffered: what a full disk refuses is told at once, and not again when it is closed.
        self._file = self.path.open("ab", buffering=0)
        self._events = _events(run_dir / "events", start)
        self._live = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            initial=start,
            disable=not self._live,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps "
            "[{elapsed}<{remaining}]{postfix}",
        )
        self._steps, self._start, self._began = steps, start, time.monotonic()

    def advance(self) -> None:
        self._bar.update()

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Adds a record and shows it."""
        record = {"kind": kind, "step": step, **values}
        try:
            self._file.write((json.dumps(record) + "\n").encode())
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}; make room there and run the "
                "same command again: it goes on from the last checkpoint"
            ) from error
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)
        if kind == "train":
            self._bar.set_postfix_str(
                f"loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tokens/s"
            )
            if not self._live:
                left = (time.monotonic() - self._began) / (step - self._start)
                self.say(
                    f"step {step:,}/{self._steps:,}  loss {values['loss']:.3f}  "
                    f"{values['tokens_per_second']:,.0f} tokens/s  "
                    f"{duration(left * (self._steps - step))} left"
                )
        else:
            self.say(self._describe(record))

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        with suppress(OSError):  # a full disk, which the records have told of
            self._events.close()


class NoReport:
    """What the other hosts of a job tell: nothing."""

    def advance(self) -> None:
        pass

    def record(self, kind: str, step: int, **values: Any) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def close(self) -> None:
        pass


def describe_time(buckets: dict[str, float]) -> str:
    """Where a run's time went, and its goodput: the share that was steps."""
    whole = sum(buckets.values())
    parts = ", ".join(
        f"{name} {duration(seconds)} ({seconds / whole:.0%})"
        for name, seconds in sorted(buckets.items(), key=lambda item: -item[1])
    )
    return f"time: {parts}; goodput {buckets['steps'] / whole:.0%}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_losses(run_dir: Path, train_label: str, validation_label: str) -> Path | None:
    """Draws `loss.png` from the records; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_records(run_dir / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    validation = [r for r in records if r["kind"] == "validation"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    def series(records: list[dict], name: str) -> tuple[list, list]:
        return [r["step"] for r in records], [r[name] for r in records]

    left.plot(*series(train, "loss"), linewidth=1, alpha=0.7, label=train_label)
    left.plot(*series(validation, "loss"), "o-", markersize=3, label=validation_label)
    left.plot(
        *series(validation, "unigram_loss"), "--", color="grey", label="word frequencies alone"
    )
    left.set(xlabel="step", ylabel="masked-token loss (nats)", title="Loss")
    right.plot(*series(validation, "accuracy"), "o-", markersize=3, label=validation_label)
    right.plot(
        *series(validation, "most_frequent_accuracy"),
        "--",
        color="grey",
        label="always the most frequent token",
    )
    right.set(xlabel="step", ylabel="share right", title="Masked accuracy", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    path = run_dir / "loss.png"
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)
    return path


class _NoEvents:
    def add_scalar(self, name: str, value: float, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def _events(directory: Path, start: int) -> Any:
    """A TensorBoard writer that hides events after `start`; a mute one without tensorboardX."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return _NoEvents()
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)
    return SummaryWriter(str(directory), purge_step=start + 1)

"""The training loop: cadences, signals, failed saves, warnings and its report."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common.run_report import Report, read_records
from experiments.common.training_loop import Cadence, restore_latest, train
from prelnroberta.errors import InputError
from prelnroberta.model.losses import Scores
from prelnroberta.training.checkpoint import CheckpointError, CheckpointManager
from prelnroberta.training.train_step import TrainState
from tests.helpers.full_disk import filled_disk


def counting(state, batch):
    """A step that only counts: its loss is its number."""
    number = (state.step + 1).astype(jnp.float32)
    scores = Scores(loss=number * batch, correct=jnp.float32(1), weight=jnp.float32(2))
    norm = jnp.where(batch == batch, number, jnp.nan)
    return state.replace(
        step=state.step + 1, window=state.window + scores, gradient_norm=norm
    ), scores


def loop(directory, steps=20, batches=None, validate=None, start=None, **options):
    directory.mkdir(exist_ok=True)
    cadence = {"steps": steps, "log_every": 3, "eval_every": 8, "save_every": 5}
    cadence = Cadence(
        **cadence | {name: options.pop(name) for name in cadence.keys() & options.keys()}
    )
    checkpoints = CheckpointManager(directory / "checkpoints", max_to_keep=20)
    state = start or TrainState.create({"w": jnp.zeros(2)}, optax.sgd(0.1))
    report = Report(directory, steps, int(state.step))
    try:
        return train(
            state,
            jax.jit(counting),
            batches or iter([np.float32(1)] * steps),
            cadence=cadence,
            report=report,
            checkpoints=checkpoints,
            validate=validate or (lambda state: VALIDATION | {"loss": -float(state.step)}),
            learning_rate=lambda step: step,
            tokens_per_step=10,
            **options,
        )
    finally:
        report.close()
        checkpoints.close()


VALIDATION = {
    "perplexity": 1.0,
    "accuracy": 0.0,
    "unigram_loss": 1.0,
    "most_frequent_accuracy": 0.0,
}


def saved(directory):
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir())


def test_loop_logs_evaluates_and_saves_at_its_intervals(tmp_path):
    state, stopped = loop(tmp_path)
    assert stopped is None and int(state.step) == 20
    assert saved(tmp_path) == [5, 8, 10, 15, 16, 20]
    records = read_records(tmp_path / "metrics.jsonl")
    train_records = {r["step"]: r for r in records if r["kind"] == "train"}
    assert list(train_records) == [3, 6, 9, 12, 15, 18, 20]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [8, 16, 20]
    assert train_records[6]["loss"] == (4 + 5 + 6) / 6  # the window's sum over its weight
    assert train_records[20]["loss"] == (19 + 20) / 4
    assert train_records[6]["accuracy"] == 0.5
    assert train_records[6]["learning_rate"] == 5 and train_records[6]["gradient_norm"] == 6


def test_signal_ends_loop_after_saving_and_evaluating(tmp_path):
    def signalled():
        for number in range(1, 21):
            if number == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            yield np.float32(1)

    before = signal.getsignal(signal.SIGTERM)
    state, stopped = loop(tmp_path, batches=signalled())
    assert stopped == signal.SIGTERM and int(state.step) == 8
    assert saved(tmp_path) == [5, 8]
    kinds = [(r["kind"], r["step"]) for r in read_records(tmp_path / "metrics.jsonl")]
    assert kinds == [("train", 3), ("train", 6), ("validation", 8)]
    assert float(state.window.loss) == 7 + 8  # half a window, for the resumed run to end
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_signal_is_not_intercepted(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        yield np.float32(1)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    assert loop(tmp_path, batches=twice())[1] == signal.SIGINT


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_non_finite_loss_raises_and_is_never_saved(tmp_path, log_every):
    batches = iter([np.float32(x) for x in [1, 1, 1, np.nan, 1, 1, 1, 1]])
    with pytest.raises(InputError, match=r"--learning_rate.*another --run_dir"):
        loop(tmp_path, steps=8, batches=batches, log_every=log_every, save_every=1)
    assert saved(tmp_path) == [1, 2, 3]


def test_failed_save_is_reported_and_training_continues_if_requested(tmp_path, capsys):
    """The disk is full from step 7 to 12."""
    with filled_disk(tmp_path / "disk", "2m") as disk:

        def filling():
            for number in range(1, 21):
                if number == 7:
                    disk.fill()
                if number == 13:
                    disk.empty()
                yield np.float32(1)

        (tmp_path / "checkpoints").symlink_to(disk.path)
        disk.path.mkdir()
        state, stopped = loop(
            tmp_path, batches=filling(), save_every=1, eval_every=40, on_save_error="continue"
        )
        assert stopped is None and int(state.step) == 20
        steps = [int(p.name) for p in disk.path.iterdir() if p.name.isdigit()]
        assert set(range(1, 6)) | set(range(14, 21)) <= set(steps) and 10 not in steps
    said = capsys.readouterr().out
    assert "warning: step" in said and "No space left on device" in said and "is complete" in said


def test_corrupt_checkpoint_is_skipped_only_on_request(tmp_path, capsys):
    state, _ = loop(tmp_path)
    largest = max(
        (tmp_path / "checkpoints/20/params").rglob("*"),
        key=lambda p: p.stat().st_size * p.is_file(),
    )
    largest.write_bytes(b"")
    checkpoints = CheckpointManager(tmp_path / "checkpoints", max_to_keep=20)
    with pytest.raises(
        CheckpointError, match=r"20: the checkpoint is corrupt.*--skip_corrupt_checkpoints"
    ):
        restore_latest(checkpoints, state, skip_corrupt=False)
    assert checkpoints.latest_step() == 20
    assert int(restore_latest(checkpoints, state, skip_corrupt=True).step) == 16
    assert "moved aside: " in capsys.readouterr().err
    assert (tmp_path / "checkpoints/corrupt/20").is_dir() and checkpoints.latest_step() == 16
    checkpoints.save(state, {})  # the step comes again
    checkpoints.close()
    assert CheckpointManager(tmp_path / "checkpoints").latest_step() == 20


def test_recompilation_is_reported(tmp_path, capsys):
    def growing(state):
        jax.jit(lambda x: x + 1)(np.zeros(int(state.step)))  # a new shape at every evaluation
        return VALIDATION | {"loss": 1.0}

    loop(tmp_path / "same")
    loop(tmp_path / "evaluated before it is reported", log_every=20)
    assert "compiled again" not in capsys.readouterr().out
    loop(tmp_path / "changing", validate=growing)
    assert "warning: step 16: something was compiled again" in capsys.readouterr().out


def test_time_summary_covers_all_buckets(tmp_path, capsys):
    loop(tmp_path, compile_seconds=1e6, profile_steps=(3, 4))
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("time: ")]
    assert "compiling 277:46:40 (100%)" in line and "goodput 0%" in line
    for bucket in ("steps", "input", "evaluation", "checkpoints"):
        assert f"{bucket} 0:0" in line
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_resumed_report_drops_later_records_and_a_partial_line(tmp_path):
    loop(tmp_path)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"kind": "train", "st')
    Report(tmp_path, 20, start=9).close()
    assert [r["step"] for r in read_records(path)] == [3, 6, 8, 9]
    assert whole.startswith(path.read_text())

"""The step and the loop: sums that are exact however they are cut, windows, stopping."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common.loop import Cadence, resume, train
from experiments.common.report import Report, read_records
from prelnroberta import params as parameters
from prelnroberta.distributed.sharding import Layout, Parallelism
from prelnroberta.errors import InputError
from prelnroberta.model.heads import MaskedLM
from prelnroberta.model.losses import Scores, masked_lm_scores
from prelnroberta.training.checkpoint import CheckpointError, CheckpointManager
from prelnroberta.training.train_step import TrainState, compile_eval_step, make_train_step
from tests.helpers.full_disk import filled_disk
from tests.helpers.masked_batches import ONE_LAYER, masked_batch
from tests.helpers.small_models import random_params

MODULE = MaskedLM(ONE_LAYER)


def score(params, batch, key):
    del key  # no dropout
    return masked_lm_scores(MODULE, params, batch, None)


def after(steps, accumulate, optimizer=None, **batch):
    optimizer = optimizer or optax.sgd(0.1)
    step = jax.jit(make_train_step(score, optimizer, seed=0, gradient_accumulation_steps=accumulate))
    state = TrainState.create(jax.device_put(random_params(ONE_LAYER)), optimizer)
    for number in range(steps):
        state, scores = step(state, masked_batch(seed=number, **batch))
    return state, scores


def test_accumulation_changes_nothing():
    (whole, one), (parts, four) = after(3, 1), after(3, 4)
    assert float(one.weight) == float(four.weight) == 21 + 3  # rows 0..7: 1..6, 1, 2
    for path, value in parameters.flatten(whole.params).items():
        np.testing.assert_allclose(parameters.flatten(parts.params)[path], value, atol=1e-6)
    np.testing.assert_allclose(whole.gradient_norm, parts.gradient_norm, rtol=1e-5)
    np.testing.assert_allclose(one.loss, four.loss, rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_rows_without_masks_weigh_nothing(accumulate):
    """Two rows of four have none, in one slice of the accumulation all rows."""
    state, scores = after(1, accumulate, optax.adam(1e-3), empty=(0, 1, 5))
    assert float(scores.weight) == 24 - (1 + 2 + 6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    batch = masked_batch(empty=(0, 1, 5))
    changed = batch | {"masked_labels": batch["masked_labels"].copy()}
    changed["masked_labels"][[0, 1, 5]] = 7
    gradient = jax.jit(jax.grad(lambda params, batch: score(params, batch, None).loss))
    gradients = [gradient(random_params(ONE_LAYER), b) for b in (batch, changed)]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


def test_a_batch_without_any_mask_moves_nothing_but_the_step():
    state, scores = after(1, 2, optax.sgd(1.0), empty=range(8))
    assert float(scores.weight) == 0 and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, random_params(ONE_LAYER))


def test_the_window_is_the_sum_since_it_was_new():
    step = jax.jit(make_train_step(score, optax.sgd(0.1), seed=0))
    state = TrainState.create(jax.device_put(random_params(ONE_LAYER)), optax.sgd(0.1))
    total = Scores.zero()
    for number in range(3):
        state, scores = step(state, masked_batch(seed=number, empty=(number,)))
        total += scores
    jax.tree.map(np.testing.assert_array_equal, state.window, total)
    assert all(float(x) == 0 for x in jax.tree.leaves(state.reset_window().window))


def test_dropout_follows_seed_step_and_row_alone():
    config = ONE_LAYER.replace(hidden_dropout_prob=0.3)
    module = MaskedLM(config)

    def noisy(params, batch, key):
        return masked_lm_scores(module, params, batch, key)

    optimizer = optax.sgd(0.0)
    state = TrainState.create(random_params(ONE_LAYER), optimizer)

    def losses(seed, accumulate, *numbers):
        step = jax.jit(make_train_step(noisy, optimizer, seed, accumulate))
        return [
            float(step(state.replace(step=jnp.int32(n)), masked_batch())[1].loss) for n in numbers
        ]

    first, again, later = losses(0, 1, 1, 1, 2)
    assert first == again
    assert len({first, later, *losses(1, 1, 1)}) == 3
    np.testing.assert_allclose(losses(0, 4, 1), first, rtol=1e-6)


def test_evaluation_has_no_dropout():
    layout = Layout(Parallelism(), ONE_LAYER)
    score = compile_eval_step(lambda p, b, key: Scores(*[jnp.float32(key is None)] * 3), layout)
    found = score({}, layout.shard_batch(masked_batch()))
    assert float(found.loss) == 1


# ---------------------------------------------------------------------------------------------
# The loop.


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
    checkpoints = CheckpointManager(directory / "checkpoints", keep=20)
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


def test_loop_reports_evaluates_and_saves_in_its_cadence(tmp_path):
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


def test_a_signal_ends_the_loop_after_its_step_saved_and_evaluated(tmp_path):
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


def test_a_second_signal_is_not_held_back(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        yield np.float32(1)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    assert loop(tmp_path, batches=twice())[1] == signal.SIGINT


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_what_is_not_finite_is_refused_and_never_saved(tmp_path, log_every):
    batches = iter([np.float32(x) for x in [1, 1, 1, np.nan, 1, 1, 1, 1]])
    with pytest.raises(InputError, match=r"--learning_rate.*another --run_dir"):
        loop(tmp_path, steps=8, batches=batches, log_every=log_every, save_every=1)
    assert saved(tmp_path) == [1, 2, 3]


def test_a_save_that_fails_is_told_and_gone_on_from_if_asked(tmp_path, capsys):
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
            tmp_path, batches=filling(), save_every=1, eval_every=40, failed_save="continue"
        )
        assert stopped is None and int(state.step) == 20
        steps = [int(p.name) for p in disk.path.iterdir() if p.name.isdigit()]
        assert set(range(1, 6)) | set(range(14, 21)) <= set(steps) and 10 not in steps
    said = capsys.readouterr().out
    assert "warning: step" in said and "No space left on device" in said and "is whole" in said


def test_a_damaged_step_is_set_aside_on_request_alone(tmp_path, capsys):
    state, _ = loop(tmp_path)
    largest = max(
        (tmp_path / "checkpoints/20/params").rglob("*"),
        key=lambda p: p.stat().st_size * p.is_file(),
    )
    largest.write_bytes(b"")
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep=20)
    with pytest.raises(
        CheckpointError, match=r"20: the checkpoint is damaged.*--set_damaged_aside"
    ):
        resume(checkpoints, state, set_damaged_aside=False)
    assert checkpoints.latest_step() == 20
    assert int(resume(checkpoints, state, set_damaged_aside=True).step) == 16
    assert "set aside: " in capsys.readouterr().err
    assert (tmp_path / "checkpoints/damaged/20").is_dir() and checkpoints.latest_step() == 16
    checkpoints.save(state, {})  # the step comes again
    checkpoints.close()
    assert CheckpointManager(tmp_path / "checkpoints").latest_step() == 20


def test_what_is_compiled_again_is_told(tmp_path, capsys):
    def growing(state):
        jax.jit(lambda x: x + 1)(np.zeros(int(state.step)))  # a new shape at every evaluation
        return VALIDATION | {"loss": 1.0}

    loop(tmp_path / "same")
    loop(tmp_path / "evaluated before it is reported", log_every=20)
    assert "compiled again" not in capsys.readouterr().out
    loop(tmp_path / "changing", validate=growing)
    assert "warning: step 16: something was compiled again" in capsys.readouterr().out


def test_the_account_of_time_is_whole(tmp_path, capsys):
    loop(tmp_path, compile_seconds=1e6, profile_steps=(3, 4))
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("time: ")]
    assert "compiling 277:46:40 (100%)" in line and "goodput 0%" in line
    for bucket in ("steps", "input", "evaluation", "checkpoints"):
        assert f"{bucket} 0:0" in line
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_report_drops_what_is_about_to_run_again_and_a_line_cut_off(tmp_path):
    loop(tmp_path)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"kind": "train", "st')
    Report(tmp_path, 20, start=9).close()
    assert [r["step"] for r in read_records(path)] == [3, 6, 8, 9]
    assert whole.startswith(path.read_text())

"""A run that is interrupted anywhere and run again ends bit for bit like an uninterrupted run."""

import random
import shutil
import signal
import subprocess
import time

import jax
import pytest

from experiments.common.run_report import read_records
from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.training.checkpoint import CheckpointManager
from prelnroberta.training.optimizer import OptimizerConfig, adamw
from prelnroberta.training.train_step import TrainState
from tests.helpers.full_disk import filled_disk
from tests.helpers.programs import (
    ENVIRONMENT,
    ROOT,
    call,
    command,
    finished_run,
    records,
    tiny_flags,
)

LAST = 40


def assert_as_if_never_stopped(run_dir, moments):
    ours, theirs = records(run_dir), records(finished_run())
    assert [repr(r) for r in ours] == [repr(r) for r in theirs], moments
    weights = "model/model.safetensors"
    assert (run_dir / weights).read_bytes() == (finished_run() / weights).read_bytes(), moments


def start(run_dir):
    return subprocess.Popen(
        [*command("pretrain", *tiny_flags()), f"--run_dir={run_dir}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, condition, pause=0.001):
    while not condition() and process.poll() is None:
        time.sleep(pause)


def reported(run_dir):
    """The last step in the report, 0 before there is one."""
    return max((r["step"] for r in read_records(run_dir / "metrics.jsonl")), default=0)


def is_saving(run_dir):
    return any(run_dir.glob("checkpoints/*orbax-checkpoint-tmp"))


def assert_checkpoints_are_whole(run_dir, copy):
    """Every step that is there restores, checksums and all."""
    if not (run_dir / "checkpoints").exists():
        return None
    shutil.copytree(run_dir / "checkpoints", copy)
    config = RobertaPreLayerNormConfig.preset("tiny", vocab_size=300)
    optimizer = adamw(OptimizerConfig(steps=LAST, learning_rate=1e-3), config)
    like = TrainState.create(parameters.init(config, jax.random.key(1)), optimizer)
    checkpoints = CheckpointManager(copy)
    steps = sorted(int(p.name) for p in copy.iterdir() if p.name.isdigit())
    for step in steps:
        assert int(checkpoints.restore(like, step)[0].step) == step
    latest = checkpoints.latest_step()
    checkpoints.close()
    return latest


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_stop_signals_save_and_rerun_resumes(tmp_path, name):
    run_dir = tmp_path / "run"
    seed = random.randrange(1 << 30)
    after = random.Random(seed).randrange(0, 28)
    process = start(run_dir)
    wait_for(process, lambda: reported(run_dir) >= max(after, 1))
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.Signals[name], (out, err)
    assert "Traceback" not in err
    [line] = [line for line in out.splitlines() if line.startswith(name)]
    step = int(line.split("saved step ")[1].split(" ")[0])
    assert f"of {LAST}" in line and "run the same command to resume" in line
    assert assert_checkpoints_are_whole(run_dir, tmp_path / "copy") == step
    assert not (run_dir / "model").exists()

    done = call("pretrain", *tiny_flags(), f"--run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert f"resuming {run_dir} at step {step} of {LAST}, bit for bit" in done.stdout
    assert_as_if_never_stopped(run_dir, (seed, after, step))


def test_repeatedly_killed_run_ends_the_same(tmp_path):
    run_dir = tmp_path / "run"
    seed = random.randrange(1 << 30)
    moments = random.Random(seed)
    kills = []
    for number in range(4):
        process = start(run_dir)
        if number == 0:  # anywhere, the set-up of the run among it
            time.sleep(moments.uniform(0.5, 8))
        else:
            goal = reported(run_dir) + moments.randrange(1, 9)
            wait_for(process, lambda goal=goal: reported(run_dir) >= goal)
            if number % 2:
                wait_for(process, lambda: is_saving(run_dir), pause=0)
            else:
                time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
        latest = assert_checkpoints_are_whole(run_dir, tmp_path / f"copy{number}")
        kills.append((process.returncode, reported(run_dir), latest))
    done = call("pretrain", *tiny_flags(), f"--run_dir={run_dir}")
    assert done.returncode == 0, (done.stderr, seed, kills)
    assert_as_if_never_stopped(run_dir, (seed, kills))
    assert any(code == -signal.SIGKILL for code, *_ in kills), kills


def test_corrupt_checkpoint_prints_one_line_and_previous_one_resumes(tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run(), run_dir)
    shutil.rmtree(run_dir / "model")
    last = run_dir / "checkpoints" / str(LAST)
    data = max((last / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    for damage in ("flip", "remove"):
        if damage == "remove":
            data.unlink()
        done = call("pretrain", *tiny_flags(), f"--run_dir={run_dir}")
        assert done.returncode == 2, done.stdout
        lines = [x for x in done.stderr.splitlines() if not x.startswith("token files: ")]
        assert len(lines) == 1 and lines[0].startswith(f"error: {last}: "), done.stderr
        assert "corrupt" in lines[0] and "move that directory away" in lines[0]
        assert records(run_dir) == records(finished_run())  # nothing is dropped
    shutil.rmtree(last)
    done = call("pretrain", *tiny_flags(), f"--run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert_as_if_never_stopped(run_dir, "damaged")


def test_full_disk_prints_one_line_and_last_checkpoint_resumes(tmp_path):
    with filled_disk(tmp_path / "disk") as disk:
        process = start(disk.path)
        wait_for(process, lambda: any(disk.path.glob("checkpoints/[0-9]*[0-9]")))
        disk.fill()
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, (out, err)
        lines = [x for x in err.splitlines() if not x.startswith("token files: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        assert "No space left on device" in lines[0]
        latest = assert_checkpoints_are_whole(disk.path, tmp_path / "copy")
        assert latest is not None
        disk.empty()
        done = call("pretrain", *tiny_flags(), f"--run_dir={disk.path}")
        assert done.returncode == 0, done.stderr
        assert f"at step {latest} of" in done.stdout
        assert_as_if_never_stopped(disk.path, "full disk")

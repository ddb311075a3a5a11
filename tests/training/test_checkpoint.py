"""A checkpoint is whole or not there, and what is read is what was saved, to the bit."""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prelnroberta.training.checkpoint import CheckpointError, Checkpoints
from prelnroberta.training.train_step import TrainState
from tests.helpers.support import filled_disk

# What orbax's threads leave behind when files are damaged on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(step, seed=None, size=60):
    params = {"w": jax.random.normal(jax.random.key(seed or step), (size, size)), "b": jnp.ones(3)}
    made = TrainState.create(params, optax.adam(1e-3))
    window = dataclasses.replace(made.window, loss=jnp.float32(step / 3))
    return made.replace(step=jnp.int32(step), window=window)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def assert_says(error, *parts):
    text = str(error.value)
    assert "\n" not in text and len(text) < 800, text
    for part in parts:
        assert part in text, (part, text)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2, for copies to be damaged."""
    directory = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(directory, keep=5)
    for step in (1, 2):
        checkpoints.save(state(step), {"note": step})
    checkpoints.close()
    return directory


def test_round_trip_of_all_of_the_state(saved):
    checkpoints = Checkpoints(saved)
    assert checkpoints.latest() == 2
    for step in (1, 2):
        found, extra = checkpoints.restore(state(9), step)
        assert_same(found, state(step))
        assert extra == {"note": step}
    checkpoints.close()


def test_latest_and_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, loss in [(1, None), (2, 1.0), (3, 3.0), (4, None), (5, 2.0), (6, None)]:
        checkpoints.save(state(step), {}, loss)
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "5", "6", "removed"]
    assert not any((tmp_path / "removed").iterdir())


DAMAGES = {
    "flip": lambda path, at: path.write_bytes(
        (data := path.read_bytes())[: (i := int(at * len(data)))]
        + bytes([data[i] ^ 0x10])
        + data[i + 1 :]
    ),
    "cut": lambda path, at: os.truncate(path, int(at * path.stat().st_size)),
    "remove": lambda path, at: path.unlink(),
}


def files_of(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.stat().st_size)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_file_is_told_or_harmless(saved, tmp_path, damage, capfd):
    seed = random.randrange(1 << 30)
    at = random.Random(seed)
    told = set()
    for number, original in enumerate(files_of(saved / "2")):
        directory = tmp_path / str(number)
        shutil.copytree(saved, directory)
        path = directory / original.relative_to(saved)
        DAMAGES[damage](path, at.random())
        name = str(original.relative_to(saved / "2"))
        checkpoints = Checkpoints(directory)
        try:
            found, _ = checkpoints.restore(state(9), 2)
        except CheckpointError as error:
            text = str(error)
            assert "\n" not in text and f"{directory}/2" in text, (text, seed)
            told.add(name)
        else:
            assert_same(found, state(2))
        # What stands beside it is not touched, and the damaged one is left for whoever wants it.
        assert_same(checkpoints.restore(state(9), 1)[0], state(1))
        assert (directory / "2").is_dir()
        checkpoints.close()
    data = {str(p.relative_to(saved / "2")) for p in files_of(saved / "2") if p.parent.name == "d"}
    assert "manifest/metadata" in told, seed
    if damage != "flip":
        needed = {n for n in data if (saved / "2" / n).stat().st_size > 200}
        assert len(told & needed) >= 2, (sorted(told), seed)
    assert capfd.readouterr().err == ""


def test_every_flipped_byte_of_the_weights_is_found(saved, tmp_path):
    largest = max(files_of(saved / "2" / "params"), key=lambda p: p.stat().st_size)
    at = random.Random(0)
    for number in range(8):
        directory = tmp_path / str(number)
        shutil.copytree(saved, directory)
        DAMAGES["flip"](directory / largest.relative_to(saved), at.uniform(0.1, 0.9))
        checkpoints = Checkpoints(directory)
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(state(9))
        assert_says(error, f"{directory}/2", "damaged", "move that directory away")
        checkpoints.close()


def test_a_changed_value_is_named_by_its_leaf(saved, tmp_path):
    """orbax itself loads another save's values without a word; the manifest's checksums do not."""
    shutil.copytree(saved, tmp_path / "c")
    other = Checkpoints(tmp_path / "other")
    other.save(state(2, seed=7), {"note": 2})
    other.close()
    params = "c/2/params"
    shutil.rmtree(tmp_path / params)
    shutil.copytree(tmp_path / "other" / "2" / "params", tmp_path / params)
    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(state(9))
    assert_says(error, "params/w", f"{tmp_path}/c/2")
    checkpoints.close()


def test_another_model_is_named_leaf_by_leaf(saved):
    checkpoints = Checkpoints(saved)
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(state(9, size=61))
    assert "params/w" in str(error.value) and "another model or optimizer" in str(error.value)
    checkpoints.close()


SAVER = """
import sys
sys.path.insert(0, ".")
from tests.training.test_checkpoint import Checkpoints, state
checkpoints = Checkpoints(sys.argv[1], keep=2)
print("ready", flush=True)
for step in range(1, 10_000):
    checkpoints.save(state(step, size=400), {"note": step})
"""


def test_killed_while_saving_leaves_whole_steps_only(tmp_path):
    seed = random.randrange(1 << 30)
    moments = random.Random(seed)
    process = None
    for number in range(3):
        directory = tmp_path / str(number)
        command = [sys.executable, "-c", SAVER, str(directory)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()
        while not list(directory.glob("[0-9]*[0-9]")):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1))
        while not list(directory.glob("*tmp*")):  # while a step is being written
            time.sleep(0.0005)
        process.kill()
        process.wait()
        checkpoints = Checkpoints(directory)
        steps = sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())
        assert checkpoints.latest() == steps[-1], seed
        for step in steps:
            found, extra = checkpoints.restore(state(9, size=400), step)
            assert_same(found, state(step, size=400))
            assert extra == {"note": step}
        checkpoints.close()
        assert not list(directory.glob("*tmp*")), "what was half written is cleared away"


KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, ".")
from tests.training.test_checkpoint import Checkpoints, assert_same, state

directory, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
moments, found = random.Random(seed), []
for _ in range(kills):
    reader, writer = os.pipe()
    child = os.fork()  # everything is imported by now, and no device yet asked for
    if child == 0:
        checkpoints = Checkpoints(directory, keep=2)
        latest = checkpoints.latest() or 0
        if latest:
            restored, extra = checkpoints.restore(state(9))
            assert_same(restored, state(latest))
            assert extra == {"note": latest}
        os.write(writer, f"{latest}\\n".encode())
        for step in range(latest + 1, 10_000):
            checkpoints.save(state(step), {"note": step})
            os.write(writer, b"begun\\n")
    os.close(writer)
    with os.fdopen(reader) as pipe:
        line = pipe.readline()
        if not line:
            sys.exit(f"a start failed after {found}")
        found.append(int(line))
        begin, saves = time.monotonic(), moments.randrange(1, 4)
        for _ in range(saves):
            pipe.readline()
        # Anywhere in the time that a save takes, on however busy a machine.
        time.sleep(moments.uniform(0, (time.monotonic() - begin) / saves))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print(*found)
"""


@pytest.mark.slow
def test_fifty_kills_at_any_moment_and_every_start_finds_a_whole_step(tmp_path):
    """Each start verifies the latest step, all of it, and saves on until it is killed."""
    seed = random.randrange(1 << 30)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "c"), "50", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, (seed, done.stderr[-3000:])
    found = [int(step) for step in done.stdout.split()]
    assert len(found) == 50 and found == sorted(found) and found[-1] > 25, (seed, found)


def test_full_disk_is_told_and_costs_no_earlier_step(tmp_path, caplog):
    with filled_disk(tmp_path / "disk") as disk:
        checkpoints = Checkpoints(disk.path, keep=9)
        checkpoints.save(state(1, size=200), {})
        checkpoints.wait()
        disk.fill()
        with pytest.raises(CheckpointError) as error:
            checkpoints.save(state(2, size=200), {})
            checkpoints.wait()
        assert_says(
            error, "No space left on device", str(disk.path), "step 1 is whole", "make room"
        )
        try:
            checkpoints.close()
        except CheckpointError as again:
            assert "step 1 is whole" in str(again)
        assert not caplog.records  # of the tracebacks of orbax's threads
        disk.empty()
        checkpoints = Checkpoints(disk.path, keep=9)
        assert checkpoints.latest() == 1
        assert_same(checkpoints.restore(state(9, size=200))[0], state(1, size=200))
        checkpoints.save(state(2, size=200), {})
        checkpoints.wait()
        assert_same(checkpoints.restore(state(9, size=200))[0], state(2, size=200))
        checkpoints.close()


def test_an_error_of_the_writing_thread_surfaces(tmp_path, monkeypatch):
    """A bug behind `save` is raised by the next call, as it is: never lost in a thread."""
    checkpoints = Checkpoints(tmp_path)
    from orbax.checkpoint._src.checkpointers import async_checkpointer

    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(async_checkpointer, "_background_wait_for_commit_futures", broken)
    checkpoints.save(state(1), {})
    with pytest.raises(RuntimeError, match="a bug"):
        checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.latest() is None

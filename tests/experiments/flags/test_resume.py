"""flags.txt: what a resumed run is compared with."""

import dataclasses

import pytest

from experiments.flags.programs import PretrainSettings
from experiments.flags.resume import check_same_flags, flags_text
from prelnroberta.errors import InputError

SETTINGS = PretrainSettings(run_dir="runs/a", steps=40, freeze=("a/*", "b"))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "flags.txt"
    path.write_text(flags_text(SETTINGS))
    return path


def test_same_flags(saved):
    check_same_flags(SETTINGS, saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"run_dir": "elsewhere"},
        {"mesh_fsdp": 2, "parallelism": "pmap"},
        {"keep_checkpoints": 9, "on_save_error": "continue"},
        {"profile_steps": (2, 3), "multihost": True},
    ],
)
def test_flags_that_may_change(changes, saved):
    check_same_flags(dataclasses.replace(SETTINGS, **changes), saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 41}, r"--steps \(there 40, here 41\)"),
        ({"decay_norms": True}, r"--decay_norms \(there false, here true\)"),
        ({"hidden_size": 64}, r"--hidden_size \(there not set, here 64\)"),
    ],
)
def test_flags_that_must_not_change(changes, message, saved):
    with pytest.raises(InputError, match=message):
        check_same_flags(dataclasses.replace(SETTINGS, **changes), saved)


def test_run_of_an_older_version(saved):
    """Its flags have other names: one line says so instead of naming each."""
    saved.write_text("--run_dir=runs/a\n--steps=40\n--mask_same=0.1\n")
    with pytest.raises(InputError, match="older version of prelnroberta") as caught:
        check_same_flags(SETTINGS, saved)
    assert "\n" not in str(caught.value)

"""The program `finetune`: the run folder, resuming, seeds and sweeps, and errors."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.common import sweep
from tests.helpers.finetuning import finetune_flags, finished_finetuning, reviews
from tests.helpers.programs import ENVIRONMENT, ROOT, VIZ, call, command, error_line, records


def test_run_folder_contents():
    run_dir, said = finished_finetuning()
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {
        *("flags.txt", "data.json", "metrics.jsonl", "checkpoints", "model"),
        *("predictions.jsonl", "classes.txt", "results.json"),
    }
    pictures = {"loss.png", "confusion.png"}
    assert names & pictures == (pictures if VIZ else set())
    # By what they are for: here both have the same name.
    files = {"train_file": reviews("train", 120, 1), "eval_file": reviews("dev", 40, 2)}
    digests = {flag: hashlib.sha256(path.read_bytes()).hexdigest() for flag, path in files.items()}
    assert json.loads((run_dir / "data.json").read_text()) == digests
    results = json.loads((run_dir / "results.json").read_text())
    validations = [r for r in records(run_dir) if r["kind"] == "validation"]
    assert [r["step"] for r in validations] == [9, 18, 27, 36, 45]
    best = max(validations, key=lambda r: (r["accuracy"], -r["loss"]))
    assert results["metrics"]["accuracy"] == best["accuracy"] > results["baseline"] + 0.2
    assert results["best_step"] == best["step"] and f"step {best['step']} of 45" in said


def test_interrupted_run_resumes_bit_for_bit(tmp_path):
    run_dir = tmp_path / "run"
    arguments = [*finetune_flags(), f"--run_dir={run_dir}"]
    process = subprocess.Popen(
        command("finetune", *arguments), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    while process.poll() is None and not any(r["step"] >= 14 for r in records(run_dir)):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode in (143, 0) and not (run_dir / "results.json").exists()
    done = call("finetune", *arguments)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
    assert [repr(r) for r in records(run_dir)] == [
        repr(r) for r in records(finished_finetuning()[0])
    ]
    for name in ("model/model.safetensors", "predictions.jsonl", "results.json"):
        assert (run_dir / name).read_bytes() == (finished_finetuning()[0] / name).read_bytes(), name
    again = call("finetune", *arguments)
    assert again.returncode == 0 and "is complete" in again.stdout


def test_seeds_and_sweep_table_and_early_stopping(tmp_path):
    sweep = {
        "learning_rate": 3e-3,
        "patience": 1,
        "eval_every": 3,
        "epochs": 2,
        "gradient_accumulation_steps": 1,
    }
    done = call(
        "finetune",
        *finetune_flags(**sweep, save_every=3),
        *("--seeds=1,2", "--sweep=learning_rate=1e-9,3e-3", f"--run_dir={tmp_path / 'run'}"),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert [row["run"] for row in table] == ["learning_rate=1e-9", "learning_rate=3e-3"]
    for row in table:
        results = [
            json.loads((tmp_path / "run" / f"{row['run']},seed={s}" / "results.json").read_text())
            for s in (1, 2)
        ]
        values = [r["metrics"]["accuracy"] for r in results]
        assert row["values"] == values and row["seeds"] == 2
        np.testing.assert_allclose(row["mean"], np.mean(values))
        np.testing.assert_allclose(row["deviation"], np.std(values, ddof=1))
    assert "learning_rate=3e-3" in done.stdout.splitlines()[-1]
    # At a rate of almost nothing the first evaluation is never beaten.
    idle = records(tmp_path / "run" / "learning_rate=1e-9,seed=1")
    assert max(r["step"] for r in idle) == 6


def test_evaluate_reports_truncated_examples():
    file = reviews("dev", 40, 2)
    done = call(
        "evaluate", f"--model={finished_finetuning()[0]}", f"--file={file}", "--max_length=8"
    )
    assert done.returncode == 0, done.stderr
    assert " of 40 truncated to 8 tokens\n" in done.stdout


def test_single_seed_has_no_deviation(tmp_path):
    points = [{"learning_rate": rate} for rate in ("1e-3", "3e-3")]
    for point in points:
        (tmp_path / sweep.name(point)).mkdir()
        results = {"metric": "accuracy", "baseline": 0.5, "metrics": {"accuracy": 0.75}}
        (tmp_path / sweep.name(point) / "results.json").write_text(json.dumps(results))
    rows = sweep.write_table(tmp_path, points).splitlines()[1:]
    assert [row.split() for row in rows] == [
        [f"learning_rate={rate}", "1", "0.7500", "-", "0.5000"] for rate in ("1e-3", "3e-3")
    ]


def test_changed_settings_and_data_raise(tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_finetuning()[0], run_dir)
    (run_dir / "results.json").unlink()

    def line(**changes):
        return error_line(*finetune_flags(**changes), f"--run_dir={run_dir}", program="finetune")

    assert "--layer_decay (there 0.9, here 1.0)" in line(layer_decay=1.0)
    other = tmp_path / "dev.csv"
    shutil.copy(reviews("dev", 40, 2), other)
    with other.open("a") as file:
        file.write("more,good\n")
    (run_dir / "flags.txt").write_text(
        (run_dir / "flags.txt").read_text().replace(str(reviews("dev", 40, 2)), str(other))
    )
    assert "has changed since" in line(eval_file=other)


BAD = [
    ({"task": "translation"}, "translation"),
    ({"train_file": "/nowhere.csv"}, "--train_file=/nowhere.csv: no such file"),
    ({"init_from": "/nowhere"}, "/nowhere: no config.json"),
    ({"epochs": 0}, "--epochs=0.0, expected more than 0"),
    (
        {"gradient_accumulation_steps": 3},
        "--gradient_accumulation_steps=3 does not divide --batch_size=8",
    ),
    ({"max_length": 4}, "--max_length=4, expected 8 to 64"),
    ({"class_weights": "1,2,3"}, "--class_weights=1,2,3, expected 'balanced' or 2 numbers"),
    ({"label_column": "answer"}, "no column 'answer'; the file has columns text, label"),
    ({"labels": "good,fair"}, "label 'bad' is not among the 2 labels good, fair"),
    ({"freeze_layers": 9}, "freeze_layers=9, expected 0 to 2"),
    ({"sweep": "learning_rte=1,2"}, "there is no flag --learning_rte"),
    ({"sweep": "learning_rate=fast,1"}, "fast"),
    ({"seeds": "1,x"}, "x"),
]


@pytest.mark.parametrize(("changes", "part"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input_prints_one_line(changes, part, tmp_path):
    done = call("finetune", *finetune_flags(**changes), f"--run_dir={tmp_path / 'run'}")
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert part in done.stderr and "validation loss" not in done.stdout, done.stderr
    assert not (tmp_path / "run" / "flags.txt").exists()


def test_weights_are_in_memory_once(tmp_path):
    """On an accelerator a second copy of them would take its memory for as long as the run."""
    program = """
import sys
import jax
from experiments import finetune
from experiments.common import training_run
from experiments.flags.launch import launch

train = training_run.train

def weighed(state, *args, **others):
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print("held", sum(array.nbytes for array in jax.live_arrays()) / own)
    return train(state, *args, **others)

training_run.train = weighed
launch(finetune.main, finetune.FinetuneSettings)
"""
    given = finetune_flags(steps=1, run_dir=tmp_path / "run")
    result = subprocess.run(
        [sys.executable, "-c", program, *given],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    [held] = [
        float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("held")
    ]
    assert 1 <= held < 1.1

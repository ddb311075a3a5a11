"""The program `pretrain`, from raw text to a Hugging Face folder."""

import json
import shutil

import numpy as np

from experiments.common.run_report import read_records
from prelnroberta.data.tokenizer import load_tokenizer
from prelnroberta.pretrained.hf_checkpoint import load_pretrained
from tests.helpers.programs import ROOT, VIZ, call, finished_run, tiny_flags


def contents(directory):
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_run_folder_contents():
    run_dir = finished_run()
    for name in ("flags.txt", "corpus.json", "metrics.jsonl", "tokenizer", "model"):
        assert (run_dir / name).exists(), name
    assert (run_dir / "loss.png").exists() == VIZ
    assert any((run_dir / "events").glob("*")) == VIZ
    params, config = load_pretrained(run_dir / "model")
    for directory in (run_dir / "model", run_dir / "tokenizer"):
        tokenizer = load_tokenizer(directory)
        assert tokenizer.get_vocab_size() == config.vocab_size == 300
    assert params["embeddings"]["word"].shape == (300, 32)
    manifest = json.loads((run_dir / "corpus.json").read_text())
    assert manifest["train"]["text"]["bytes"] > 400_000
    assert not [p for p in run_dir.iterdir() if "partial" in p.name]


def test_records_follow_intervals_and_loss_falls():
    records = read_records(finished_run() / "metrics.jsonl")
    steps = {
        kind: [r["step"] for r in records if r["kind"] == kind] for kind in ("train", "validation")
    }
    assert steps == {"train": [7, 14, 21, 28, 35, 40], "validation": [9, 18, 27, 36, 40]}
    validation = [r for r in records if r["kind"] == "validation"]
    losses = [r["loss"] for r in validation]
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.1
    for record in validation:
        np.testing.assert_allclose(record["perplexity"], np.exp(record["loss"]), rtol=1e-6)
        assert record["unigram_loss"] == validation[0]["unigram_loss"]
        assert record["masked_tokens"] == validation[0]["masked_tokens"] > 0
    rates = {r["step"]: r["learning_rate"] for r in records if r["kind"] == "train"}
    assert max(rates, key=rates.get) == 7 and rates[40] < 1e-4  # the warm-up takes 5 steps


def test_finished_run_is_unchanged():
    run_dir = finished_run()
    before = contents(run_dir)
    done = call("pretrain", *tiny_flags(), f"--run_dir={run_dir}")
    assert done.returncode == 0 and done.stderr == ""
    assert "is complete: 40 steps of 40" in done.stdout and "experiments.predict" in done.stdout
    assert "compiled" not in done.stdout
    assert contents(run_dir) == before


def test_run_killed_before_export_writes_its_model(tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run(), run_dir)
    shutil.rmtree(run_dir / "model")
    done = call("pretrain", *tiny_flags(), f"--run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    for name in ("model/model.safetensors", "model/config.json", "metrics.jsonl"):
        assert (run_dir / name).read_bytes() == (finished_run() / name).read_bytes(), name


def test_flags_txt_reruns_the_run(tmp_path):
    """And a copy of its tokenizer gives the same numbers, as does another cache of the text."""
    run_dir = finished_run()
    done = call(
        "pretrain",
        f"--flagfile={run_dir / 'flags.txt'}",
        f"--run_dir={tmp_path / 'again'}",
        f"--cache_dir={tmp_path / 'cache'}",
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        (d / "model" / "model.safetensors").read_bytes() for d in (run_dir, tmp_path / "again")
    )
    assert ours == theirs


def test_init_from_model(tmp_path):
    model = finished_run() / "model"
    flags = tiny_flags(steps=9, learning_rate=1e-5, warmup_steps=0)
    done = call("pretrain", *flags, f"--init_from={model}", f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    before = read_records(finished_run() / "metrics.jsonl")[-1]["loss"]
    after = read_records(tmp_path / "run" / "metrics.jsonl")[-1]["loss"]
    assert abs(after - before) < 0.05


def test_steps_do_not_wait_for_input(tmp_path):
    """The small recipe's rows and masks; one layer, so that the step is the quicker."""
    flags = tiny_flags()
    corpus = [flag for flag in flags if flag.split("=")[0] in ("--corpus", "--cache_dir")]
    done = call(
        "pretrain",
        f"--flagfile={ROOT / 'experiments' / 'recipes' / 'small_cpu.flags'}",
        *corpus,
        "--vocab_size=1024",
        "--num_hidden_layers=1",
        "--steps=20",
        "--warmup_steps=0",
        "--log_every=10",
        "--eval_every=20",
        "--eval_rows=32",
        f"--run_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    waits = [r["input_wait"] for r in records if r["kind"] == "train"]
    # 2 % is the aim; the first window waits for the first batch, and other processes disturb.
    assert waits[-1] < 0.05, waits


def test_help_lists_every_flag_group_quickly():
    done = call("pretrain", "--help", timeout=20)
    for flag in ("--run_dir", "--corpus", "--[no]fast_start", "--mask_rate", "--clip_norm"):
        assert flag in done.stdout, flag

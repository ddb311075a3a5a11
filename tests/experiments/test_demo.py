"""The demo from start to end, with a recipe of a few steps."""

import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import demo
from prelnroberta.data.pretraining.corpus import Document, in_validation_split
from prelnroberta.data.tokenizer import train_tokenizer

RECIPE = """\
--preset=tiny
--vocab_size=400
--fast_start
--sequence_length=16
--batch_size=8
--mask_rate=0.3
--steps=400
--warmup_steps=2
--learning_rate=1e-3
--log_every=5
--eval_every=200
--eval_rows=32
--save_every=200
"""


def start(tmp_path, run_dir) -> subprocess.Popen:
    recipe = tmp_path / "recipe.flags"
    recipe.write_text(RECIPE + f"--cache_dir={tmp_path / 'cache'}\n")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.programs.short_demo", recipe, f"--run_dir={run_dir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.slow
def test_keyboard_interrupt_saves_and_rerun_finishes(tmp_path):
    """Ctrl-C reaches the whole process group: the run is saved, not killed, and goes on later."""
    run_dir = tmp_path / "run"
    process = start(tmp_path, run_dir)
    deadline = time.monotonic() + 300
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "SIGINT: saved step" in output, output

    process = start(tmp_path, run_dir)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for expected in ("resuming", "the curve", "10 masks", "the true word came first", "type next"):
        assert expected in output
    assert (run_dir / "model" / "model.safetensors").exists()


def test_masked_sentences_come_from_held_out_text_alone():
    sentence = "Returns the {} of a rather long array of numbers along the given axis."
    words = ("sum", "mean", "size", "shape", "norm", "rank", "trace", "order")
    documents = [Document(sentence.format(word), f"module{i}") for i, word in enumerate(words)]
    tokenizer = train_tokenizer([d.text for d in documents] * 50, 400)
    held_out = [d.text for d in documents if in_validation_split(d.key, 0.5)]
    examples = demo.masked_held_out_sentences(iter(documents), 0.5, tokenizer)
    assert sorted(text.replace("<mask>", word) for text, word in examples) == sorted(held_out)
    assert 0 < len(held_out) < len(words)

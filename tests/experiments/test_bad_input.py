"""Bad input to pretraining prints one line on standard error, before any training."""

import json
import shutil

import pytest

from tests.helpers.programs import call, corpus_file, error_line, finished_run, tiny_flags

# Each names the flag or field, the value, and what was expected.
FLAGS = [
    ({"mask_rate": "0"}, "--mask_rate=0.0", "(0, 1)"),
    ({"mask_rate": "1"}, "--mask_rate=1.0", "(0, 1)"),
    ({"mask_rate": "1.5"}, "--mask_rate=1.5", "(0, 1)"),
    ({"mask_rate": "-1"}, "--mask_rate=-1.0", "(0, 1)"),
    ({"mask_rate": "nan"}, "--mask_rate=nan", "(0, 1)"),
    ({"eval_mask_rate": "2"}, "--eval_mask_rate", "2.0"),
    (
        {"mask_random": "0.7", "mask_keep": "0.7"},
        "--mask_random=0.7 and --mask_keep=0.7",
        "sum is at most 1",
    ),
    ({"sequence_length": "65"}, "--sequence_length=65", "64", "max_position_embeddings=66"),
    ({"sequence_length": "2"}, "--sequence_length=2", "3 or more"),
    ({"steps": "0"}, "steps=0", "1 or more"),
    ({"warmup_steps": "41"}, "warmup_steps=41", "steps=40"),
    ({"learning_rate": "-1"}, "learning_rate=-1.0", "> 0"),
    ({"learning_rate": "nan"}, "learning_rate=nan", "> 0"),
    ({"batch_size": "0"}, "--batch_size=0", "1 or more"),
    ({"gradient_accumulation_steps": "3"}, "--gradient_accumulation_steps=3", "--batch_size=8"),
    ({"save_every": "0"}, "--save_every=0", "1 or more"),
    ({"validation_fraction": "0"}, "--validation_fraction=0.0", "evaluation needs held-out text"),
    ({"validation_fraction": "1"}, "--validation_fraction=1.0", "(0, 1)"),
    ({"validation_fraction": "nan"}, "--validation_fraction=nan", "(0, 1)"),
    ({"seed": "-1"}, "--seed=-1", "0 or more"),
    ({"preset": "tyni"}, "'tyni'", "tiny"),
    ({"hidden_size": "33"}, "hidden_size=33", "num_attention_heads=4"),
    ({"vocab_size": "100"}, "vocab_size 100", "261"),
    ({"corpus": "/nowhere/text.txt"}, "/nowhere/text.txt", "does not exist"),
    ({"tokenizer": "/nowhere"}, "/nowhere", "does not exist"),
    ({"init_from": "/nowhere"}, "/nowhere", "config.json"),
]


@pytest.mark.parametrize(("flags", "parts"), [(f, p) for f, *p in FLAGS], ids=lambda v: str(v)[:40])
def test_bad_flags_print_one_line(flags, parts, tmp_path):
    line = error_line(*tiny_flags(**flags), f"--run_dir={tmp_path / 'run'}")
    for part in parts:
        assert part in line, line


def corpus(tmp_path, content, **flags):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    run_dir = tmp_path / "run"
    return error_line(
        *tiny_flags(corpus=path, cache_dir=tmp_path / "cache", **flags, run_dir=run_dir)
    )


def test_empty_corpus(tmp_path):
    assert "corpus is empty" in corpus(tmp_path, b"")
    assert str(tmp_path / "text.txt") in corpus(tmp_path, b" \n\n \n")


def test_corpus_that_is_not_utf8(tmp_path):
    line = corpus(tmp_path, b"fine text\n" * 300_000 + b"caf\xe9 here")
    assert str(tmp_path / "text.txt") in line and "not UTF-8 at byte 3000003" in line


def test_too_little_text_names_the_split(tmp_path):
    documents = [f"document number {i} is short" for i in range(60)]
    text = "\n\n".join(documents).encode()
    line = corpus(tmp_path, text, validation_fraction=0.001, seed=3)
    assert "validation split is empty" in line
    # Enough for many rows of training, too little to hold one out.
    line = corpus(tmp_path, text, sequence_length=64, validation_fraction=0.02)
    assert "error: validation split: the corpus has" in line and "sequence length 64" in line
    line = corpus(tmp_path, "\n\n".join("abcdefghijkl").encode(), validation_fraction=0.5)
    assert "error: train split: the corpus has" in line


def test_changed_settings_of_existing_run_are_listed():
    run_dir = finished_run()
    changed = tiny_flags(learning_rate=0.003, mask_rate=0.3, hidden_dropout_prob=0)
    line = error_line(*changed, "--decay_norms", f"--run_dir={run_dir}")
    for part in (
        "--learning_rate (there 0.001, here 0.003)",
        "--mask_rate (there 0.15, here 0.3)",
        "--hidden_dropout_prob (there not set, here 0.0)",
        "--decay_norms (there false, here true)",
        str(run_dir),
    ):
        assert part in line, line
    assert line.count("(there") == 4, line


def test_corpus_changed_since_run_began(tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run(), run_dir)
    shutil.rmtree(run_dir / "model")
    record = run_dir / "corpus.json"
    manifest = json.loads(record.read_text())
    manifest["train"]["text"]["sha256"] = "0" * 64
    record.write_text(json.dumps(manifest))
    line = error_line(*tiny_flags(run_dir=run_dir))
    assert "corpus" in line and str(run_dir) in line and "another --run_dir" in line


def test_invalid_run_dirs(tmp_path):
    file = tmp_path / "file"
    file.write_text("text")
    assert f"{file} is a file" in error_line(*tiny_flags(), f"--run_dir={file}")
    assert "Not a directory" in error_line(*tiny_flags(), f"--run_dir={file / 'below'}")
    assert "holds no run" in error_line(*tiny_flags(), f"--run_dir={tmp_path}")
    assert "cannot be made" in error_line(*tiny_flags(), "--run_dir=/proc/run")


def test_unknown_flag_suggests_nearest_name(tmp_path):
    done = call("pretrain", *tiny_flags(), f"--run_dir={tmp_path / 'run'}", "--learning_rat=1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "'learning_rat'. Did you mean: learning_rate ?" in done.stderr
    assert "unexpected argument 'steps=3'" in error_line("--run_dir=x", "steps=3")


def test_bad_init_from_models(tmp_path):
    model, run_dir = tmp_path / "model", tmp_path / "run"
    other = tmp_path / "other"
    shutil.copytree(finished_run() / "model", model)

    def line(**flags):
        return error_line(*tiny_flags(init_from=model, run_dir=run_dir, **flags))

    from prelnroberta.data.tokenizer import save_tokenizer, train_tokenizer

    save_tokenizer(train_tokenizer([corpus_file().read_text()], 320), other, 64)
    said = line(tokenizer=other)
    assert "320 tokens" in said and "300" in said and "--tokenizer" in said

    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert str(weights) in line() and "damaged" in line()
    weights.unlink()
    assert str(weights) in line()
    weights.write_bytes(whole)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    assert "expected float32[65, 32]" in line()
    (model / "config.json").unlink()
    assert "config.json" in line()
    assert not (run_dir / "flags.txt").exists()


def test_eval_rows_may_exceed_held_out_rows(tmp_path):
    flags = tiny_flags(eval_rows=1_000_000, eval_every=40)
    done = call("pretrain", *flags, f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr

"""The program `predict`: text from every source, and the outputs of the model itself."""

import json
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest

from prelnroberta.data.tokenizer import load_tokenizer
from prelnroberta.model.heads import MaskedLM
from prelnroberta.pretrained.hf_checkpoint import load_pretrained
from tests.helpers.programs import ENVIRONMENT, ROOT, call, command, error_line, finished_run

TEXTS = ["The <mask> of a function.", "A <mask> and <mask> or.", "é <mask> 日本."]


def flags(**changes):
    values = {"task": "fill_mask", "model": finished_run()} | changes
    return [f"--{name}={value}" for name, value in values.items()]


def predict(*arguments, **options):
    done = call("predict", *arguments, **options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def direct():
    """text -> for each mask the softmax [V] of the module's own logits."""
    params, config = load_pretrained(finished_run() / "model")
    tokenizer = load_tokenizer(finished_run() / "model")

    def probabilities(text):
        ids = np.array([tokenizer.encode(text).ids])
        logits, _ = MaskedLM(config).apply({"params": params}, ids)
        masks = np.flatnonzero(ids[0] == config.vocab_size - 1)
        return np.asarray(jax.nn.softmax(logits[0, masks], axis=-1)), tokenizer

    return probabilities


def test_json_lines_match_model_outputs(direct):
    found = lines(predict(*flags(format="json", top_k=7), *(f"--text={t}" for t in TEXTS)))
    assert [line["text"] for line in found] == TEXTS
    assert [len(line["masks"]) for line in found] == [1, 2, 1]
    for line in found:
        expected, tokenizer = direct(line["text"])
        for guesses, own in zip(line["masks"], expected, strict=True):
            given = [g["probability"] for g in guesses]
            assert len(given) == 7 and given == sorted(given, reverse=True)
            np.testing.assert_allclose(given, np.sort(own)[::-1][:7], rtol=2e-5)
            for guess in guesses:
                np.testing.assert_allclose(guess["probability"], own[guess["id"]], rtol=2e-5)
                assert guess["text"] == tokenizer.decode([guess["id"]], skip_special_tokens=False)


def test_predictions_do_not_depend_on_source_batch_size_or_folder(tmp_path):
    texts = [f"{'word ' * i}<mask> of {'x' * i} <mask>" for i in range(9)]
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts) + "\n")
    one = lines(predict(*flags(format="json", file=path)))
    others = [
        predict(*flags(format="json"), input=path.read_text()),
        predict(*flags(format="json", file=path, batch_size=1)),
        predict(*flags(format="json", file=path, batch_size=4, model=finished_run() / "model")),
    ]
    assert [line["text"] for line in one] == texts
    for other in map(lines, others):
        assert [line["text"] for line in other] == texts
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(
                [g["probability"] for mask in a["masks"] for g in mask],
                [g["probability"] for mask in b["masks"] for g in mask],
                rtol=2e-5,
            )


def test_human_readable_output():
    out = predict(*flags(top_k=2), *(f"--text={t}" for t in TEXTS[:2])).splitlines()
    assert out[0] == TEXTS[0] and out[3] == TEXTS[1] and out[4] == "  mask 1"
    assert out[7] == "  mask 2" and len(out) == 10
    assert all("%" in out[i] for i in (1, 2, 5, 6, 8, 9))


def test_top_k_is_limited_to_the_vocabulary():
    [line] = lines(predict(*flags(format="json", top_k=10_000), "--text=A <mask>."))
    assert len(line["masks"][0]) == 300
    np.testing.assert_allclose(sum(g["probability"] for g in line["masks"][0]), 1, rtol=1e-5)


def test_predictions_are_streamed():
    """The first answers are there while the input still comes."""
    process = subprocess.Popen(
        command("predict", *flags(format="json", batch_size=1)),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for text in TEXTS:
        process.stdin.write(text + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"] == text
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


def test_closed_output_pipe_is_no_error(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("A <mask>.\n" * 3000)
    process = subprocess.Popen(
        command("predict", *flags(format="json", file=path, batch_size=8, top_k=50)),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert json.loads(process.stdout.readline())["text"] == "A <mask>."
    process.stdout.close()
    begin = time.monotonic()
    assert process.wait(60) == 141 and process.stderr.read() == ""
    assert time.monotonic() - begin < 20
    process.stderr.close()


def test_texts_without_prediction_are_reported_and_others_predicted(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text(f"A <mask>.\n\nnothing here\n{'long ' * 200}<mask>\nThe <mask> of it.\n")
    done = call("predict", *flags(format="json", file=path))
    assert [line["text"] for line in lines(done.stdout)] == ["A <mask>.", "The <mask> of it."]
    missing, long, error = done.stderr.splitlines()
    assert missing == f"{path}, line 3: has no <mask> to fill: 'nothing here'"
    assert long.startswith(f"{path}, line 4: ") and "longer than the 64" in long
    assert error == f"error: 2 of 4 got no answer: {path}, line 3; {path}, line 4"
    assert done.returncode == 2


def test_bad_texts_and_files(tmp_path):
    def line(*arguments, **changes):
        return error_line(*flags(**changes), *arguments, program="predict")

    path = tmp_path / "texts.txt"
    assert f"--file={path}: No such file" in line(file=path)
    assert "Is a directory" in line(file=tmp_path)
    path.write_bytes(b"")
    assert f"{path} holds no text" in line(file=path)
    path.write_bytes(b"A <mask>.\nB \xff <mask>.\n")
    assert f"{path}: not UTF-8 at byte 12 (line 2)" in line(file=path)
    assert "--top_k=0" in line("--text=A <mask>", top_k=0)


def test_bad_models(tmp_path):
    def line(model):
        return error_line(*flags(model=model), "--text=A <mask>", program="predict")

    assert "no config.json" in line(tmp_path)
    assert "no config.json" in line(tmp_path / "nowhere")
    (tmp_path / "flags.txt").write_text("")
    assert "finish it first" in line(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(finished_run() / "model", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert str(weights) in line(model)
    weights.write_bytes((finished_run() / "model" / "model.safetensors").read_bytes())
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (model / name).unlink()
    assert str(model) in line(model)

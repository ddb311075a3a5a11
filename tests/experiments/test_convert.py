"""The program `convert`: fairseq to a Hugging Face folder and back, dtypes, and errors."""

import json
import os

import pytest
import torch
import transformers

from bridges.formats.detect import open_checkpoint
from bridges.formats.fairseq import writer
from prelnroberta.data.tokenizer import train_tokenizer
from tests.helpers.foreign_checkpoints import V, fairseq_checkpoint, fairseq_state
from tests.helpers.programs import call, error_line
from tests.helpers.small_models import random_params
from tests.helpers.tolerances import assert_same_params
from tests.helpers.transformers_files import FILE_CONFIG

pytestmark = [pytest.mark.torch, pytest.mark.tensorflow, pytest.mark.oracle]

# Refusals.


# The program.


def convert(*arguments, **flags):
    done = call("convert", *(f"--{name}={value}" for name, value in flags.items()), *arguments)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def convert_error(**flags):
    return error_line(*(f"--{name}={value}" for name, value in flags.items()), program="convert")


def errors_in(said):
    """The two printed errors: in float64, and of the Flax model."""
    [first] = [x for x in said.splitlines() if x.startswith("input and output")]
    [second] = [x for x in said.splitlines() if x.startswith("this package's model")]
    return float(first.split("relative error ")[1].split()[0]), float(second.split()[-1])


def test_fairseq_to_folder_and_back(tmp_path):
    """The whole way, with a tokenizer; the second folder is the first, byte for byte."""
    source = tmp_path / "source"
    source.mkdir()
    tokenizer = train_tokenizer(["the cat sat on the mat, and that was that"] * 20, 300)
    config = FILE_CONFIG.replace(vocab_size=tokenizer.get_vocab_size())
    tree = random_params(config)
    tree["embeddings"]["token_type"] *= 0
    writer.save_checkpoint(source, tree, config, "masked_lm", tokenizer, "float16")

    said = convert(input=source / "model.pt", output=tmp_path / "a" / "model")
    assert "fairseq checkpoint (roberta_base, settings in args)" in said
    assert "2 layers of 32, 4 heads" in said and "float16" in said and "tokenizer of" in said
    in_float64, in_float32 = errors_in(said)
    assert in_float64 < 1e-12 and in_float32 < 1e-6
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "a" / "model")
    assert model.dtype == torch.float16 and model.config.layer_norm_eps == 1e-5
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    assert read("the cat <mask>")["input_ids"] == tokenizer.encode("the cat <mask>").ids

    convert(input=tmp_path / "a" / "model", output=tmp_path / "back", to="fairseq")
    convert(input=tmp_path / "back", output=tmp_path / "again")
    first, again = tmp_path / "a" / "model", tmp_path / "again"
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in again.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert "exists: name a new or empty folder" in convert_error(input=source, output=again)


def test_convert_to_requested_dtype(tmp_path):
    torch.save(fairseq_checkpoint(fairseq_state({"rte": 2})), tmp_path / "checkpoint_best.pt")
    output = tmp_path / "out"
    said = convert(input=tmp_path, output=output, head="rte", dtype="bfloat16")
    assert set(open_checkpoint(output).dtype_counts) == {"bfloat16"}
    assert "as sequence_classification" in said and "dropped: other heads" in said
    assert 1e-4 < errors_in(said)[0] < 2e-2
    assert json.loads((output / "config.json").read_text())["architectures"] == [
        "RobertaPreLayerNormForSequenceClassification"
    ]
    back = tmp_path / "back"
    said = convert(input=output, output=back, to="fairseq")
    assert errors_in(said)[0] < 1e-12 and f"the head is called {writer.HEAD_NAME}" in said
    assert_same_params(
        open_checkpoint(back, writer.HEAD_NAME).to_params(), open_checkpoint(output).to_params()
    )


def test_describe_writes_nothing(tmp_path):
    state = {n: v for n, v in fairseq_state().items() if "layernorm_embedding" not in n}
    torch.save(fairseq_checkpoint(state, layernorm_embedding=False), tmp_path / "a.pt")
    said = convert("--describe", input=tmp_path / "a.pt", output=tmp_path / "out")
    for part in (
        "fairseq checkpoint (roberta_large, settings in cfg)",
        "2 layers of 24, 3 heads, MLP 40 (gelu), 20 positions, layer_norm_eps 1e-05",
        f"vocabulary: {V} tokens; output tied to the word table",
        "float32",
        "heads: masked_lm; norms: embedding no, 4 in 2 layers (before each sublayer), final yes",
        "dropped: the training's last_optimizer_state",
        "refused: no embedding LayerNorm",
    ):
        assert part in said, part
    assert os.listdir(tmp_path) == ["a.pt"]


def test_errors_print_one_line_and_leave_no_files(tmp_path):
    path, output = tmp_path / "a.pt", tmp_path / "out"
    torch.save(fairseq_checkpoint(fairseq_state(), activation_fn="relu"), path)
    assert "LM head" in convert_error(input=path, output=output)
    whole = fairseq_checkpoint(fairseq_state())
    torch.save({**whole, "criterion": os.system}, path)
    assert "refused, nothing was run" in convert_error(input=path, output=output)
    torch.save(whole, path)
    path.write_bytes(path.read_bytes()[:-500])
    assert f"{path}: damaged" in convert_error(input=path, output=output)
    assert "--output is missing" in convert_error(input=path)
    assert "no such file or folder" in convert_error(input=tmp_path / "nothing", output=output)
    assert os.listdir(tmp_path) == ["a.pt"]

"""Files of transformers: every form is read, every model is detected, others raise."""

import json
import os
import random
import time

import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from bridges.formats.detect import open_checkpoint
from bridges.verify.conversion_check import verify_conversion
from bridges.verify.float64_reference import Float64Reference
from prelnroberta.config import ARCHITECTURES
from prelnroberta.errors import InputError
from prelnroberta.pretrained import hf_checkpoint
from tests.helpers.oracles import run_oracle
from tests.helpers.small_models import ODD, ragged_batch, random_params
from tests.helpers.tolerances import assert_close, assert_same_params
from tests.helpers.transformers_files import (
    FILE_CONFIG,
    FILE_FORMS,
    FILE_PARAMS,
    as_torch_tensors,
    tensors_of,
    write_bin_shards,
    write_config,
    write_h5,
)

pytestmark = [pytest.mark.torch, pytest.mark.tensorflow, pytest.mark.oracle]

MODELS = {
    **dict.fromkeys(("encoder", "base", "masked_lm", "multiple_choice"), FILE_CONFIG),
    "sequence_classification": FILE_CONFIG.replace(num_labels=3),
    "token_classification": FILE_CONFIG.replace(num_labels=4),
    "question_answering": FILE_CONFIG.replace(layer_norm_eps=1e-12, hidden_act="silu"),
    "causal_lm": ODD.replace(is_decoder=True),
}


@pytest.mark.parametrize("form", FILE_FORMS)
def test_every_file_form_reads_to_the_same_params(form, tmp_path):
    write_config(tmp_path)
    FILE_FORMS[form](tmp_path, tensors_of())
    found = open_checkpoint(tmp_path)
    assert found.problems == () and found.model == "masked_lm" and found.stored_dtype == "float32"
    assert_same_params(found.to_params(), FILE_PARAMS)
    assert ("which nothing uses" in " ".join(found.dropped)) == (form == "princeton-nlp")
    assert "torch_dtype" not in found.config.extra
    assert_same_params(open_checkpoint(found.path).to_params(), FILE_PARAMS)
    encoder = open_checkpoint(tmp_path, "none")
    assert encoder.model == "encoder" and encoder.to_params().keys() == {"embeddings", "encoder"}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_detected_and_matches_torch(model, tmp_path):
    """The program's float64 reference is transformers' torch class in float64."""
    config = MODELS[model]
    tree = random_params(config, model)
    write_config(tmp_path, config)
    torch.save(as_torch_tensors(tensors_of(tree, config, model)), tmp_path / "pytorch_model.bin")
    found = open_checkpoint(tmp_path)
    assert found.model == model and found.problems == ()
    (tmp_path / "out").mkdir()
    hf_checkpoint.save_pretrained(tmp_path / "out", found.to_params(), found.config, found.model)
    errors = verify_conversion(found, found.to_params(), tmp_path / "out", None, exact=True)
    assert errors.weights == 0 and errors.float64 < 1e-14 and errors.float32 < 2e-6

    cls = getattr(transformers, ARCHITECTURES[model])
    options = {"add_pooling_layer": False} if model == "encoder" else {}
    theirs = cls.from_pretrained(tmp_path / "out", **options).double().eval()
    batch = ragged_batch(config)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shape = (5, 1, 16) if model == "multiple_choice" else (5, 16)
    with torch.no_grad():
        output = theirs(
            torch.from_numpy(ids).reshape(shape),
            attention_mask=torch.from_numpy(mask).reshape(shape),
        )
    if model == "question_answering":
        expected = torch.stack([output.start_logits, output.end_logits], -1)
    elif model == "base":
        expected = output.pooler_output
    else:
        expected = output[0]
    whole = mask.astype(bool) if expected.shape[:2] == mask.shape else mask[:, 0].astype(bool)
    np.testing.assert_allclose(
        Float64Reference(found.original)(model, ids)[whole], expected.numpy()[whole], atol=1e-10
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_stored_or_requested(dtype, tmp_path):
    kind = np.dtype(dtype) if dtype == "float16" else np.dtype(ml_dtypes.bfloat16)
    narrow = {name: value.astype(kind) for name, value in tensors_of().items()}
    write_config(tmp_path)
    safetensors.numpy.save_file(narrow, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    assert found.stored_dtype == dtype
    (tmp_path / "out").mkdir()
    hf_checkpoint.save_pretrained(tmp_path / "out", found.to_params(), FILE_CONFIG, dtype=dtype)
    again = open_checkpoint(tmp_path / "out")
    assert set(again.dtype_counts) == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert (
        verify_conversion(found, found.to_params(), tmp_path / "out", None, exact=True).weights == 0
    )
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert str(theirs.dtype) == f"torch.{dtype}"


def test_values_too_large_for_half_precision_raise():
    with pytest.raises(InputError, match="bias has numbers too large for float16"):
        hf_checkpoint.as_dtype("bias", np.full(3, 1e6, np.float32), "float16")


def post_ln(tensors):
    return {
        name.replace("attention.LayerNorm", "attention.output.LayerNorm").replace(
            "intermediate.LayerNorm", "output.LayerNorm"
        ): value
        for name, value in tensors.items()
        if not name.startswith("roberta_prelayernorm.LayerNorm")
    }


def without(part):
    return lambda tensors: {name: v for name, v in tensors.items() if part not in name}


def with_tensor(name, value):
    return lambda tensors: {**tensors, name: value}


REFUSED = {
    "plain RoBERTa": (post_ln, {"model_type": "roberta"}, "post-LN"),
    "no embedding norm": (without("embeddings.LayerNorm"), {}, "no embedding LayerNorm"),
    "no final norm": (without("prelayernorm.LayerNorm"), {}, "no final LayerNorm"),
    "another model": (dict, {"model_type": "bert"}, "model_type='bert'"),
    "relative positions": (dict, {"position_embedding_type": "relative_key"}, "absolute"),
    "another activation": (dict, {"hidden_act": "mish"}, "hidden_act='mish'"),
    "another size": (dict, {"intermediate_size": 65}, "intermediate_size=65"),
    "a giant": (dict, {"hidden_size": 10**12, "vocab_size": 10**12}, "hidden_size=1000000000000"),
    "endless layers": (dict, {"num_hidden_layers": 10**15}, "num_hidden_layers"),
    "endless labels": (dict, {"num_labels": 10**12, "id2label": None}, "num_labels"),
    "words for numbers": (dict, {"hidden_size": "768", "pad_token_id": []}, "hidden_size='768'"),
    "a tensor too many": (
        with_tensor("roberta_prelayernorm.adapter.weight", np.ones((2, 2), np.float32)),
        {},
        "unexpected roberta_prelayernorm.adapter.weight",
    ),
    "a tensor too few": (without("layer.1.output.dense.bias"), {}, "missing"),
    "not a number": (
        with_tensor("lm_head.bias", np.full(90, np.inf, np.float32)),
        {},
        "NaN or infinity in lm_head.bias",
    ),
    "untied, but said tied": (
        with_tensor("lm_head.decoder.weight", np.ones((90, 32), np.float32)),
        {},
        "not tied",
    ),
}


def one_line(path):
    with pytest.raises(InputError) as error:
        open_checkpoint(path).to_params()
    line = str(error.value)
    assert "\n" not in line and str(path) in line, line
    return line


@pytest.mark.parametrize("case", REFUSED)
def test_other_architectures_raise_with_reason(case, tmp_path):
    change, settings, said = REFUSED[case]
    write_config(tmp_path, **settings)
    torch.save(as_torch_tensors(change(tensors_of())), tmp_path / "pytorch_model.bin")
    begin = time.monotonic()
    assert said in one_line(tmp_path)
    assert time.monotonic() - begin < 5


def test_missing_or_invalid_files_raise(tmp_path):
    torch.save(as_torch_tensors(tensors_of()), tmp_path / "pytorch_model.bin")
    assert "config.json: no such file" in one_line(tmp_path)
    for content in ("{", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        assert "config.json" in one_line(tmp_path)
    write_config(tmp_path)
    with pytest.raises(InputError, match="--head=mnli, expected one of those it has: masked_lm"):
        open_checkpoint(tmp_path, "mnli")
    torch.save({"optimizer": {"lr": 1}}, tmp_path / "pytorch_model.bin")
    assert "neither a fairseq checkpoint" in one_line(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    write_bin_shards(tmp_path, tensors_of())
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    assert "pytorch_model-00002-of-00003.bin: no such file" in one_line(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": 3}')
    assert "not an index of shards" in one_line(tmp_path)


def test_h5_with_external_links_raises(tmp_path):
    write_config(tmp_path)
    path = tmp_path / "tf_model.h5"
    (tmp_path / "secret").write_bytes(os.urandom(4 * 90 * 32))

    def altered(alter):
        write_h5(path, tensors_of())
        with h5py.File(path, "r+") as file:
            alter(file)
        return one_line(tmp_path)

    place = "a/b/roberta_prelayernorm/embeddings/word_embeddings/weight:0"
    shape = (90, 32)
    layout = h5py.VirtualLayout(shape, "f4")
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "x", shape)
    outside = [(str(tmp_path / "secret"), 0, 4 * 90 * 32)]
    assert "refused" in altered(
        lambda file: file.create_dataset(place, shape, "f4", external=outside)
    )
    assert "refused" in altered(lambda file: file.create_virtual_dataset(place, layout))
    assert "refused" in altered(
        lambda file: file.create_dataset(place, data=np.zeros(shape), compression="gzip")
    )
    assert "refused" in altered(lambda file: file.create_dataset(place, data="text"))
    assert "claims more" in altered(lambda file: file.create_dataset(place, (10**6, 10**6), "f4"))
    assert "two different values" in altered(
        lambda file: file.create_dataset(place, data=np.ones(shape, np.float32))
    )
    write_h5(path, without("word_embeddings")(tensors_of()))
    with h5py.File(path, "r+") as file:
        file[place] = h5py.ExternalLink(tmp_path / "other.h5", "x")
    assert "word_embeddings" in one_line(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "msgpack", "h5", "bin"])
def test_corrupted_files_are_read_or_raise_one_line(form, tmp_path):
    """Cut anywhere, with any bits flipped: a tree or one line, soon."""
    write_config(tmp_path)
    FILE_FORMS[form](tmp_path, tensors_of())
    [path] = (p for p in tmp_path.iterdir() if p.name != "config.json")
    content, rng = path.read_bytes(), random.Random(form)
    begin = time.monotonic()
    for i in range(120):
        damaged = bytearray(content)
        if i % 3 == 0:
            damaged = damaged[: rng.randrange(len(content))]
        # Where names and sizes are, for the most part.
        reach = rng.choice((200, 3000, len(damaged)))
        for _ in range(rng.choice((1, 2, 20)) if damaged else 0):
            damaged[rng.randrange(min(reach, len(damaged)))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            open_checkpoint(tmp_path).to_params()
        except InputError as error:
            assert "\n" not in str(error)
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_tf_files_of_transformers4_are_read(tmp_path):
    """Its own h5 for several classes, and its own outputs."""
    cases = {m: MODELS[m] for m in ("masked_lm", "sequence_classification", "token_classification")}
    ids = np.random.default_rng(0).integers(4, 90, (3, 12))
    for model, config in cases.items():
        hf_checkpoint.save_pretrained(tmp_path / model, random_params(config, model), config, model)
        (tmp_path / model / "architecture.txt").write_text(ARCHITECTURES[model])
        np.savez(tmp_path / model / "batch.npz", input_ids=ids)
    run_oracle("transformers4_h5.py", tmp_path)
    for model, config in cases.items():
        found = open_checkpoint(tmp_path / model / "tf")
        assert found.model == model and "h5" in found.format
        assert_same_params(found.to_params(), random_params(config, model))
        expected = np.load(tmp_path / model / "tf.npy")
        assert_close(Float64Reference(found.original)(model, ids), expected, model, 4e-6, 4e-5)

"""Every form of transformers' files, and the converting program as people run it."""

import json
import os
import random
import time

import flax.serialization
import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from bridges.formats.detect import open_checkpoint
from bridges.formats.fairseq import writing
from bridges.verify.conversion import compare
from prelnroberta import params as parameters
from prelnroberta.data.tokenizer import train_tokenizer
from prelnroberta.errors import InputError
from prelnroberta.pretrained import hf_checkpoint
from tests.helpers.foreign_checkpoints import V, checkpoint, fairseq_state
from tests.helpers.oracles import run_oracle
from tests.helpers.programs import call, refused
from tests.helpers.small_models import ODD, TINY, ragged_batch, random_params
from tests.helpers.tolerances import assert_close

SMALL = TINY.replace(vocab_size=90, max_position_embeddings=30)
TREE = random_params(SMALL)
MODELS = {
    **dict.fromkeys(("encoder", "base", "masked_lm", "multiple_choice"), SMALL),
    "sequence_classification": SMALL.replace(num_labels=3),
    "token_classification": SMALL.replace(num_labels=4),
    "question_answering": SMALL.replace(layer_norm_eps=1e-12, hidden_act="silu"),
    "causal_lm": ODD.replace(is_decoder=True),
}


def tensors_of(tree=TREE, config=SMALL, model="masked_lm"):
    return hf_checkpoint.to_tensors(tree, config, model)


def as_torch(tensors):
    return {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}


def write_config(folder, config=SMALL, **changes):
    values = {**config.to_dict(), "torch_dtype": "float16", **changes}
    (folder / "config.json").write_text(json.dumps(values))


def princeton(tensors):
    """As princeton-nlp uploaded them: roberta's name, a norm that nothing uses, a buffer."""
    found = {n.replace("roberta_prelayernorm.", "roberta."): v for n, v in tensors.items()}
    for n in range(SMALL.num_hidden_layers):
        for leaf in ("weight", "bias"):
            found[f"roberta.encoder.layer.{n}.attention.self.LayerNorm.{leaf}"] = np.ones(32)
    return found | {"roberta.embeddings.position_ids": np.arange(30)[None]}


def flax_tree(tensors):
    flat = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and value.ndim == 1:
            leaf = "scale"
        elif leaf == "weight" and "embeddings" in module:
            leaf = "embedding"
        elif leaf == "weight":
            leaf, value = "kernel", value.T
        flat[f"{module.replace('.', '/')}/{leaf}"] = np.ascontiguousarray(value)
    return parameters.unflatten(flat)


def write_h5(path, tensors):
    """Names as TF's classes in transformers 4.57 give them: see the slow test for the real ones."""
    with h5py.File(path, "w") as file:
        for name, value in tensors.items():
            module, _, leaf = name.rpartition(".")
            group = "lm_head" if module.startswith("lm_head") else "roberta_prelayernorm"
            if leaf == "weight" and "embeddings.LayerNorm" not in module and "embed" in module:
                leaf = "weight" if "word" in module else "embeddings"
            elif value.ndim == 1 and "orm" in module:
                leaf = {"weight": "gamma", "bias": "beta"}[leaf]
            elif leaf == "weight":
                leaf, value = "kernel", value.T
            module = module.replace("encoder.layer.", "encoder.layer_._").replace(".", "/")
            base = f"tf_roberta_pre_layer_norm_for_masked_lm_1/{module}"
            file[f"{group}/{base}/{leaf}:0"] = value
            if "embeddings" in module:
                file[f"lm_head/{base}/{leaf}:0"] = value


def write_bin_shards(folder, tensors):
    names = sorted(tensors)
    places = {name: f"pytorch_model-{1 + i % 3:05}-of-00003.bin" for i, name in enumerate(names)}
    for place in set(places.values()):
        shard = {name: tensors[name] for name in names if places[name] == place}
        torch.save(as_torch(shard), folder / place)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


FORMS = {
    "bin": lambda f, t: torch.save(as_torch(t), f / "pytorch_model.bin"),
    "bin, torch's old container": lambda f, t: torch.save(
        as_torch(t), f / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "bin, tied copies": lambda f, t: torch.save(
        as_torch(t)
        | {
            "lm_head.decoder.weight": torch.from_numpy(TREE["embeddings"]["word"]),
            "lm_head.decoder.bias": torch.from_numpy(TREE["lm_head"]["bias"]),
        },
        f / "pytorch_model.bin",
    ),
    "bin in shards": write_bin_shards,
    "princeton-nlp": lambda f, t: (
        write_config(f, model_type="roberta", architectures=["RobertaForMaskedLM"]),
        torch.save(as_torch(princeton(t)), f / "pytorch_model.bin"),
    ),
    "safetensors": lambda f, t: safetensors.numpy.save_file(t, f / "model.safetensors"),
    "safetensors in shards": lambda f, t: hf_checkpoint.save_pretrained(
        f, TREE, SMALL, max_shard_bytes=5000
    ),
    "msgpack": lambda f, t: (f / "flax_model.msgpack").write_bytes(
        flax.serialization.msgpack_serialize(flax_tree(t))
    ),
    "h5": lambda f, t: write_h5(f / "tf_model.h5", t),
}


def assert_same(found, expected):
    found, expected = parameters.flatten(found), parameters.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_tree(form, tmp_path):
    write_config(tmp_path)
    FORMS[form](tmp_path, tensors_of())
    found = open_checkpoint(tmp_path)
    assert found.problems == () and found.model == "masked_lm" and found.stored_dtype == "float32"
    assert_same(found.tree(), TREE)
    assert ("which nothing uses" in " ".join(found.dropped)) == (form == "princeton-nlp")
    assert "torch_dtype" not in found.config.extra
    assert_same(open_checkpoint(found.source).tree(), TREE)
    encoder = open_checkpoint(tmp_path, "none")
    assert encoder.model == "encoder" and encoder.tree().keys() == {"embeddings", "encoder"}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_recognised_and_run(model, tmp_path):
    """The program's float64 reference is transformers' torch class in float64."""
    config = MODELS[model]
    tree = random_params(config, model)
    write_config(tmp_path, config)
    torch.save(as_torch(tensors_of(tree, config, model)), tmp_path / "pytorch_model.bin")
    found = open_checkpoint(tmp_path)
    assert found.model == model and found.problems == ()
    (tmp_path / "out").mkdir()
    hf_checkpoint.save_pretrained(tmp_path / "out", found.tree(), found.config, found.model)
    agreement = compare(found, found.tree(), tmp_path / "out", None, exact=True)
    assert agreement.weights == 0 and agreement.float64 < 1e-14 and agreement.float32 < 2e-6

    cls = getattr(transformers, hf_checkpoint.ARCHITECTURES[model])
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
        found.original(model, ids)[whole], expected.numpy()[whole], atol=1e-10
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_precision_is_stored_or_chosen(dtype, tmp_path):
    kind = np.dtype(dtype) if dtype == "float16" else np.dtype(ml_dtypes.bfloat16)
    narrow = {name: value.astype(kind) for name, value in tensors_of().items()}
    write_config(tmp_path)
    safetensors.numpy.save_file(narrow, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    assert found.stored_dtype == dtype
    (tmp_path / "out").mkdir()
    hf_checkpoint.save_pretrained(tmp_path / "out", found.tree(), SMALL, dtype=dtype)
    again = open_checkpoint(tmp_path / "out")
    assert set(again.dtypes) == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert compare(found, found.tree(), tmp_path / "out", None, exact=True).weights == 0
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert str(theirs.dtype) == f"torch.{dtype}"


def test_numbers_too_large_for_half_precision_are_named():
    with pytest.raises(InputError, match="bias has numbers too large for float16"):
        hf_checkpoint.as_dtype("bias", np.full(3, 1e6, np.float32), "float16")


# Refusals.


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
        open_checkpoint(path).tree()
    line = str(error.value)
    assert "\n" not in line and str(path) in line, line
    return line


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_this_model_is_refused_by_name(case, tmp_path):
    change, settings, said = REFUSED[case]
    write_config(tmp_path, **settings)
    torch.save(as_torch(change(tensors_of())), tmp_path / "pytorch_model.bin")
    begin = time.monotonic()
    assert said in one_line(tmp_path)
    assert time.monotonic() - begin < 5


def test_files_that_are_missing_or_not_what_they_seem(tmp_path):
    torch.save(as_torch(tensors_of()), tmp_path / "pytorch_model.bin")
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


def test_h5_that_reaches_outside_is_refused(tmp_path):
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
def test_fuzz(form, tmp_path):
    """Cut anywhere, with any bits flipped: a tree or one line, soon."""
    write_config(tmp_path)
    FORMS[form](tmp_path, tensors_of())
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
            open_checkpoint(tmp_path).tree()
        except InputError as error:
            assert "\n" not in str(error)
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_tf_files_of_transformers_4(tmp_path):
    """Its own h5 for several classes, and its own outputs."""
    cases = {m: MODELS[m] for m in ("masked_lm", "sequence_classification", "token_classification")}
    ids = np.random.default_rng(0).integers(4, 90, (3, 12))
    for model, config in cases.items():
        hf_checkpoint.save_pretrained(tmp_path / model, random_params(config, model), config, model)
        (tmp_path / model / "architecture.txt").write_text(hf_checkpoint.ARCHITECTURES[model])
        np.savez(tmp_path / model / "batch.npz", input_ids=ids)
    run_oracle("transformers4_h5.py", tmp_path)
    for model, config in cases.items():
        found = open_checkpoint(tmp_path / model / "tf")
        assert found.model == model and "h5" in found.form
        assert_same(found.tree(), random_params(config, model))
        expected = np.load(tmp_path / model / "tf.npy")
        assert_close(found.original(model, ids), expected, model, 4e-6, 4e-5)


# The program.


def convert(*arguments, **flags):
    done = call("convert", *(f"--{name}={value}" for name, value in flags.items()), *arguments)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def line(**flags):
    return refused(*(f"--{name}={value}" for name, value in flags.items()), program="convert")


def errors_in(said):
    """The two printed errors: in float64, and of the Flax model."""
    [first] = [x for x in said.splitlines() if x.startswith("input and output")]
    [second] = [x for x in said.splitlines() if x.startswith("this package's model")]
    return float(first.split("relative error ")[1].split()[0]), float(second.split()[-1])


def test_fairseq_to_a_folder_and_back(tmp_path):
    """The whole way, with a tokenizer; the second folder is the first, byte for byte."""
    source = tmp_path / "source"
    source.mkdir()
    tokenizer = train_tokenizer(["the cat sat on the mat, and that was that"] * 20, 300)
    config = SMALL.replace(vocab_size=tokenizer.get_vocab_size())
    tree = random_params(config)
    tree["embeddings"]["token_type"] *= 0
    writing.save(source, tree, config, "masked_lm", tokenizer, "float16")

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
    assert "exists: name a new or empty folder" in line(input=source, output=again)


def test_precision_as_asked(tmp_path):
    torch.save(checkpoint(fairseq_state({"rte": 2})), tmp_path / "checkpoint_best.pt")
    output = tmp_path / "out"
    said = convert(input=tmp_path, output=output, head="rte", dtype="bfloat16")
    assert set(open_checkpoint(output).dtypes) == {"bfloat16"}
    assert "as sequence_classification" in said and "dropped: other heads" in said
    assert 1e-4 < errors_in(said)[0] < 2e-2
    assert json.loads((output / "config.json").read_text())["architectures"] == [
        "RobertaPreLayerNormForSequenceClassification"
    ]
    back = tmp_path / "back"
    said = convert(input=output, output=back, to="fairseq")
    assert errors_in(said)[0] < 1e-12 and f"the head is called {writing.HEAD}" in said
    assert_same(open_checkpoint(back, writing.HEAD).tree(), open_checkpoint(output).tree())


def test_describe_writes_nothing(tmp_path):
    state = {n: v for n, v in fairseq_state().items() if "layernorm_embedding" not in n}
    torch.save(checkpoint(state, layernorm_embedding=False), tmp_path / "a.pt")
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


def test_one_line_and_nothing_left(tmp_path):
    path, output = tmp_path / "a.pt", tmp_path / "out"
    torch.save(checkpoint(fairseq_state(), activation_fn="relu"), path)
    assert "LM head" in line(input=path, output=output)
    whole = checkpoint(fairseq_state())
    torch.save({**whole, "criterion": os.system}, path)
    assert "refused, nothing was run" in line(input=path, output=output)
    torch.save(whole, path)
    path.write_bytes(path.read_bytes()[:-500])
    assert f"{path}: damaged" in line(input=path, output=output)
    assert "--output is missing" in line(input=path)
    assert "no such file or folder" in line(input=tmp_path / "nothing", output=output)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_verification_sees_a_swapped_norm(tmp_path):
    """A wrong pairing survives every round trip; it does not survive being run."""
    write_config(tmp_path)
    FORMS["bin"](tmp_path, tensors_of())
    found = open_checkpoint(tmp_path)
    wrong = found.tree()
    layers = wrong["encoder"]["layers"]
    layers["mlp_norm"], layers["attention_norm"] = layers["attention_norm"], layers["mlp_norm"]
    hf_checkpoint.save_pretrained(tmp_path / "out", wrong, SMALL)
    with pytest.raises(InputError, match="the result is another function"):
        compare(found, found.tree(), tmp_path / "out", None, exact=True)

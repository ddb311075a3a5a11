"""Checkpoints of fairseq and DinkyTrain: forms that are read, errors, exact round trips."""

import argparse

import numpy as np
import pytest
import torch

from bridges.formats.detect import find_tokenizer, open_checkpoint
from bridges.formats.fairseq import writer
from bridges.verify.conversion_check import verify_conversion
from bridges.verify.float64_reference import Float64Reference
from prelnroberta import FlaxRobertaPreLayerNormForMaskedLM as FlaxMaskedLM
from prelnroberta import FlaxRobertaPreLayerNormForSequenceClassification as FlaxClassifier
from prelnroberta import FlaxRobertaPreLayerNormModel, InputError
from prelnroberta import params as parameters
from prelnroberta.data.tokenizer import load_tokenizer, train_tokenizer
from tests.helpers.foreign_checkpoints import (
    D,
    S,
    V,
    fairseq_checkpoint,
    fairseq_state,
    in_deepspeed_names,
    in_old_names,
    ragged_ids,
    run_fairseq,
    save_shards,
    with_copies,
)
from tests.helpers.small_models import random_params
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.torch

IDS = ragged_ids()
REAL = IDS != 1
STATE = fairseq_state({"mnli": 3, "stsb": 1})


def saved(path, whole, **options):
    torch.save(whole, path, **options)
    return path


def plain(state):
    return fairseq_checkpoint(state)


FORMS = {
    "current, cfg": lambda p: saved(p, plain(STATE)),
    "current, args": lambda p: saved(p, fairseq_checkpoint(STATE, "args")),
    "fairseq 0.12's copies": lambda p: saved(p, plain(with_copies(STATE))),
    "old names": lambda p: saved(p, fairseq_checkpoint(in_old_names(STATE), "args")),
    "torch's old container": lambda p: saved(
        p, fairseq_checkpoint(STATE, "args"), _use_new_zipfile_serialization=False
    ),
    "DeepSpeed's layers": lambda p: saved(
        p, fairseq_checkpoint(in_deepspeed_names(STATE), arch="deepspeed_roberta_large")
    ),
    "shards": lambda p: save_shards(p, plain(STATE), 3)[1],
    "a setting left out": lambda p: saved(p, _without(plain(STATE), "activation_fn")),
}


def _without(whole, name):
    delattr(whole["cfg"]["model"], name)
    return whole


def flax_output(cls, found, **options):
    model = cls(found.config, _do_init=False, **options)
    model.params = found.to_params()
    return model(IDS, attention_mask=REAL.astype(int))


@pytest.mark.parametrize("form", FORMS)
def test_every_checkpoint_form_matches_fairseq_outputs(form, tmp_path):
    """Logits of our Flax model, and of the program's own reference, against fairseq's encoder."""
    path = FORMS[form](tmp_path / "checkpoint_best.pt")
    found = open_checkpoint(path)
    assert found.problems == () and found.model == "masked_lm"
    assert found.heads == ("masked_lm", "mnli", "stsb")
    expected = run_fairseq(STATE, IDS)[REAL]
    np.testing.assert_allclose(
        Float64Reference(found.original)("masked_lm", IDS)[REAL], expected, atol=1e-12
    )
    assert_close(flax_output(FlaxMaskedLM, found).logits[REAL], expected, form)
    assert open_checkpoint(tmp_path).path.parent == tmp_path


def test_config_matches_checkpoint_settings(tmp_path):
    config = open_checkpoint(saved(tmp_path / "a.pt", plain(STATE))).config
    assert (config.layer_norm_eps, config.type_vocab_size) == (1e-5, 1)
    assert (config.max_position_embeddings, config.max_length) == (22, 20)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.2)
    assert (config.hidden_act, config.tie_word_embeddings) == ("gelu", True)


def test_half_precision_dtype_is_kept(tmp_path):
    half = {name: value.half() for name, value in STATE.items()}
    found = open_checkpoint(saved(tmp_path / "half.pt", plain(half)))
    assert found.stored_dtype == "float16" and set(found.dtype_counts) == {"float16"}
    expected = run_fairseq(half, IDS)[REAL]
    assert_close(flax_output(FlaxMaskedLM, found).logits[REAL], expected, "half")
    mixed = {**half, S + "layer_norm.weight": STATE[S + "layer_norm.weight"]}
    assert open_checkpoint(saved(tmp_path / "m.pt", plain(mixed))).stored_dtype == "float32"
    brain = {name: value.bfloat16() for name, value in STATE.items()}
    assert open_checkpoint(saved(tmp_path / "b.pt", plain(brain))).stored_dtype == "bfloat16"


def test_untied_output_projection(tmp_path):
    state = fairseq_state(untied=True)
    whole = fairseq_checkpoint(state, untie_weights_roberta=True)
    found = open_checkpoint(saved(tmp_path / "untied.pt", whole))
    assert not found.config.tie_word_embeddings
    expected = run_fairseq(state, IDS)[REAL]
    assert_close(flax_output(FlaxMaskedLM, found).logits[REAL], expected, "untied")


@pytest.mark.parametrize("head", ["mnli", "stsb"])
def test_classification_heads_are_selected_by_name(head, tmp_path):
    found = open_checkpoint(saved(tmp_path / "a.pt", plain(STATE)), head)
    assert found.model == "sequence_classification"
    assert found.config.num_labels == {"mnli": 3, "stsb": 1}[head]
    assert found.config.classifier_dropout == 0.0
    expected = run_fairseq(STATE, IDS, head)
    first_is_real = REAL[:, 0]
    logits = np.asarray(flax_output(FlaxClassifier, found).logits)
    assert_close(logits[first_is_real], expected[first_is_real], head)
    others = " ".join(found.dropped)
    assert "encoder.lm_head" in others and f"classification_heads.{head}" not in others


def test_checkpoint_read_as_bare_encoder(tmp_path):
    whole = fairseq_checkpoint(STATE, activation_fn="relu")
    found = open_checkpoint(saved(tmp_path / "a.pt", whole), "none")
    assert found.model == "encoder" and found.problems == () and found.config.hidden_act == "relu"
    found = open_checkpoint(saved(tmp_path / "b.pt", plain(STATE)), "none")
    output = flax_output(FlaxRobertaPreLayerNormModel, found, add_pooling_layer=False)
    expected = run_fairseq(STATE, IDS, None)
    assert_close(output.last_hidden_state[REAL], expected[REAL], "features")


def test_single_classification_head_is_selected_by_default(tmp_path):
    state = {n: v for n, v in fairseq_state({"rte": 2}).items() if "lm_head" not in n}
    assert open_checkpoint(saved(tmp_path / "a.pt", plain(state))).model == (
        "sequence_classification"
    )
    with pytest.raises(InputError, match=r"--head=mnli.*rte, none"):
        open_checkpoint(tmp_path / "a.pt", "mnli")


# What decides equality: (tensors that go or come, settings, --head, what the refusal says).
REFUSED = {
    "post-LN": ([S + "layer_norm."], {"encoder_normalize_before": False}, None, "post-LN"),
    "final norm lost": ([S + "layer_norm."], {}, None, "no final LayerNorm"),
    "post-LN with a final norm": ([], {"encoder_normalize_before": False}, None, "contradictory"),
    "roberta_prenorm": (
        [S + "layernorm_embedding."],
        {"arch": "roberta_prenorm", "layernorm_embedding": False},
        None,
        "no embedding LayerNorm",
    ),
    "embedding norm unused": ([], {"layernorm_embedding": False}, None, "contradictory"),
    "no version": ([S + "version"], {}, None, "no version flag"),
    "version 1": ({S + "version": torch.tensor([1.0])}, {}, None, "version flag"),
    "relu": ([], {"activation_fn": "relu"}, None, "LM head"),
    "tanh gelu": ([], {"activation_fn": "gelu_accurate"}, None, "LM head"),
    "unknown activation": ([], {"activation_fn": "softplus"}, "none", "transformers lacks"),
    "pooler activation": ([], {"pooler_activation_fn": "relu"}, "mnli", "expected 'tanh'"),
    "pooler width": (
        {
            "classification_heads.mnli.dense.weight": torch.ones(20, D),
            "classification_heads.mnli.dense.bias": torch.ones(20),
            "classification_heads.mnli.out_proj.weight": torch.ones(3, 20),
        },
        {},
        "mnli",
        "20 wide",
    ),
    "spectral norm": (
        ["classification_heads.mnli.out_proj.weight"],
        {},
        "mnli",
        "mnli.out_proj.weight (spectral",
    ),
    "sinusoids": ([], {"encoder_learned_pos": False}, None, "sinusoidal"),
    "scaled embeddings": ([], {"no_scale_embedding": False}, None, "hidden size"),
    "pruned layers": ([], {"encoder_layers_to_keep": "0"}, None, "pruned"),
    "quantization noise": ([], {"quant_noise_pq": 0.1}, None, "projection"),
    "model parallel": ([], {"model_parallel_size": 2}, None, "join the parts"),
    "another model": ([], {"arch": "transformer_lm"}, None, "'transformer_lm'"),
    "other output": ({"encoder.lm_head.weight": torch.ones(V, D)}, {}, None, "contradictory"),
    "unknown tensors": ({S + "quant_noise.weight": torch.ones(D, D)}, {}, None, "quant_noise"),
    "lacking tensors": ([S + "layers.1.fc2.bias"], {}, None, "layer.1.output.dense.bias"),
    "not a number": ({S + "layer_norm.bias": torch.full((D,), torch.nan)}, {}, None, "NaN"),
    "integers": (
        {S + "layers.0.fc1.weight": torch.ones(40, D, dtype=torch.int8)},
        {},
        None,
        "quantized",
    ),
    "odd shapes": (
        {f"{S}layers.1.self_attn.in_proj_weight": torch.ones(7), S + "version": torch.ones(0)},
        {},
        None,
        "in_proj_weight",
    ),
    "a head without a matrix": (
        {"classification_heads.mnli.out_proj.weight": torch.ones(3)},
        {},
        "mnli",
        "no matrix classification_heads.mnli.out_proj.weight",
    ),
    "heads that do not divide": ([], {"encoder_attention_heads": 5}, None, "num_attention_heads"),
    "no layers": ([S + "layers."], {}, None, "layers.0.fc1.weight"),
    "a list for a setting": ([], {"activation_fn": ["gelu"]}, None, "activation_fn is a list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_incompatible_settings_raise_with_their_name(case, tmp_path):
    change, changed_settings, head, said = REFUSED[case]
    gone = change if isinstance(change, list) else []
    state = {k: v for k, v in STATE.items() if not any(k.startswith(g) for g in gone)}
    state |= change if isinstance(change, dict) else {}
    path = saved(tmp_path / "a.pt", fairseq_checkpoint(state, **changed_settings))
    with pytest.raises(InputError) as error:
        open_checkpoint(path, head).to_params()
    line = str(error.value)
    assert said in line and str(path) in line and "\n" not in line, line


def test_all_problems_are_listed_in_one_error(tmp_path):
    gone = ("layernorm_embedding", "version")
    state = {k: v for k, v in STATE.items() if not any(g in k for g in gone)}
    whole = fairseq_checkpoint(state, layernorm_embedding=False, activation_fn="relu")
    problems = open_checkpoint(saved(tmp_path / "a.pt", whole)).problems
    assert len(problems) == 3, problems


def test_incomplete_checkpoint_files_raise(tmp_path):
    path = tmp_path / "a.pt"
    for whole, said in (
        ({"model": STATE}, "neither args nor cfg.model"),
        ({"model": {"a": 3}, "args": argparse.Namespace()}, "expected a state dict"),
        ({"weights": STATE}, "neither a fairseq checkpoint"),
        ([1, 2], "neither a fairseq checkpoint"),
    ):
        with pytest.raises(InputError, match=said):
            open_checkpoint(saved(path, whole))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no checkpoint there"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(InputError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nowhere.pt")
    saved(tmp_path / "b.pt", plain(STATE))
    with pytest.raises(InputError, match=r"several checkpoints, name one: a\.pt, b\.pt"):
        open_checkpoint(tmp_path)


def test_missing_shards_raise(tmp_path):
    files = save_shards(tmp_path / "checkpoint_last.pt", plain(STATE), 4)
    whole = open_checkpoint(tmp_path / "checkpoint_last.pt").to_params()
    expected = open_checkpoint(saved(tmp_path / "a.pt", plain(STATE))).to_params()
    for path, leaf in parameters.flatten(whole).items():
        np.testing.assert_array_equal(leaf, parameters.flatten(expected)[path], err_msg=path)
    files[3].unlink()
    with pytest.raises(InputError, match="3 shards do not fit together"):
        open_checkpoint(tmp_path / "checkpoint_last.pt")
    files[1].unlink()
    with pytest.raises(InputError, match=r"shard1\.pt is not next to it"):
        open_checkpoint(files[2])


# Writing.


def written(tmp_path, found, tree=None, **options):
    tmp_path.mkdir()
    tree = found.to_params() if tree is None else tree
    writer.save_checkpoint(tmp_path, tree, found.config, found.model, **options)
    return torch.load(tmp_path / "model.pt", weights_only=False)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip_to_fairseq_is_exact(dtype, tmp_path):
    state = {k: v.to(getattr(torch, dtype)) for k, v in fairseq_state().items()}
    found = open_checkpoint(saved(tmp_path / "a.pt", plain(state)))
    assert found.stored_dtype == dtype
    back = written(tmp_path / "out", found, dtype=dtype)
    assert back["model"].keys() == state.keys()
    for name in state.keys() - {S + "version"}:
        assert back["model"][name].dtype == state[name].dtype, name
        assert torch.equal(back["model"][name], state[name]), name
    assert (
        verify_conversion(found, found.to_params(), tmp_path / "out", None, exact=True).weights == 0
    )
    with torch.serialization.safe_globals([argparse.Namespace]):
        torch.load(tmp_path / "out" / "model.pt", weights_only=True)


def test_classifier_is_written_with_named_head(tmp_path):
    found = open_checkpoint(saved(tmp_path / "a.pt", plain(STATE)), "mnli")
    state = written(tmp_path / "out", found)["model"]
    assert state.keys() - STATE.keys() == {
        f"classification_heads.{writer.HEAD_NAME}.{leaf}"
        for leaf in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    }
    again = open_checkpoint(tmp_path / "out", writer.HEAD_NAME)
    np.testing.assert_allclose(
        Float64Reference(again.original)("sequence_classification", IDS),
        Float64Reference(found.original)(found.model, IDS),
    )


def test_token_type_embedding_is_folded_into_positions(tmp_path):
    found = open_checkpoint(saved(tmp_path / "a.pt", plain(STATE)))
    config = found.config.replace(type_vocab_size=2)
    tree = random_params(config)
    (tmp_path / "out").mkdir()
    writer.save_checkpoint(tmp_path / "out", tree, config, "masked_lm")
    assert len(writer.conversion_notes(tree, config, "masked_lm")) == 2
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=False)["model"]
    ours = FlaxMaskedLM(config, _do_init=False)
    ours.params = tree
    logits = ours(IDS, attention_mask=REAL.astype(int)).logits
    assert_close(logits[REAL], run_fairseq(state, IDS)[REAL], "folded")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps=1e-12"),
        ({"hidden_act": "relu"}, "hidden_act='relu'; its LM head"),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'; it has"),
        ({"pad_token_id": 3}, "pad_token_id=3"),
        ({"is_decoder": True}, "is_decoder"),
    ],
)
def test_features_without_fairseq_equivalent_raise(changes, said, tmp_path):
    config = open_checkpoint(saved(tmp_path / "a.pt", plain(STATE))).config.replace(**changes)
    with pytest.raises(InputError, match=said):
        writer.save_checkpoint(tmp_path, random_params(config), config, "masked_lm")
    with pytest.raises(InputError, match="question_answering"):
        writer.save_checkpoint(tmp_path, {}, config, "question_answering")
    assert not (tmp_path / "model.pt").exists()


# Dictionaries.


def test_dictionary_of_other_model_raises(tmp_path):
    found = open_checkpoint(saved(tmp_path / "a.pt", plain(STATE)))
    dictionary = tmp_path / "dict.txt"
    dictionary.write_text("".join(f"{i} 1\n" for i in range(V - 5)))
    tokenizer, note = find_tokenizer(found)
    assert tokenizer is None and "encoder.json" in note
    dictionary.write_text("".join(f"{i} 1\n" for i in range(V - 5)) + "<mask> 1\n")
    find_tokenizer(found)
    dictionary.write_text("".join(f"{i} 1\n" for i in range(V - 4)))
    with pytest.raises(InputError, match=f"{V - 4} lines make {V + 1} tokens"):
        find_tokenizer(found)


@pytest.mark.parametrize("rows", [0, 3])
def test_tokenizer_round_trip(rows, tmp_path):
    """Also where the model has more rows than the tokenizer has tokens."""
    tokenizer = train_tokenizer(["the cat sat on the mat, and that was that"] * 20, 300)
    found = open_checkpoint(saved(tmp_path / "a.pt", plain(STATE)))
    config = found.config.replace(vocab_size=tokenizer.get_vocab_size() + rows)
    (tmp_path / "out").mkdir()
    writer.save_checkpoint(tmp_path / "out", random_params(config), config, "masked_lm", tokenizer)
    back, _ = find_tokenizer(open_checkpoint(tmp_path / "out"))
    if rows == 0:
        assert back.get_vocab() == tokenizer.get_vocab() and load_tokenizer(tmp_path / "out")
    text = "the cat <mask> on café"
    lines = (tmp_path / "out" / "dict.txt").read_text().splitlines()
    assert len(lines) == config.vocab_size - 5 + (rows > 0)
    if back is not None:
        assert back.encode(text).ids == tokenizer.encode(text).ids

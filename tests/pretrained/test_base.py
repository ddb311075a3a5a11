"""The Flax* classes: files, heads swapped, vocabularies resized, the cache, bad input, outputs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from prelnroberta import (
    FlaxRobertaPreLayerNormForCausalLM,
    FlaxRobertaPreLayerNormForMaskedLM,
    FlaxRobertaPreLayerNormForSequenceClassification,
    FlaxRobertaPreLayerNormModel,
    InputError,
)
from prelnroberta import params as parameters
from prelnroberta.pretrained.hf_checkpoint import (
    load_pretrained,
    read_weights,
    save_pretrained,
)
from prelnroberta.training.optimizer import freeze_labels
from tests.helpers.small_models import (
    DECODER,
    IDS,
    PLAIN_DECODER,
    SMALL,
    flax_class,
    flax_model,
    random_params,
    small_flax_model,
)
from tests.helpers.tolerances import assert_same_params

# Files.


def test_saving_one_file_replaces_shards(tmp_path):
    small_flax_model("base").save_pretrained(tmp_path, max_shard_bytes=4000)
    assert len(list(tmp_path.glob("model-*"))) > 2
    whole = small_flax_model("base", seed=1)
    whole.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_params(FlaxRobertaPreLayerNormModel.from_pretrained(tmp_path).params, whole.params)


def test_loading_into_other_head_reports_keys(tmp_path, caplog):
    base = small_flax_model("base")
    base.save_pretrained(tmp_path / "base")
    headed = FlaxRobertaPreLayerNormForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3
    )
    assert headed.loading_info.missing_keys == (
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    )
    assert all("pooler.dense" in name for name in headed.loading_info.unexpected_keys)
    assert "newly initialized: classifier.dense.weight" in caplog.text
    for part in ("embeddings", "encoder"):
        assert_same_params(headed.params[part], base.params[part])
    assert np.asarray(headed.params["classifier"]["output"]["kernel"]).std() > 0

    headed.save_pretrained(tmp_path / "headed")
    back = FlaxRobertaPreLayerNormModel.from_pretrained(tmp_path / "headed")
    assert len(back.loading_info.unexpected_keys) == 4 and len(back.loading_info.missing_keys) == 2
    assert_same_params(back.params["encoder"], base.params["encoder"])


def test_mismatched_sizes_raise_unless_ignored(tmp_path):
    ours = small_flax_model("sequence_classification", SMALL.replace(num_labels=3))
    ours.save_pretrained(tmp_path)
    cls = FlaxRobertaPreLayerNormForSequenceClassification
    with pytest.raises(InputError, match=r"classifier.out_proj.weight is float32\[3, 16\]"):
        cls.from_pretrained(tmp_path, num_labels=4)
    again = cls.from_pretrained(tmp_path, num_labels=4, ignore_mismatched_sizes=True)
    assert again.loading_info.mismatched_keys == (
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    )
    assert_same_params(again.params["encoder"], ours.params["encoder"])
    assert again([[0, 5]]).logits.shape == (1, 4)


def test_one_error_lists_all_differences(tmp_path):
    small_flax_model("masked_lm").save_pretrained(tmp_path)
    tensors, _ = read_weights(tmp_path)
    del tensors["lm_head.dense.bias"]
    tensors["roberta_prelayernorm.encoder.layer.7.output.dense.bias"] = np.zeros(16, np.float32)
    tensors["lm_head.layer_norm.weight"] = np.zeros(3, np.float32)
    tensors["roberta_prelayernorm.LayerNorm.bias"][2] = np.nan
    tensors["lm_head.decoder.weight"] = np.ones((60, 16), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        FlaxRobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path)
    for part in (
        "model.safetensors: ",
        "missing lm_head.dense.bias",
        "unexpected roberta_prelayernorm.encoder.layer.7.output.dense.bias",
        "lm_head.layer_norm.weight is float32[3], expected float32[16]",
        "NaN or infinity in roberta_prelayernorm.LayerNorm.bias",
        "the output is not tied",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack"])
def test_corrupt_files_raise_one_line(name, tmp_path):
    small_flax_model("base").save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    for content in (b"", whole[:-100], whole[:5], b"\xff" * 4000):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: (damaged|missing)") as error:
            FlaxRobertaPreLayerNormModel.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match="no such file"):
        FlaxRobertaPreLayerNormModel.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(
        InputError, match=r"pytorch_model.bin: not read here, expected model.safetens"
    ):
        FlaxRobertaPreLayerNormModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b"}}))
    with pytest.raises(InputError, match="b: no such file"):
        FlaxRobertaPreLayerNormModel.from_pretrained(tmp_path)


def test_config_contradicting_weights_raises(tmp_path):
    small_flax_model("causal_lm").save_pretrained(tmp_path)
    for change, complaint in (
        ({"num_hidden_layers": 1}, "unexpected .*layer.1"),
        ({"hidden_size": 32}, r"expected float32\[60, 32\]"),
        ({"tie_word_embeddings": False}, "missing lm_head.decoder.weight"),
        ({"nonsense": 1}, "unknown argument nonsense"),
        ({"add_pooling_layer": False}, "unknown argument add_pooling_layer"),
        ({"config": {}}, "config is a dict"),
    ):
        with pytest.raises(InputError, match=complaint):
            FlaxRobertaPreLayerNormForCausalLM.from_pretrained(tmp_path, **change)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, complaint in (
        ({"add_cross_attention": False}, r"unexpected .*crossattention"),
        ({"pruned_heads": {"0": [1]}}, r"config.json: config: pruned_heads=\{'0': \[1\]\}"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(InputError, match=complaint):
            load_pretrained(tmp_path, "causal_lm")


def test_half_precision_files_and_trees(tmp_path):
    ours = small_flax_model("base")
    half = ours.to_bf16(ours.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    ours.save_pretrained(tmp_path, params=half)
    again = FlaxRobertaPreLayerNormModel.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    assert_same_params(again.params, ours.to_fp32(half))
    assert again(IDS).last_hidden_state.dtype == jnp.bfloat16
    only = ours.to_fp16(ours.params, jax.tree.map(lambda leaf: leaf.ndim > 1, ours.params))
    assert only["pooler"]["kernel"].dtype == np.float16
    assert only["pooler"]["bias"].dtype == np.float32


# Vocabulary and heads.


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resizing_embeddings_keeps_old_logits(tied):
    ours = small_flax_model("masked_lm", SMALL.replace(tie_word_embeddings=tied))
    before = ours(IDS).logits
    ours.resize_token_embeddings(61, pad_to_multiple_of=8)
    assert ours.config.vocab_size == 64
    parameters.check(ours.params, ours.config)
    np.testing.assert_allclose(ours(IDS).logits[..., :60], before, rtol=1e-5, atol=1e-5)
    ours.resize_token_embeddings(50)
    np.testing.assert_allclose(ours(IDS).logits, before[..., :50], rtol=1e-5, atol=1e-5)
    ours.resize_token_embeddings(pad_to_multiple_of=32)
    assert ours.config.vocab_size == ours.params["embeddings"]["word"].shape[0] == 64
    for sizes, complaint in (((0,), "new_num_tokens=0"), ((70, -8), "pad_to_multiple_of=-8")):
        with pytest.raises(InputError, match=complaint):
            ours.resize_token_embeddings(*sizes)


def test_pruned_heads_match_masked_heads_and_persist(tmp_path):
    ours = small_flax_model("base")
    mask = np.ones((2, 2), np.float32)
    mask[1, 0] = 0
    expected = ours(IDS, head_mask=mask).last_hidden_state
    ours.prune_heads({1: [0]})
    np.testing.assert_allclose(ours(IDS).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda p: (ours(IDS, params=p)[0] ** 3).sum())(ours.params)
    attention = gradient["encoder"]["layers"]["attention"]
    assert not np.any(attention["value"]["kernel"][1, :, 0])
    assert not np.any(attention["output"]["kernel"][1, 0])
    assert np.any(attention["output"]["kernel"][1, 1])
    ours.save_pretrained(tmp_path)
    again = FlaxRobertaPreLayerNormModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(IDS).last_hidden_state, ours(IDS).last_hidden_state)
    for heads in ({2: [0]}, {0: [-1]}, {"0": [0]}, [0]):
        with pytest.raises(InputError, match="prune_heads: "):
            ours.prune_heads(heads)


def test_head_mask_scales_probabilities():
    """A float per head; the reported probabilities are the weighted ones."""
    ours = small_flax_model("base")
    plain = ours(IDS, output_attentions=True).attentions
    weights = np.array([0.25, 1.0], np.float32)
    weighed = ours(IDS, output_attentions=True, head_mask=weights).attentions
    np.testing.assert_allclose(weighed[0], plain[0] * weights[:, None, None], rtol=1e-6)
    per_layer = ours(IDS, head_mask=np.stack([weights] * 2)).last_hidden_state
    np.testing.assert_array_equal(per_layer, ours(IDS, head_mask=weights).last_hidden_state)


def test_frozen_paths_do_not_change():
    ours = small_flax_model("token_classification")
    labels = freeze_labels(ours.params, ["embeddings/*", "*/key/bias"])
    steps = {"trained": optax.sgd(0.1), "frozen": optax.set_to_zero()}
    optimizer = optax.multi_transform(steps, labels)
    gradient = jax.tree.map(jnp.ones_like, ours.params)
    updates, _ = optimizer.update(gradient, optimizer.init(ours.params), ours.params)
    for path, update in parameters.flatten(updates).items():
        frozen = path.startswith("embeddings/") or path.endswith("attention/key/bias")
        assert np.all(update == 0) == frozen, path
    with pytest.raises(InputError, match="matches no parameter"):
        freeze_labels(ours.params, ["embedding/*"])


# The cache.


@pytest.mark.parametrize("config", [PLAIN_DECODER, DECODER], ids=["plain", "cross"])
def test_cached_decoding_matches_full_forward(config):
    """A prompt of four columns, then one, one and two: any padding, each row for itself."""
    ours = small_flax_model("causal_lm", config)
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 60, (5, 8))
    ids[1, :3] = ids[2, 2] = ids[3, 2:5] = ids[4, 6:] = config.pad_token_id
    mask = (ids != config.pad_token_id).astype(np.int32)
    cross = {}
    if config.add_cross_attention:
        cross["encoder_hidden_states"] = rng.standard_normal((5, 3, 16)).astype(np.float32)
        cross["encoder_attention_mask"] = np.array([[1, 1, 1], [1, 0, 0]] * 2 + [[0, 1, 1]])
    expected = ours(ids, mask, **cross).logits
    cache, found = ours.init_cache(5, 9), []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 8)):
        given = cross if start == 0 else {}
        output = ours(ids[:, start:stop], mask[:, start:stop], past_key_values=cache, **given)
        cache = output.past_key_values
        found.append(output.logits)
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache["count"], mask.sum(1))
    with pytest.raises(InputError, match="9 columns, 8 used: no room for 2 more"):
        ours(ids[:, :2], past_key_values=cache)
    logits, after = ours.module.apply({"params": ours.params}, ids[:, :1], mask[:, :1], cache=cache)
    assert logits.shape == (5, 1, 60) and int(after.cache["index"]) == 9


def test_causal_logits_do_not_depend_on_later_tokens():
    ours = small_flax_model("causal_lm", PLAIN_DECODER)
    changed = IDS.copy()
    changed[:, 3] = 11
    a, b = ours(IDS).logits, ours(changed).logits
    np.testing.assert_array_equal(a[:, :3], b[:, :3])
    assert np.abs(a[:, 3:] - b[:, 3:]).max() > 0.1
    with pytest.raises(InputError, match="is_decoder=False"):
        FlaxRobertaPreLayerNormForCausalLM(SMALL)


# Reading the inside.


def test_inputs_embeds_match_input_ids():
    for model in ("base", "multiple_choice", "sequence_classification"):
        ours = small_flax_model(model)
        ids = IDS[:1, :4]
        ids = np.stack([ids, ids[:, ::-1]], 1) if model == "multiple_choice" else ids
        vectors = ours.params["embeddings"]["word"][ids]
        np.testing.assert_allclose(
            ours(inputs_embeds=vectors)[0], ours(ids)[0], rtol=1e-5, atol=1e-5
        )
    by_vector = jax.grad(lambda x: ours(inputs_embeds=x).logits[0, 0])(jnp.asarray(vectors))
    by_table = jax.grad(lambda p: ours(ids, params=p).logits[0, 0])(ours.params)
    assert len(np.unique(ids)) == ids.size
    expected = np.asarray(by_table["embeddings"]["word"])[ids]
    np.testing.assert_allclose(by_vector, expected, rtol=1e-5, atol=1e-6)
    assert (np.abs(by_vector).sum(-1) > 0).all()


def test_tie_last_hidden_states():
    tied, loose = (
        small_flax_model("base"),
        small_flax_model("base", SMALL.replace(tie_last_hidden_states=False)),
    )
    a, b = (m(IDS, output_hidden_states=True) for m in (tied, loose))
    np.testing.assert_array_equal(a.hidden_states[-1], a.last_hidden_state)
    assert np.abs(b.hidden_states[-1] - b.last_hidden_state).max() > 0.1
    np.testing.assert_array_equal(a.hidden_states[1], b.hidden_states[1])


def test_classification_of_first_position_only_is_exact():
    """Asking for streams computes the last block everywhere; the logits stay."""
    for model in ("sequence_classification", "multiple_choice"):
        ours = small_flax_model(model)
        ids = np.stack([IDS, IDS[::-1]], 1) if model == "multiple_choice" else IDS
        whole = ours(ids, output_hidden_states=True)
        np.testing.assert_allclose(ours(ids).logits, whole.logits, rtol=1e-5, atol=1e-5)


def test_outputs_index_like_transformers():
    output = small_flax_model("base")(IDS, output_attentions=True)
    assert output.keys() == ["last_hidden_state", "pooler_output", "attentions"]
    assert output[0] is output["last_hidden_state"] is output.last_hidden_state
    assert output[1:] == (output.pooler_output, output.attentions)
    assert output.hidden_states is None and "hidden_states" not in output
    assert dict(**output).keys() == set(output)
    with pytest.raises(KeyError):
        output["hidden_states"]
    assert len(small_flax_model("base")(IDS, return_dict=False)) == 2
    assert len(jax.tree.leaves(output)) == 4


# Bad input.

BAD = {
    "id too large": ({"input_ids": [[0, 60]]}, r"input_ids\[0, 1\] is 60, expected 0 to vocab_si"),
    "id negative": ({"input_ids": [[-1]]}, "is -1"),
    "float ids": ({"input_ids": [[1.0]]}, "input_ids is float64, expected integers"),
    "rank": ({"input_ids": [1, 2]}, r"input_ids has shape \[2\], expected \[B, L\]"),
    "ragged": ({"input_ids": [[1, 2], [3]]}, "rows of different lengths"),
    "text": ({"input_ids": [["a"]]}, "expected numbers"),
    "empty": ({"input_ids": np.zeros((1, 0), int)}, "no empty axis"),
    "too long": ({"input_ids": np.full((1, 65), 5)}, "65 tokens is longer than the 64"),
    "nothing": ({}, "give input_ids or inputs_embeds"),
    "type": ({"input_ids": [[5]], "token_type_ids": [[1]]}, "type_vocab_size - 1 = 0"),
    "position": ({"input_ids": [[5]], "position_ids": [[66]]}, "position_ids.* is 66"),
    "mask": ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, r"\[1, 2\] or \[1, 2, 2\]"),
    "head mask": ({"input_ids": [[5]], "head_mask": [1.0]}, r"expected \[2\] or \[2, 2\]"),
    "embeds": ({"inputs_embeds": np.zeros((1, 2, 3), np.float32)}, "inputs_embeds has shape"),
    "states": (
        {"input_ids": [[5]], "encoder_hidden_states": np.zeros((1, 2, 16))},
        "add_cross_attention=False",
    ),
    "label": ({"input_ids": [[5]], "labels": [[60]]}, r"labels\[0, 0\] is 60"),
    "label shape": ({"input_ids": [[5]], "labels": [5]}, r"labels has shape \[1\]"),
    "float label": ({"input_ids": [[5]], "labels": [[5.0]]}, "labels is float64"),
    "other label": ({"input_ids": [[5]], "start_positions": [0]}, "start_positions: "),
    "no key": ({"input_ids": [[5]], "train": True}, "dropout_rng .* is None, expected a jax PRNG"),
    "no such key": ({"input_ids": [[5]], "train": True, "dropout_rng": 3}, "is 3, expected a jax"),
    "no states": ({"input_ids": [[5]], "encoder_attention_mask": [[1]]}, "encoder_hidden_states"),
    "no decoder": ({"input_ids": [[5]], "past_key_values": {}}, "does not decode with a cache"),
    "no tree": ({"input_ids": [[5]], "params": 3}, "expected a tree of arrays"),
    "other tree": ({"input_ids": [[5]], "params": {"a": np.ones(1)}}, "missing embeddings/word"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises(name):
    inputs, complaint = BAD[name]
    with pytest.raises(InputError, match=complaint) as error:
        small_flax_model("masked_lm")(**inputs)
    assert "\n" not in str(error.value)


def test_bad_targets_raise():
    sequence = small_flax_model("sequence_classification", SMALL.replace(num_labels=3))
    span, choice = small_flax_model("question_answering"), small_flax_model("multiple_choice")
    for call, complaint in (
        (
            lambda: sequence([[5]], labels=[3]),
            r"labels\[0\] is 3, expected 0 to num_labels - 1 = 2",
        ),
        (lambda: sequence([[5]], labels=[1.0]), r"labels has shape \[1\], expected \[1, 3\]"),
        (lambda: sequence([[5]], labels=[[0.0, 1.0, 7.0]]), r"expected numbers in \[0, 1\]"),
        (lambda: sequence([[5]], labels=[[0.0, 1.0, np.nan]]), "NaN"),
        (lambda: choice([[[5], [6]]], labels=[2]), r"labels\[0\] is 2, expected 0 to choices - 1"),
        (lambda: choice([[5]]), r"expected \[B, A, L\]"),
        (lambda: span([[5]], start_positions=[0]), "give both of start_positions, end_positions"),
        (lambda: span([[5]], labels=[0]), "takes start_positions and end_positions"),
        (lambda: span([[5]], start_positions=[0.5], end_positions=[1]), "expected integers"),
        (lambda: span([[5]], start_positions=[[0]], end_positions=[1]), r"expected \[1\]"),
    ):
        with pytest.raises(InputError, match=complaint):
            call()


def test_bad_caches_raise():
    ours = small_flax_model("causal_lm", PLAIN_DECODER)
    deeper = flax_model("causal_lm", PLAIN_DECODER.replace(num_hidden_layers=3))
    for cache, complaint in (
        ({}, "not a cache of this package"),
        (((1, 2),), "not a cache of this package"),
        (ours.init_cache(3, 9), r"keys have shape \[2, 3, 9, 2, 8\], expected \[2, 2, 9, 2, 8\]"),
        (deeper.init_cache(2, 9), r"shape \[3, 2, 9, 2, 8\], expected \[2, 2, 9, 2, 8\]"),
        (ours.init_cache(2, 4), "4 columns, 0 used: no room for 5 more"),
    ):
        with pytest.raises(InputError, match=complaint):
            ours(IDS, past_key_values=cache)
    cache = ours.init_cache(2, 99)
    cache["count"] += 61
    with pytest.raises(InputError, match="66 tokens is longer than the 64"):
        ours(IDS, past_key_values=cache)


def test_bad_options_raise():
    for options, complaint in (
        ({"attention": "flash"}, "attention='flash', expected one of"),
        ({"dtype": "float8"}, "dtype='float8', expected float32 or bfloat16"),
        ({"dtype": int}, "expected float32 or bfloat16"),
    ):
        with pytest.raises(InputError, match=complaint):
            FlaxRobertaPreLayerNormModel(SMALL, _do_init=False, **options)
    with pytest.raises(InputError, match="config is a dict"):
        FlaxRobertaPreLayerNormModel({})
    ours = small_flax_model("base")
    with pytest.raises(InputError, match=r"missing pooler/kernel .* unexpected lm_head"):
        ours.params = small_flax_model("masked_lm").params


def test_fused_attention_raises_where_unsupported():
    for attention in ("cudnn", "splash"):
        ours = small_flax_model("base", attention=attention)
        for options in ({}, {"output_attentions": True}, {"head_mask": np.ones(2, np.float32)}):
            with pytest.raises(InputError) as error:
                ours(IDS, **options)
            for part in (f"attention='{attention}' does not support the cpu backend", *options):
                part = "attention probabilities" if part == "output_attentions" else part
                assert part in str(error.value)


def test_saving_params_of_other_model_raises(tmp_path):
    with pytest.raises(InputError, match="missing pooler/kernel"):
        save_pretrained(tmp_path, random_params(SMALL, "encoder"), SMALL, "base")


def test_calls_follow_changed_params():
    """What a call prepares of its parameters is never used for others, nor kept from a trace."""
    model = flax_class("masked_lm")(SMALL)
    ids = np.array([[0, 5, 6, 2]])
    first = model(ids).logits
    other = jax.tree.map(lambda leaf: leaf + 0.1, model.params)
    assert not np.allclose(model(ids, params=other).logits, first)
    np.testing.assert_array_equal(model(ids).logits, first)

    fresh = flax_class("masked_lm")(SMALL)
    np.testing.assert_allclose(jax.jit(lambda ids: fresh(ids).logits)(ids), first, atol=1e-5)
    np.testing.assert_array_equal(fresh(ids).logits, first)
    inside = jax.jit(lambda ids: flax_class("masked_lm")(SMALL)(ids).logits)(ids)
    np.testing.assert_allclose(inside, first, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda params: model(ids, params=params).logits.sum())(model.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    model.enable_gradient_checkpointing()  # which scans layers, of the same arrays
    np.testing.assert_allclose(model(ids).logits, first, rtol=1e-5, atol=1e-5)
    model.params = other
    assert not np.allclose(model(ids).logits, first)
    host = jax.tree.map(np.array, model.params)
    before = np.asarray(model(ids, params=host).logits)
    host["encoder"]["layers"]["mlp"]["wo"]["kernel"][:] = np.arange(SMALL.hidden_size)
    assert not np.allclose(model(ids, params=host).logits, before)

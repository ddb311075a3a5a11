"""The configuration: checks, files, presets and FLOPs."""

import json

import pytest

from prelnroberta.config import ACTIVATIONS, PRESETS, RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.model.encoder import ACTIVATIONS as ACTIVATION_FUNCTIONS
from tests.helpers.small_models import ODD, TINY


def test_json_round_trip_keeps_unknown_keys(tmp_path):
    values = ODD.replace(num_labels=3).to_dict() | {"architectures": ["X"], "my_key": {"a": [1]}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = RobertaPreLayerNormConfig.from_json(tmp_path)
    assert config.extra == {"architectures": ["X"], "my_key": {"a": [1]}}
    assert config.num_labels == 3 and config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert json.loads(config.to_json()) == values
    assert RobertaPreLayerNormConfig.from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    "field, value",
    [
        ("vocab_size", 0),
        ("vocab_size", True),
        ("vocab_size", 10.0),
        ("hidden_size", 770),
        ("hidden_dropout_prob", 1.0),
        ("attention_probs_dropout_prob", -0.1),
        ("classifier_dropout", "x"),
        ("layer_norm_eps", 0.0),
        ("initializer_range", float("nan")),
        ("hidden_act", "gleu"),
        ("pad_token_id", 50265),
        ("pad_token_id", None),
        ("eos_token_id", [2, -1]),
        ("max_position_embeddings", 2),
        ("position_embedding_type", "relative_key"),
        ("add_cross_attention", True),
        ("problem_type", "bogus"),
        ("num_labels", 0),
        ("id2label", {0: "a", 2: "b"}),
        ("tie_word_embeddings", "yes"),
        ("chunk_size_feed_forward", -1),
    ],
)
def test_bad_values_raise_with_field_name(field, value):
    with pytest.raises(InputError, match=field) as error:
        RobertaPreLayerNormConfig(**{field: value})
    assert "expected" in str(error.value) and "\n" not in str(error.value)


def test_contradicting_label_settings_raise():
    with pytest.raises(InputError, match="num_labels=3"):
        RobertaPreLayerNormConfig(num_labels=3, id2label={0: "a", 1: "b"})
    with pytest.raises(InputError, match="problem_type"):
        RobertaPreLayerNormConfig(num_labels=1, problem_type="single_label_classification")


def test_bad_files_raise(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        RobertaPreLayerNormConfig.from_json(tmp_path)
    for text, expected in [
        ("{", "not valid json"),
        ("[1]", "json object"),
        ('{"model_type": "roberta"}', "roberta-prelayernorm"),
        ('{"hidden_size": -1}', "hidden_size=-1"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=expected) as error:
            RobertaPreLayerNormConfig.from_json(tmp_path)
        assert "config.json" in str(error.value)


def test_length_limit_error_has_both_numbers():
    config = RobertaPreLayerNormConfig.preset("roberta-base")
    assert config.max_length == 512 and RobertaPreLayerNormConfig().max_length == 510
    config.check_length(512)
    with pytest.raises(InputError, match=r"513.*512.*514"):
        config.check_length(513)


def test_presets_are_valid_and_unknown_preset_raises():
    for name in PRESETS:
        RobertaPreLayerNormConfig.preset(name)
    with pytest.raises(InputError, match=r"nano.*tiny"):
        RobertaPreLayerNormConfig.preset("nano")


def test_every_activation_is_implemented():
    assert set(ACTIVATIONS) == set(ACTIVATION_FUNCTIONS)


def test_config_is_hashable_for_jit():
    assert hash(TINY) == hash(RobertaPreLayerNormConfig.preset("tiny"))
    assert TINY.replace(num_labels=3) != TINY


def test_flops_match_known_numbers():
    """Encoder and encoder + head of base at L = 128, per token (shared/perf.md, section 1)."""
    config = RobertaPreLayerNormConfig.preset("roberta-base")
    assert config.forward_flops(128, lm_head=False) / 128 == pytest.approx(174.6e6, rel=1e-3)
    assert config.forward_flops(128) / 128 == pytest.approx(253.0e6, rel=1e-3)
    narrow = 3 * config.forward_flops(128, num_read=round(0.15 * 128)) / 128
    assert narrow == pytest.approx(528.0e6, rel=5e-3)

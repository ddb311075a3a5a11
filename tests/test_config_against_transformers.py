"""The configuration against that of transformers 5."""

import pytest
from transformers import RobertaPreLayerNormConfig as TorchConfig

from prelnroberta.config import RobertaPreLayerNormConfig
from tests.helpers.small_models import ODD

pytestmark = pytest.mark.oracle


def test_defaults_match_transformers():
    theirs = TorchConfig()
    for name, value in RobertaPreLayerNormConfig().to_dict().items():
        if name == "id2label":
            value = {int(i): label for i, label in value.items()}
        # Two fields that transformers 5 reads from elsewhere, with these defaults.
        if name not in ("position_embedding_type", "tie_last_hidden_states"):
            assert getattr(theirs, name) == value, name


def test_config_files_are_exchanged_with_transformers(tmp_path):
    config = ODD.replace(num_labels=5, classifier_dropout=0.25, problem_type="regression")
    (tmp_path / "config.json").write_text(config.to_json())
    theirs = TorchConfig.from_pretrained(tmp_path)
    for name, value in config.to_dict().items():
        found = getattr(theirs, name)
        assert ({str(k): v for k, v in found.items()} if name == "id2label" else found) == value, (
            name
        )
    theirs.save_pretrained(tmp_path / "again")
    back = RobertaPreLayerNormConfig.from_json(tmp_path / "again")
    assert back.replace(extra={}) == config

"""Parameter counts against transformers 5's torch models."""

import pytest
from transformers import RobertaPreLayerNormConfig as TorchConfig
from transformers import RobertaPreLayerNormForMaskedLM as TorchMaskedLM
from transformers import RobertaPreLayerNormModel as TorchModel

from prelnroberta import params as parameters
from tests.helpers.small_models import ODD, TINY

pytestmark = [pytest.mark.torch, pytest.mark.oracle]


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tied", "untied"])
def test_parameter_counts_match_torch(config):
    values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    theirs = TorchMaskedLM(TorchConfig(**values))
    count = sum(p.numel() for p in theirs.parameters())
    # transformers 5 keeps a second, dead bias where the head is untied.
    count -= 0 if config.tie_word_embeddings else config.vocab_size
    assert parameters.parameter_count(config) == count
    encoder = TorchModel(TorchConfig(**values), add_pooling_layer=False)
    assert parameters.parameter_count(config, "encoder") == sum(
        p.numel() for p in encoder.parameters()
    )

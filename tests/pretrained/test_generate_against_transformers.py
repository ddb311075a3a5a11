"""`generate` of the causal class against transformers 5."""

import numpy as np
import pytest
import torch
import transformers

from tests.helpers.causal_models import PROMPTS, causal_model, pad_prompts

pytestmark = [pytest.mark.torch, pytest.mark.oracle]


@pytest.fixture(scope="module")
def model():
    return causal_model()


class CountsFromPad(transformers.RobertaPreLayerNormForCausalLM):
    """`generate` gives positions 0, 1, 2, ...; forward passes have pad + 1, ...: corrected here."""

    def forward(self, input_ids=None, position_ids=None, **named):
        position_ids = position_ids + self.config.pad_token_id + 1
        return super().forward(input_ids=input_ids, position_ids=position_ids, **named)


SETTINGS = [
    {"max_new_tokens": 8},
    {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 3},
    {"max_new_tokens": 8, "num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    {"max_new_tokens": 8, "num_beams": 2, "repetition_penalty": 1.5, "min_new_tokens": 4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_generated_tokens_match_transformers(model, settings, tmp_path):
    """Greedy and beams, of prompts padded on the left, by the same weights with its own cache."""
    model.save_pretrained(tmp_path)
    theirs = CountsFromPad.from_pretrained(tmp_path).eval()
    prompts = torch.from_numpy(pad_prompts(PROMPTS, "left"))
    # A few ends, or none would come within eight tokens.
    settings = settings | {"eos_token_id": [2, 17, 30, 31, 44, 52], "pad_token_id": 1}
    expected = theirs.generate(
        prompts,
        attention_mask=(prompts != 1).long(),
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    found = model.generate(prompts.numpy(), **settings)
    width = expected.sequences.shape[1]
    np.testing.assert_array_equal(np.asarray(found.sequences)[:, :width], expected.sequences)
    assert (np.asarray(found.sequences)[:, width:] == 1).all()
    if "num_beams" in settings:
        np.testing.assert_allclose(found.scores, expected.sequences_scores, rtol=1e-5)

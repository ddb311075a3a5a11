"""The causal class generates what its own forward pass says, whatever the padding, and what
transformers 5 generates with it."""

import numpy as np
import pytest
import torch
import transformers

from prelnroberta import FlaxRobertaPreLayerNormForCausalLM, InputError
from tests.helpers.small_models import TINY, random_params

CONFIG = TINY.replace(vocab_size=60, is_decoder=True, eos_token_id=None)
PROMPTS = [[0, 5, 6, 7, 8], [9, 10], [11]]
NEW = 5


@pytest.fixture(scope="module")
def model():
    made = FlaxRobertaPreLayerNormForCausalLM(CONFIG, _do_init=False)
    made.params = random_params(CONFIG, "causal_lm")
    # Never a pad: it is no token, as in every forward pass; transformers' `generate` counts it.
    made.params["lm_head"]["bias"][CONFIG.pad_token_id] = -50
    return made


def padded(prompts, side):
    width, pad = max(map(len, prompts)), CONFIG.pad_token_id
    rows = [
        [pad] * (width - len(p)) + p if side == "left" else p + [pad] * (width - len(p))
        for p in prompts
    ]
    return np.array(rows)


def step_by_step(model, prompt):
    """argmax over a whole forward pass without a cache, again for every new token.

    In one row of fixed length, which compiles once: pads come after what is read.
    """
    ids = np.full((1, max(map(len, PROMPTS)) + NEW), CONFIG.pad_token_id)
    ids[0, : len(prompt)] = prompt
    for n in range(len(prompt), len(prompt) + NEW):
        ids[0, n] = np.asarray(model(ids).logits)[0, n - 1].argmax()
    return ids[0, len(prompt) : len(prompt) + NEW].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_is_step_by_step_argmax(model, side):
    found = np.asarray(model.generate(padded(PROMPTS, side), max_new_tokens=NEW).sequences)
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert row[-NEW:].tolist() == step_by_step(model, prompt)


def test_beams_do_not_depend_on_padding_or_neighbours(model):
    def beams(prompts, side):
        found = model.generate(padded(prompts, side), max_new_tokens=NEW, num_beams=3)
        return np.asarray(found.sequences)[:, -NEW:], np.asarray(found.scores)

    left, scores = beams(PROMPTS, "left")
    right, same = beams(PROMPTS, "right")
    np.testing.assert_array_equal(left, right)
    np.testing.assert_allclose(scores, same, rtol=1e-5)
    alone, _ = beams(PROMPTS[1:2], "left")
    np.testing.assert_array_equal(alone[0], left[1])


class CountsFromPad(transformers.RobertaPreLayerNormForCausalLM):
    """`generate` gives positions 0, 1, 2, ... where every forward pass has pad + 1, ...: mended."""

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
def test_transformers_generates_the_same(model, settings, tmp_path):
    """Greedy and beams, of prompts padded on the left, by the same weights with its own cache."""
    model.save_pretrained(tmp_path)
    theirs = CountsFromPad.from_pretrained(tmp_path).eval()
    prompts = torch.from_numpy(padded(PROMPTS, "left"))
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


def test_what_would_outgrow_the_positions_is_refused(model):
    with pytest.raises(InputError, match=r"continuation of 69 tokens .*64"):
        model.generate(np.array([[0, 5, 6, 7, 8]]), max_new_tokens=65)

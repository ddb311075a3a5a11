"""`generate` of the causal class: what its own forward pass says, whatever the padding."""

import numpy as np
import pytest

from prelnroberta import InputError
from tests.helpers.causal_models import CAUSAL_CONFIG, NEW, PROMPTS, causal_model, pad_prompts


@pytest.fixture(scope="module")
def model():
    return causal_model()


def step_by_step(model, prompt):
    """argmax over a whole forward pass without a cache, again for every new token.

    In one row of fixed length, which compiles once: pads come after what is read.
    """
    ids = np.full((1, max(map(len, PROMPTS)) + NEW), CAUSAL_CONFIG.pad_token_id)
    ids[0, : len(prompt)] = prompt
    for n in range(len(prompt), len(prompt) + NEW):
        ids[0, n] = np.asarray(model(ids).logits)[0, n - 1].argmax()
    return ids[0, len(prompt) : len(prompt) + NEW].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_matches_step_by_step_argmax(model, side):
    found = np.asarray(model.generate(pad_prompts(PROMPTS, side), max_new_tokens=NEW).sequences)
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert row[-NEW:].tolist() == step_by_step(model, prompt)


def test_beams_do_not_depend_on_padding_or_neighbours(model):
    def beams(prompts, side):
        found = model.generate(pad_prompts(prompts, side), max_new_tokens=NEW, num_beams=3)
        return np.asarray(found.sequences)[:, -NEW:], np.asarray(found.scores)

    left, scores = beams(PROMPTS, "left")
    right, same = beams(PROMPTS, "right")
    np.testing.assert_array_equal(left, right)
    np.testing.assert_allclose(scores, same, rtol=1e-5)
    alone, _ = beams(PROMPTS[1:2], "left")
    np.testing.assert_array_equal(alone[0], left[1])


def test_generating_beyond_position_table_raises(model):
    with pytest.raises(InputError, match=r"continuation of 69 tokens .*64"):
        model.generate(np.array([[0, 5, 6, 7, 8]]), max_new_tokens=65)

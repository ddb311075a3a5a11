"""Generation of the causal PyTorch twin: the tokens of Flax, and the right sampling frequencies."""

import jax
import numpy as np
import pytest
import torch

from bridges.pytorch import generation
from prelnroberta import FlaxRobertaPreLayerNormForCausalLM, InputError
from prelnroberta.inference import generation as flax_generation
from tests.helpers.pytorch_models import twin
from tests.helpers.small_models import TINY, ragged_batch, random_params

pytestmark = pytest.mark.torch

torch.set_num_threads(1)
CONFIG = TINY.replace(vocab_size=60, is_decoder=True, eos_token_id=(2, 7))
CROSS = CONFIG.replace(add_cross_attention=True)
PROMPTS = torch.from_numpy(ragged_batch(CONFIG, L=9)["input_ids"])
SETTINGS = {
    "greedy": {},
    "greedy_penalized": {"repetition_penalty": 1.7, "min_new_tokens": 4},
    "beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.7},
    "beams_early": {
        "num_beams": 3,
        "early_stopping": True,
        "repetition_penalty": 1.3,
        "length_penalty": 3.0,
    },
    "beams_never": {"num_beams": 3, "early_stopping": "never", "min_length": 14},
    "cross": {"num_beams": 2},
}


@pytest.fixture(scope="module")
def model():
    return twin("causal_lm", CONFIG, random_params(CONFIG, "causal_lm", scale=0.15))


def states():
    rng = np.random.default_rng(1)
    mask = np.array([[1] * 6, [1, 1, 1, 0, 0, 0]] * 2 + [[1] * 6])
    return {
        "encoder_hidden_states": rng.standard_normal((5, 6, 32), np.float32),
        "encoder_attention_mask": mask,
    }


@pytest.mark.parametrize("kind", SETTINGS)
def test_generated_tokens_match_flax(kind):
    """Prompts padded on every side; rows end early, late and never."""
    config = CROSS if kind == "cross" else CONFIG
    settings = {"max_new_tokens": 12, **SETTINGS[kind]}
    params = random_params(config, "causal_lm", scale=0.15)
    flax = FlaxRobertaPreLayerNormForCausalLM(config, _do_init=False)
    given = states() if kind == "cross" else {}
    expected = flax.generate(PROMPTS.numpy(), params=params, **given, **settings)
    found = twin("causal_lm", config, params).generate(
        PROMPTS,
        return_dict_in_generate=True,
        **{name: torch.from_numpy(value) for name, value in given.items()},
        **settings,
    )
    np.testing.assert_array_equal(found.sequences, expected.sequences)
    if found.scores is not None:
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-5)


def test_greedy_matches_argmax_of_full_forward(model):
    found = model.generate(PROMPTS, max_new_tokens=5, eos_token_id=None)
    assert found.dtype == torch.long and found.shape == (5, 14)
    for row, new in zip(PROMPTS, found[:, 9:], strict=True):
        ids = row[row != CONFIG.pad_token_id].tolist()
        for token in new.tolist():
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


def test_top_k_and_top_p_match_flax():
    logits = 3 * torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    logits[0, :4] = 5.0  # equal ones
    seen = torch.rand(7, 50, generator=torch.Generator().manual_seed(1)) < 0.3
    cases = {
        "keep_top_k": [(1,), (5,), (80,)],
        "keep_top_p": [(0.1,), (0.7,), (0.99,)],
        "penalize_repetition": [(seen, 1.3)],
    }
    for name, all_arguments in cases.items():
        for given in all_arguments:
            as_jax = [jax.numpy.asarray(a) for a in given] if name[0] == "p" else given
            np.testing.assert_allclose(
                getattr(generation, name)(logits, *given),
                getattr(flax_generation, name)(jax.numpy.asarray(logits.numpy()), *as_jax),
                rtol=1e-6,
                err_msg=f"{name} {given}",
            )


def test_sampled_frequencies_match_distribution(model):
    """The first new token of 4,000 samples, against softmax after temperature and top_k."""
    prompt, n = torch.tensor([[0, 5, 6]]), 4000
    found = model.generate(
        prompt,
        do_sample=True,
        temperature=1.5,
        top_k=6,
        max_new_tokens=1,
        num_return_sequences=n,
        generator=torch.Generator().manual_seed(0),
    )
    logits = generation.keep_top_k(model(prompt).logits[:, -1] / 1.5, 6)
    expected = n * logits.softmax(-1)[0].detach().numpy()
    counts = np.bincount(found[:, 3], minlength=60)
    likely = expected > 0
    assert likely.sum() == 6 and (counts[~likely] == 0).all()
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_square < 20.5  # 0.1 % of a chi-square of 5 degrees of freedom


def test_torch_generator_determines_samples(model):
    def draw(seed, **settings):
        return model.generate(
            PROMPTS,
            do_sample=True,
            num_return_sequences=2,
            generator=torch.Generator().manual_seed(seed),
            **settings,
        )

    assert torch.equal(draw(0, top_p=0.9), draw(0, top_p=0.9))
    assert not torch.equal(draw(0), draw(1))
    greedy = model.generate(PROMPTS).repeat_interleave(2, 0)
    assert torch.equal(draw(0, top_k=1), greedy)


def test_invalid_generation_arguments_raise(model):
    for given, message in (
        ({"max_new_tokens": 65}, "continuation of"),
        ({"top_k": 3}, "unless do_sample"),
        ({"eos_token_id": 99}, "eos or pad id 99"),
        ({"attention_mask": torch.zeros_like(PROMPTS)}, "row 0 is all 0"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(PROMPTS, **given)

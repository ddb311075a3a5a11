"""Every PyTorch twin against the Flax model it is made from and against transformers 5's class.

float64 leaves no room for a slip: there the twin and transformers agree to 1e-12. float32 is held
to the ladder, and Flax to the twin at every position, padded ones included.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridges.pytorch import KVCache
from prelnroberta import InputError
from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.pretrained.hf_checkpoint import to_state_dict
from tests.helpers.model_cases import MODEL_CASES, case_batch
from tests.helpers.pytorch_models import paired_outputs, scalar_target, to_torch, twin, twin_class
from tests.helpers.small_models import (
    ODD,
    SMALL,
    flax_model,
    ragged_batch,
    random_params,
    with_tokens,
)
from tests.helpers.tolerances import assert_close
from tests.helpers.torch_reference import TorchReference, transformers_model

pytestmark = [pytest.mark.torch, pytest.mark.oracle]

torch.set_num_threads(1)
DECODER = SMALL.replace(is_decoder=True, add_cross_attention=True)


@pytest.mark.parametrize("kind", MODEL_CASES)
def test_outputs_match_flax(kind):
    model, config = MODEL_CASES[kind]
    params, batch = random_params(config, model), case_batch(model, config, kind)
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected = flax_model(model, config)(**batch, params=params, **asked)
    ours = twin(model, config, params)
    found = ours(**to_torch(batch), **asked)
    assert [k for k in found if k != "past_key_values"] == list(expected)
    for name, a, b in paired_outputs(found, expected):
        assert_close(a, b, name, 3e-6, 3e-5)
    # Without attentions the fused kernel computes, and the last block no more than is read.
    for name, a, b in paired_outputs(found, ours(**to_torch(batch))):
        assert_close(a, b, name, 2e-6, 2e-5)
    assert isinstance(ours(**to_torch(batch), return_dict=False), tuple)


@pytest.mark.parametrize("kind", MODEL_CASES)
def test_outputs_and_gradients_match_transformers(kind):
    """Outputs and gradients: float64 to the last digits, float32 to the ladder."""
    model, config = MODEL_CASES[kind]
    params, batch = random_params(config, model), with_tokens(case_batch(model, config, kind))
    theirs, asked = transformers_model(model, config, params), {"use_cache": False}
    wide = to_torch(batch, torch.float64)
    expected = theirs(**wide, output_hidden_states=True, output_attentions=True, **asked)
    if model == "causal_lm":
        # transformers rounds these logits to float32 for the loss.
        logits, labels = expected.logits[:, :-1].flatten(0, 1), wide["labels"][:, 1:].flatten()
        expected["loss"] = torch.nn.functional.cross_entropy(logits, labels)
    scalar_target(expected).backward()
    ladder = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    scale = max(np.abs(g).max() for g in ladder.values())
    real = batch["attention_mask"] == 1 if config.is_decoder else slice(None)

    for dtype, rms, largest in [(torch.float64, 1e-13, 1e-12), (torch.float32, 2e-6, 2e-5)]:
        ours = twin(model, config, params).to(dtype)
        found = ours(
            **to_torch(batch, dtype), output_hidden_states=True, output_attentions=True, **asked
        )
        for name, a, b in paired_outputs(found, expected):
            if a.ndim == 4:
                a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
            a, b = (a[real], b[real]) if a.ndim else (a, b)
            assert_close(a, b, name, rms, largest)
        scalar_target(ours(**to_torch(batch, dtype))).backward()
        gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
        for name, gradient in ladder.items():
            if name == "lm_head.decoder.bias":
                name = "lm_head.bias"  # one parameter here
            ours_too = gradients[name].numpy()
            if name.endswith("self.key.bias"):
                assert np.abs(ours_too).max() < 2e-6 * scale, name
            elif np.abs(gradient).max() > 1e-9 * scale:
                if "word_emb" in name or "position_emb" in name:
                    # torch stops the gradient of the lookup at the pad row, Flax and we do not.
                    ours_too, gradient = (
                        np.delete(g, config.pad_token_id, 0) for g in (ours_too, gradient)
                    )
                assert_close(ours_too, gradient, f"gradient of {name}", 5 * rms, 10 * largest)


@pytest.mark.parametrize("kind", ["masked_lm", "cross"])
def test_gradients_match_flax(kind):
    """Where pads are seen, their rows of both tables too, which transformers leaves alone."""
    model, config = MODEL_CASES[kind]
    params, batch = random_params(config, model), case_batch(model, config, kind)
    del batch["attention_mask"]
    ours = twin(model, config, params)
    ours(**to_torch(batch)).loss.backward()
    flax = flax_model(model, config)
    expected = jax.jit(jax.grad(lambda p: flax(**batch, params=p).loss))(params)
    for name, gradient in to_state_dict(expected, config, model).items():
        found = ours.get_parameter(name).grad.numpy()
        if name.endswith("self.key.bias"):
            assert np.abs(found).max() < 1e-5, name
        else:
            assert_close(found, gradient, f"gradient of {name}", 1e-5, 2e-4)


def test_base_size_matches_transformers():
    config = RobertaPreLayerNormConfig.preset("roberta-base")
    params, batch = random_params(config, scale=0.05), ragged_batch(config, L=24)
    reference = TorchReference(config, params, batch)
    ours = twin("masked_lm", config, params)
    found = ours(**to_torch(batch))
    real = batch["attention_mask"] == 1
    expected = reference.output.logits.detach().numpy()
    assert_close(found.logits.detach().numpy()[real], expected[real], "logits")
    assert abs(found.loss.item() / reference.output.loss.item() - 1) < 2e-6
    found.loss.backward()
    gradients = dict(ours.named_parameters())
    for name, gradient in reference.gradients().items():
        if not name.endswith(("self.key.bias", "decoder.bias")):
            grad = gradients[name].grad.numpy()
            if "position_emb" in name:
                grad, gradient = (np.delete(g, config.pad_token_id, 0) for g in (grad, gradient))
            assert_close(grad, gradient, f"gradient of {name}", 1e-5, 3e-4)


# Arguments.

_rng = np.random.default_rng(0)
ARGUMENTS = {
    "head_mask_1d": ("base", {"head_mask": _rng.random(7).astype(np.float32)}),
    "head_mask_2d": ("masked_lm", {"head_mask": _rng.random((3, 7)).astype(np.float32)}),
    "mask_3d": ("token_classification", {"attention_mask": _rng.integers(0, 2, (5, 16, 16))}),
    "mask_3d_first": (
        "sequence_classification",
        {"attention_mask": _rng.integers(0, 2, (5, 16, 16))},
    ),
    "position_ids": ("question_answering", {"position_ids": _rng.integers(0, 33, (5, 16))}),
    "no_mask": ("sequence_classification", {"attention_mask": None}),
    "no_types": ("encoder", {"token_type_ids": None}),
    "embeds": (
        "masked_lm",
        {"input_ids": None, "inputs_embeds": _rng.standard_normal((5, 16, 42), np.float32)},
    ),
    "row_of_pads": ("base", {"attention_mask": np.repeat([[1], [0], [1], [1], [1]], 16, 1)}),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_call_arguments_match_flax(kind):
    model, changes = ARGUMENTS[kind]
    params = random_params(ODD, model)
    batch = {k: v for k, v in ragged_batch(ODD).items() if k != "labels"} | changes
    batch = {name: value for name, value in batch.items() if value is not None}
    expected = flax_model(model, ODD)(**batch, params=params)
    ours = twin(model, ODD, params)
    for more in ({}, {"output_attentions": True}):
        for name, a, b in paired_outputs(ours(**to_torch(batch), **more), expected):
            assert_close(a, b, name, 3e-6, 3e-5)


def test_multiple_choice_accepts_inputs_embeds():
    params = random_params(SMALL, "multiple_choice")
    batch = {
        "inputs_embeds": _rng.standard_normal((2, 3, 7, 16), np.float32),
        "attention_mask": np.tile([1, 1, 1, 1, 1, 0, 0], (2, 3, 1)),
    }
    expected = flax_model("multiple_choice", SMALL)(**batch, params=params)
    found = twin("multiple_choice", SMALL, params)(**to_torch(batch))
    assert_close(found.logits.detach(), expected.logits, "logits", 3e-6, 3e-5)


def test_tie_last_hidden_states():
    ids = torch.tensor([[0, 5, 6, 2]])
    for tied in (True, False):
        config = SMALL.replace(tie_last_hidden_states=tied)
        found = twin("base", config)(ids, output_hidden_states=True)
        assert len(found.hidden_states) == config.num_hidden_layers + 1
        assert (found.hidden_states[-1] is found.last_hidden_state) == tied


def test_loss_without_counted_labels_is_zero_and_differentiable():
    ids = torch.tensor([[5, 6, 7]])
    ours = twin("masked_lm", SMALL)
    loss = ours(ids, labels=torch.full((1, 3), -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())
    outside = {"start_positions": torch.tensor([-1]), "end_positions": torch.tensor([3])}
    assert twin("question_answering", SMALL)(ids, **outside).loss.item() == 0.0


def test_problem_type_is_inferred_by_each_call():
    ours = twin("sequence_classification", SMALL.replace(num_labels=3))
    for labels in (torch.tensor([1]), torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([2])):
        assert torch.isfinite(ours(torch.tensor([[5, 6, 7]]), labels=labels).loss)
    assert ours.config.problem_type is None


def test_outputs_index_like_dicts_and_tuples():
    found = twin("base", SMALL)(torch.tensor([[5, 6, 7]]))
    assert list(found) == ["last_hidden_state", "pooler_output"]
    assert found[0] is found["last_hidden_state"] is found.to_tuple()[0]
    assert {**found}.keys() == set(found)


# The cache.


def rows_of_pads(config):
    """Rows padded on the right, on the left and in the middle, and a batch for cross-attention."""
    batch = ragged_batch(config, L=12)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    batch["encoder_hidden_states"] = _rng.standard_normal((5, 6, 16), np.float32)
    batch["encoder_attention_mask"] = np.array([[1, 1, 1, 1, 0, 0]] * 5)
    return to_torch(batch)


@pytest.mark.parametrize("whole_mask", [False, True])
def test_cached_decoding_matches_full_forward(whole_mask):
    """Positions go on over real tokens, whatever the padding; states are read once."""
    ours, batch = twin("causal_lm", DECODER), rows_of_pads(DECODER)
    expected = ours(**batch).logits
    states = {name: batch[name] for name in batch if name.startswith("encoder")}
    cache, found = None, []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 12)):
        output = ours(
            batch["input_ids"][:, start:stop],
            batch["attention_mask"][:, 0 if whole_mask else start : stop],
            past_key_values=cache,
            use_cache=True,
            **(states if cache is None else {}),
        )
        cache = output.past_key_values
        assert isinstance(cache, KVCache) and cache.num_columns == stop
        found.append(output.logits)
    real = batch["attention_mask"] == 1
    found = torch.cat(found, 1)[real].detach()
    assert_close(found, expected[real].detach(), "logits", 3e-6, 3e-5)


def test_cache_is_returned_like_transformers():
    ours = twin("causal_lm", DECODER)
    ids = torch.tensor([[5, 6, 7]])
    assert ours(ids).past_key_values is not None
    assert ours(ids, use_cache=False).past_key_values is None
    assert ours(ids, labels=ids).past_key_values is None
    assert twin("base", SMALL)(ids).past_key_values is None


# Bad input.

IDS = torch.tensor([[0, 5, 6, 2]])
BAD = {
    "a list": ("base", {"input_ids": [[0, 5]]}, "input_ids is a list, expected a torch.Tensor"),
    "neither": ("masked_lm", {}, "input_ids or inputs_embeds"),
    "both": ("base", {"input_ids": IDS, "inputs_embeds": torch.zeros(1, 4, 16)}, "not both"),
    "an id too large": ("base", {"input_ids": IDS + 60}, r"input_ids\[0, 0\] is 60, expected 0 to"),
    "a type too large": (
        "base",
        {"input_ids": IDS, "token_type_ids": IDS},
        r"token_type_ids\[0, 1\]",
    ),
    "too long": ("base", {"input_ids": torch.full((1, 65), 5)}, "65 tokens is longer than the 64"),
    "a mask of another shape": (
        "base",
        {"input_ids": IDS, "attention_mask": torch.ones(1, 3)},
        r"attention_mask has shape \[1, 3\]",
    ),
    "labels of another shape": (
        "masked_lm",
        {"input_ids": IDS, "labels": IDS[0]},
        r"labels has shape \[4\], expected \[1, 4\]",
    ),
    "a label too large": ("token_classification", {"input_ids": IDS, "labels": IDS}, "num_labels"),
    "a choice too large": (
        "multiple_choice",
        {"input_ids": IDS[None], "labels": torch.tensor([1])},
        r"labels\[0\] is 1",
    ),
    "rows for choices": ("multiple_choice", {"input_ids": IDS}, r"expected \[B, A, L\]"),
    "one end": ("question_answering", {"input_ids": IDS, "start_positions": IDS[0, :1]}, "both"),
    "states for an encoder": (
        "base",
        {"input_ids": IDS, "encoder_hidden_states": torch.zeros(1, 3, 16)},
        "add_cross_attention=False",
    ),
    "a cache for an encoder": (
        "base",
        {"input_ids": IDS, "past_key_values": KVCache.empty(2, IDS)},
        "is_decoder=False",
    ),
    "three axes with a cache": (
        "causal_lm",
        {"input_ids": IDS, "attention_mask": torch.ones(1, 4, 4), "use_cache": True},
        "masks of two axes",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_raises_one_line_before_compute(kind):
    model, given, message = BAD[kind]
    ours = twin(model, DECODER if model == "causal_lm" else SMALL)
    with pytest.raises(InputError, match=message) as error:
        ours(**given)
    assert "\n" not in str(error.value)


def test_cached_rows_beyond_position_table_raise():
    ours = twin("causal_lm", DECODER)
    cache = ours(torch.full((2, 60), 5)).past_key_values
    assert ours(torch.full((2, 4), 5), past_key_values=cache).logits.shape == (2, 4, 60)
    with pytest.raises(InputError, match="65 tokens is longer than the 64"):
        ours(torch.full((2, 5), 5), past_key_values=cache)


def test_invalid_model_arguments_raise():
    with pytest.raises(InputError, match="is_decoder=False, expected True"):
        twin_class("causal_lm")(SMALL)
    with pytest.raises(InputError, match="num_labels=3, expected 2"):
        twin_class("question_answering")(SMALL.replace(num_labels=3))
    with pytest.raises(InputError, match="config is a dict"):
        twin_class("base")(SMALL.to_dict())
    params = random_params(SMALL)
    del params["lm_head"]["bias"]
    with pytest.raises(InputError, match="missing lm_head/bias"):
        twin("masked_lm", SMALL, params)


def test_initial_values_follow_parameter_table():
    torch.manual_seed(0)
    config = RobertaPreLayerNormConfig.preset("small", num_hidden_layers=1)
    flat = parameters.flatten(twin_class("masked_lm")(config).to_params())
    for path, row in parameters.table(config, "masked_lm").items():
        value = flat[path]
        if row.init in ("zeros", "ones"):
            assert (value == (row.init == "ones")).all(), path
        else:
            assert abs(value.std() / 0.02 - 1) < 0.1, path
        if row.init == "embedding":
            assert (value[config.pad_token_id] == 0).all(), path
    assert jnp.asarray(flat["embeddings/word"]).dtype == jnp.float32

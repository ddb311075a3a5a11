"""Every model against transformers 5's torch class in float64: outputs, streams, attentions, loss
and every gradient, all parameters random, in odd configurations. Rows are as long as the position
table allows, padded on every side, of one token, and all padding."""

import jax
import numpy as np
import pytest
import torch
import transformers

import prelnroberta
from prelnroberta.pretrained.hf_checkpoint import ARCHITECTURES, to_tensors
from tests.helpers.support import ODD, TINY, assert_close, ragged_batch, random_params

torch.set_num_threads(1)
L = 11
SMALL = TINY.replace(vocab_size=60, hidden_size=16, intermediate_size=24, num_attention_heads=2)
TWO_TYPES = SMALL.replace(
    type_vocab_size=2, hidden_act="relu", layer_norm_eps=1e-12, pad_token_id=0, bos_token_id=1
)
CASES = {
    "base": ("base", ODD),
    "base_encoder": ("encoder", TWO_TYPES.replace(hidden_act="silu")),
    "masked_lm": ("masked_lm", SMALL),
    "causal_lm": ("causal_lm", ODD.replace(is_decoder=True)),
    "cross": ("causal_lm", SMALL.replace(is_decoder=True, add_cross_attention=True)),
    "single_label": ("sequence_classification", ODD.replace(num_labels=5)),
    "regression": ("sequence_classification", TWO_TYPES.replace(num_labels=1)),
    "multi_label": ("sequence_classification", SMALL.replace(num_labels=3)),
    "multiple_choice": ("multiple_choice", TWO_TYPES),
    "token": ("token_classification", ODD.replace(num_labels=7)),
    "span": ("question_answering", SMALL),
}


def for_full_rows(cases, **changes):
    """The same with no more positions than rows of L tokens need."""
    return {
        kind: (
            model,
            config.replace(max_position_embeddings=L + config.pad_token_id + 1, **changes),
        )
        for kind, (model, config) in cases.items()
    }


CASES = for_full_rows(CASES)


def flax_class(model):
    name = ARCHITECTURES[model]
    return getattr(prelnroberta, "Flax" + name)


def our_model(model, config, **options):
    if model == "encoder":
        options["add_pooling_layer"] = False
    return flax_class(model)(config, _do_init=False, **options)


def torch_model(model, config, params):
    """transformers 5's class with our parameters, in float64."""
    values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    settings = transformers.RobertaPreLayerNormConfig(**values, attn_implementation="eager")
    options = {"add_pooling_layer": False} if model == "encoder" else {}
    theirs = getattr(transformers, ARCHITECTURES[model])(settings, **options).eval()
    tensors = {k: torch.from_numpy(v) for k, v in to_tensors(params, config, model).items()}
    found = theirs.load_state_dict(tensors, strict=False)
    tied = {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    assert not found.unexpected_keys and set(found.missing_keys) <= tied
    return theirs.double()


def case_batch(model, config, kind):
    """Inputs and targets of one case.

    No target reads the row of pads: torch's additive masks send gradients through its softmax,
    where ours, which selects, has none.
    """
    rng = np.random.default_rng(3)
    batch = ragged_batch(config, L=L)
    labels = batch.pop("labels")
    if kind == "regression":
        return batch | {"labels": rng.standard_normal(5).astype(np.float32)}
    if kind == "multi_label":
        return batch | {"labels": (rng.random((5, 3)) < 0.5).astype(np.float32)}
    of_pads = dict.fromkeys(batch, 0) | {"input_ids": config.pad_token_id}
    batch = {k: np.concatenate([v, np.full((1, L), of_pads[k])]) for k, v in batch.items()}
    labels = np.concatenate([labels, np.full((1, L), -100)])
    if model == "multiple_choice":
        return {k: np.stack([v, v[::-1]], 1) for k, v in batch.items()} | {
            "labels": np.array([-100, 1, 1, 0, 0, -100])
        }
    if model in ("base", "encoder"):
        return batch
    if kind == "cross":
        states = rng.standard_normal((6, 6, config.hidden_size)).astype(np.float32)
        batch["encoder_hidden_states"] = 2 * states + 1
        batch["encoder_attention_mask"] = np.array([[1] * 6, [1, 1, 1, 0, 0, 0]] * 3)
    if model == "causal_lm":
        # A pad before all others sees nothing in a causal row: the same as a row of pads.
        labels[:, 1:][batch["attention_mask"][:, :-1] == 0] = -100
    if model == "question_answering":
        return batch | {
            "start_positions": np.array([3, 0, 10, 40, 11, 40]),
            "end_positions": np.array([5, 2, 11, 7, 4, 40]),
        }
    if model == "token_classification":
        labels = np.where(labels == -100, -100, labels % config.num_labels)
    elif kind == "single_label":
        labels = np.array([0, config.num_labels - 1, -100, 2, 1, -100])
    return batch | {"labels": labels}


def loss_and_gradients(kind, cases=CASES):
    """Our loss, output and gradients, and the weights of outputs whose sum takes the place of a
    loss where there is none."""
    model, config = cases[kind]
    params, batch = random_params(config, model), case_batch(model, config, kind)
    ours = our_model(model, config)
    weight = np.linspace(-1, 1, 6 * L * config.hidden_size, dtype=np.float32)
    weight = weight.reshape(6, L, -1) * (np.arange(6) < 5)[:, None, None]

    def loss(params):
        output = ours(**batch, params=params, output_hidden_states=True, output_attentions=True)
        if model not in ("base", "encoder"):
            return output.loss, output
        value = (output.last_hidden_state * weight).sum()
        if model == "base":
            value = value + (output.pooler_output * weight[:, 0]).sum()
        return value, output

    (value, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, output, to_tensors(gradients, config, model), weight


def assert_outputs_match(config, batch, found, expected, rms=3e-6, largest=3e-5):
    """Expected arrays by name against ours, at real tokens where pads may differ."""
    real = batch["attention_mask"] == 1 if config.is_decoder else slice(None)
    assert [k for k in found if k != "loss"] == list(expected)
    for name, value in expected.items():
        a, b = found[name], value
        if not isinstance(a, tuple):
            a, b = (a,), (b,)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            x, y = np.asarray(x), np.asarray(y)
            if "attentions" in name:
                x, y = x.swapaxes(1, 2), y.swapaxes(1, 2)
            assert_close(x[real], y[real], f"{name} {i}", rms, largest)


def assert_gradients_match(config, found, expected, floor=1e-9, padding_idx=True):
    """Expected gradients by torch name against ours.

    Args:
        floor: below this share of the greatest gradient, one is zero in truth (softmax sees no
            shift by a key's, a choice's or a span's bias) and is compared absolutely.
        padding_idx: whether the reference stops the gradient of lookups at the pad row, as torch
            does and Flax did not.
    """
    scale = max(np.abs(g).max() for g in expected.values())
    # Untied, transformers 5 computes with decoder.bias and keeps a dead lm_head.bias beside it.
    moved = {n for n in found if np.abs(found[n]).max() > 2e-6 * scale}
    assert moved - {"lm_head.bias", "lm_head.decoder.bias"} <= set(expected)
    for name, gradient in expected.items():
        if name not in found:
            assert name.startswith("lm_head.decoder."), name
        elif np.abs(gradient).max() <= floor * scale:
            assert np.abs(found[name]).max() < 2e-6 * scale, name
        else:
            ours = found[name]
            if padding_idx and ("word_emb" in name or "position_emb" in name):
                ours, gradient = (np.delete(g, config.pad_token_id, 0) for g in (ours, gradient))
            assert_close(ours, gradient, f"gradient of {name}", 1e-5, 2e-4)


@pytest.mark.parametrize("kind", CASES)
def test_parity(kind):
    model, config = CASES[kind]
    batch = case_batch(model, config, kind)
    value, found, gradients, weight = loss_and_gradients(kind)
    theirs = torch_model(model, config, random_params(config, model))
    inputs = {k: torch.from_numpy(v) for k, v in batch.items()}
    inputs = {k: v.double() if v.dtype == torch.float32 else v for k, v in inputs.items()}
    expected = theirs(**inputs, output_hidden_states=True, output_attentions=True, use_cache=False)
    target = expected.get("loss")
    if target is None:
        target = (expected[0] * torch.from_numpy(weight)).sum()
        if model == "base":
            target = target + (expected.pooler_output * torch.from_numpy(weight[:, 0])).sum()
    target.backward()
    assert abs(float(value) - target.item()) < 3e-6 * max(1, abs(target.item()))
    arrays = {
        k: tuple(x.detach() for x in v) if isinstance(v, tuple) else v.detach()
        for k, v in expected.items()
        if k != "loss" and len(v)
    }
    assert_outputs_match(config, batch, found, arrays)
    ladder = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    assert_gradients_match(config, gradients, ladder)


def test_no_counted_label_is_a_loss_of_zero():
    ours = our_model("masked_lm", SMALL)
    params = random_params(SMALL)
    loss = ours([[5, 6, 7]], params=params, labels=[[-100] * 3]).loss
    assert float(loss) == 0.0
    span = our_model("question_answering", SMALL)
    params = random_params(SMALL, "question_answering")
    outside = span([[5, 6, 7]], params=params, start_positions=[-1], end_positions=[3]).loss
    assert float(outside) == 0.0


def test_problem_type_is_decided_anew_by_every_call():
    config = SMALL.replace(num_labels=3)
    ours = our_model("sequence_classification", config)
    params = random_params(config, "sequence_classification")
    for labels in (np.array([1]), np.array([[1.0, 0.0, 1.0]]), np.array([2])):
        assert np.isfinite(float(ours([[5, 6, 7]], params=params, labels=labels).loss))
    assert ours.config.problem_type is None

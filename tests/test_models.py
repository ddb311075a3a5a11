"""Every model against transformers 5's torch class in float64: outputs, streams, attentions, loss
and every gradient, all parameters random, in odd configurations, padded on every side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support import ODD, TINY, assert_close, ragged_batch, random_params

import prelnroberta
from prelnroberta.huggingface import ARCHITECTURES, to_tensors

torch.set_num_threads(1)
SMALL = TINY.replace(vocab_size=60, hidden_size=16, intermediate_size=24, num_attention_heads=2)
TWO_TYPES = SMALL.replace(
    type_vocab_size=2, hidden_act="relu", layer_norm_eps=1e-12, pad_token_id=0, bos_token_id=1
)
DECODER = ODD.replace(is_decoder=True)
CASES = {
    "base": ("base", ODD),
    "base_encoder": ("encoder", TWO_TYPES.replace(hidden_act="silu")),
    "masked_lm": ("masked_lm", SMALL),
    "causal_lm": ("causal_lm", DECODER),
    "cross": ("causal_lm", SMALL.replace(is_decoder=True, add_cross_attention=True)),
    "single_label": ("sequence_classification", ODD.replace(num_labels=5)),
    "regression": ("sequence_classification", TWO_TYPES.replace(num_labels=1)),
    "multi_label": ("sequence_classification", SMALL.replace(num_labels=3)),
    "multiple_choice": ("multiple_choice", TWO_TYPES),
    "token": ("token_classification", ODD.replace(num_labels=7)),
    "span": ("question_answering", SMALL),
}


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
    """Inputs and targets of one case."""
    rng = np.random.default_rng(3)
    batch = ragged_batch(config, L=11)
    labels = batch.pop("labels")
    if model == "multiple_choice":
        return {k: np.stack([v, v[::-1]], 1) for k, v in batch.items()} | {
            "labels": np.array([0, 1, 1, -100, 0])
        }
    if model in ("base", "encoder"):
        return batch
    if kind == "cross":
        batch["encoder_hidden_states"] = rng.standard_normal((5, 6, 16)).astype(np.float32) * 2 + 1
        batch["encoder_attention_mask"] = np.array([[1] * 6, [1, 1, 1, 0, 0, 0]] * 2 + [[1] * 6])
    if model == "causal_lm":
        # A pad sees nothing in a causal row; what it predicts is nobody's concern, and torch
        # sends gradients through its empty softmax.
        labels[:, 1:][batch["attention_mask"][:, :-1] == 0] = -100
    if model == "question_answering":
        return batch | {
            "start_positions": np.array([3, 0, 10, 40, 11]),
            "end_positions": np.array([5, 2, 11, 7, 4]),
        }
    if model == "token_classification":
        labels = np.where(labels == -100, -100, labels % config.num_labels)
    elif kind == "single_label":
        labels = np.array([0, 4, -100, 2, 1])
    elif kind == "multi_label":
        labels = (rng.random((5, 3)) < 0.5).astype(np.float32)
    elif kind == "regression":
        labels = rng.standard_normal(5).astype(np.float32)
    return batch | {"labels": labels}


@pytest.mark.parametrize("kind", CASES)
def test_parity(kind):
    model, config = CASES[kind]
    params, batch = random_params(config, model), case_batch(model, config, kind)
    theirs, ours = torch_model(model, config, params), our_model(model, config)
    inputs = {k: torch.from_numpy(v) for k, v in batch.items()}
    inputs = {k: v.double() if v.dtype == torch.float32 else v for k, v in inputs.items()}
    expected = theirs(**inputs, output_hidden_states=True, output_attentions=True, use_cache=False)
    weight = torch.linspace(-1, 1, expected[0].numel(), dtype=torch.float64).reshape(
        expected[0].shape
    )
    has_loss = model not in ("base", "encoder")
    target = expected.loss if has_loss else (expected[0] * weight).sum()
    if model == "base":
        target = target + (expected.pooler_output**2).sum()
    target.backward()

    def loss(params):
        output = ours(**batch, params=params, output_hidden_states=True, output_attentions=True)
        if has_loss:
            return output.loss, output
        value = (output[0] * jnp.asarray(weight.numpy(), jnp.float32)).sum()
        if model == "base":
            value = value + (output.pooler_output**2).sum()
        return value, output

    (value, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert abs(float(value) - target.item()) < 3e-6 * max(1, abs(target.item()))
    real = batch["attention_mask"] == 1 if config.is_decoder else slice(None)
    wanted = {k: v for k, v in expected.items() if k != "loss" and len(v)}
    assert [k for k in found if k != "loss"] == list(wanted)
    for name, value in wanted.items():
        pairs = zip(found[name], value, strict=True) if isinstance(value, tuple) else None
        for i, (a, b) in enumerate(pairs or [(found[name], value)]):
            a, b = np.asarray(a), b.detach().numpy()
            if "attentions" in name:
                a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
            assert_close(a[real], b[real], f"{name} {i}", 3e-6, 3e-5)
    tensors = to_tensors(gradients, config, model)
    ladder = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    scale = max(np.abs(g).max() for g in ladder.values())
    # Untied, transformers 5 computes with decoder.bias and keeps a dead lm_head.bias beside it.
    moved = {n for n in tensors if np.abs(tensors[n]).max() > 1e-6 * scale}
    assert moved - {"lm_head.bias"} <= set(ladder)
    for name, gradient in ladder.items():
        if name.endswith("self.key.bias"):
            assert np.abs(tensors[name]).max() < 2e-6 * scale, name
        elif name in tensors and np.abs(gradient).max() > 1e-9 * scale:
            found = tensors[name]
            if "word_emb" in name or "position_emb" in name:
                # torch stops the gradient of the lookup at the pad row, Flax did not.
                found, gradient = (np.delete(g, config.pad_token_id, 0) for g in (found, gradient))
            assert_close(found, gradient, f"gradient of {name}", 1e-5, 2e-4)


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

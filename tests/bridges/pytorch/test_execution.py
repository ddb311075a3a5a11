"""Ways to run the PyTorch twins: skipped padding, gradient checkpointing, compilation, export,
half precision and training next to Flax compute the same."""

import jax
import numpy as np
import optax
import pytest
import torch

from prelnroberta import InputError
from tests.helpers.model_cases import MODEL_CASES, case_batch
from tests.helpers.pytorch_models import paired_outputs, scalar_target, to_torch, twin
from tests.helpers.small_models import (
    ODD,
    SMALL,
    TINY,
    flax_model,
    ragged_batch,
    random_params,
    with_tokens,
)
from tests.helpers.tolerances import assert_close, rms_relative
from tests.helpers.torch_reference import transformers_model

pytestmark = [pytest.mark.torch, pytest.mark.oracle]

torch.set_num_threads(1)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# Skipped padding.

# Those that read a row at its first position want it there.
READS_FIRST = {"base", "sequence_classification", "multiple_choice"}


def skipping_case(kind):
    """A batch whose labels count at real positions alone; rows that begin where they must."""
    model, config = MODEL_CASES[kind]
    batch = with_tokens(case_batch(model, config, kind))
    if model in READS_FIRST:
        batch["attention_mask"][..., 0] = 1
    elif model in ("masked_lm", "token_classification"):
        batch["labels"] = np.where(batch["attention_mask"] == 1, batch["labels"], -100)
    elif model == "question_answering":
        del batch["start_positions"], batch["end_positions"]
    return model, config, to_torch(batch, torch.float64)


@pytest.mark.parametrize("kind", [kind for kind in MODEL_CASES if kind != "cross"])
def test_skip_padding_matches_at_real_tokens(kind):
    """float64: outputs, streams and every gradient the same; zero where nothing was computed."""
    model, config, batch = skipping_case(kind)
    ours = twin(model, config).double()
    real = batch["attention_mask"] == 1
    real = real.flatten(0, -2)
    results = []
    for skip in (False, True):
        ours.zero_grad()
        output = ours(**batch, skip_padding=skip, use_cache=False)
        first = output.get("start_logits" if model == "question_answering" else "logits", output[0])
        of_tokens = first.shape[:2] == real.shape
        if output.get("loss") is None:
            ((first[real] if of_tokens else first) ** 2).sum().backward()
        else:
            output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
        streams = ours(
            **batch, skip_padding=skip, use_cache=False, output_hidden_states=True
        ).hidden_states
        results.append((output, first, gradients, streams))
        if skip and of_tokens and model != "question_answering":
            assert (first[~real] == 0).all()
    (a, x, g, s), (b, y, h, t) = results
    if "loss" in a:
        assert abs(a.loss.item() - b.loss.item()) < 1e-12
    x, y = (z[real] if of_tokens else z for z in (x, y))
    assert_close(y.detach(), x.detach(), "output", 1e-13, 1e-12)
    for n, (u, v) in enumerate(zip(s, t, strict=True)):
        assert_close(v[real].detach(), u[real].detach(), f"stream {n}", 1e-13, 1e-12)
    assert g.keys() == h.keys()
    for name in g:
        assert torch.allclose(h[name], g[name], rtol=1e-9, atol=1e-12), name


def test_skip_padding_trains_with_dropout_and_gradient_checkpointing():
    ours = twin("masked_lm", ODD).train()
    ours.gradient_checkpointing_enable()
    ours(**to_torch(ragged_batch(ODD)), skip_padding=True).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


def test_skip_padding_without_padding_matches_plain_forward():
    ours, ids = twin("masked_lm", SMALL), torch.tensor([[0, 5, 6, 2]])
    for mask in (None, torch.ones_like(ids)):
        assert torch.equal(ours(ids, mask, skip_padding=True).logits, ours(ids, mask).logits)


def test_skip_padding_raises_where_unsupported():
    ids, mask = torch.tensor([[1, 5, 6, 2]]), torch.tensor([[0, 1, 1, 1]])
    decoder = SMALL.replace(is_decoder=True)
    for model, config, more, message in (
        ("masked_lm", SMALL, {"output_attentions": True}, "attentions"),
        ("masked_lm", SMALL, {"head_mask": torch.ones(2)}, "head_mask"),
        ("causal_lm", decoder, {"use_cache": True}, "a cache"),
        ("masked_lm", SMALL, {"attention_mask": torch.eye(4)[None]}, "3 axes"),
        ("sequence_classification", SMALL, {}, "begins with padding"),
        ("sequence_classification", SMALL, {"output_hidden_states": True}, "begins with padding"),
        (
            "question_answering",
            SMALL,
            {"start_positions": ids[:, 1], "end_positions": ids[:, 1]},
            "loss of a span",
        ),
    ):
        given = {"input_ids": ids, "attention_mask": mask, "skip_padding": True, **more}
        with pytest.raises(InputError, match=message):
            twin(model, config)(**given)


# Training.


def test_gradient_checkpointing_matches_gradients():
    """With dropout as well: the same bits are drawn again."""
    ours, batch = twin("masked_lm", ODD).train(), to_torch(ragged_batch(ODD))
    found = []
    for on in (False, True):
        (ours.gradient_checkpointing_enable if on else ours.gradient_checkpointing_disable)()
        ours.zero_grad()
        torch.manual_seed(0)
        ours(**batch).loss.backward()
        found.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradient_checkpointing_stores_less_memory():
    """By what autograd keeps for the backward pass."""
    ours, batch = twin("masked_lm", TINY.replace(num_hidden_layers=6)), to_torch(ragged_batch(TINY))
    sizes = []
    for on in (False, True):
        (ours.gradient_checkpointing_enable if on else ours.gradient_checkpointing_disable)()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: (kept.append(x.numel()), x)[1], lambda x: x
        ):
            ours(**batch).loss.backward()
        sizes.append(sum(kept))
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("rate", ["hidden", "attention_probs", "classifier"])
@pytest.mark.parametrize("options", [{}, {"skip_padding": True}, {"output_attentions": True}])
def test_every_dropout_applies_in_training_only(rate, options):
    """In whichever way attention is computed."""
    zero = {**NO_DROPOUT, "classifier_dropout": 0.0}
    name = rate + "_dropout" * (rate == "classifier") + "_dropout_prob" * (rate != "classifier")
    batch = to_torch(ragged_batch(SMALL))
    del batch["labels"]
    still = twin("token_classification", SMALL.replace(**zero)).train()
    expected = still.eval()(**batch, **options).logits.detach()
    assert torch.equal(still.train()(**batch, **options).logits, expected)

    ours = twin("token_classification", SMALL.replace(**{**zero, name: 0.4}))
    assert torch.equal(ours(**batch, **options).logits, expected)
    ours.train()
    torch.manual_seed(0)
    first, second = (ours(**batch, **options).logits for _ in range(2))
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(ours(**batch, **options).logits, first)


@pytest.mark.parametrize("kind", ["masked_lm", "single_label"])
def test_fine_tuning_matches_flax(kind):
    """20 steps of the same AdamW on the same batch: the same losses to 1e-4."""
    model, config = MODEL_CASES[kind]
    config = config.replace(**NO_DROPOUT)
    params, batch = (
        random_params(config, model, scale=0.1),
        with_tokens(case_batch(model, config, kind)),
    )
    flax = flax_model(model, config)
    optimizer = optax.adamw(3e-3, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01)

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(lambda p: flax(**batch, params=p).loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    ours = twin(model, config, params).train()
    adamw = torch.optim.AdamW(ours.parameters(), 3e-3, (0.9, 0.98), 1e-6, 0.01)
    state, losses = optimizer.init(params), []
    for _ in range(20):
        params, state, expected = step(params, state)
        loss = ours(**to_torch(batch)).loss
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append((loss.item(), float(expected)))
    losses = np.array(losses)
    assert losses[-1, 0] < 0.7 * losses[0, 0]
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], atol=1e-4)


# Half precision.


@pytest.mark.parametrize("kind", ["masked_lm", "single_label", "span"])
def test_bfloat16_error_is_within_error_of_transformers(kind):
    """Errors against float64, over models enough that luck does not decide."""
    model, config = MODEL_CASES[kind]
    batch = with_tokens(case_batch(model, config, kind))
    inputs = to_torch({k: v for k, v in batch.items() if k[:5] not in ("label", "start", "end_p")})
    errors = []
    for seed in range(8):
        params = random_params(config, model, seed)
        theirs = transformers_model(model, config, params)
        with torch.no_grad():
            exact = theirs(**inputs)[0].numpy()
            theirs = theirs.bfloat16()(**inputs)[0].float().numpy()
            found = twin(model, config, params).bfloat16()(**inputs)[0]
        assert found.dtype == torch.bfloat16
        errors.append((rms_relative(found.float(), exact), rms_relative(theirs, exact)))
    ours, theirs = np.square(errors).mean(0) ** 0.5
    assert ours <= 1.1 * theirs, (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_losses_in_float32(dtype):
    """And stays finite for rows that see nothing; gradients too."""
    batch = to_torch(ragged_batch(SMALL))
    batch["attention_mask"][1] = 0
    for asked in ({}, {"output_attentions": True}):
        ours = twin("masked_lm", SMALL, random_params(SMALL, scale=0.1)).to(dtype)
        output = ours(**batch, **asked)
        assert output.loss.dtype == torch.float32 and output.logits.dtype == dtype
        output.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


@pytest.mark.parametrize("skip", [False, True])
def test_autocast(skip):
    """bfloat16 products over float32 parameters, with rows that see nothing."""
    batch = to_torch(ragged_batch(ODD))
    batch["attention_mask"][1] = 0
    batch["labels"][1] = -100
    ours = twin("masked_lm", ODD, random_params(ODD, scale=0.1))
    exact = ours(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(**batch, skip_padding=skip)
    found.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())
    seen = batch["attention_mask"] == 1 if skip else slice(None)
    assert rms_relative(found.logits[seen].detach().float(), exact.logits[seen].detach()) < 2e-2


def test_per_example_gradients():
    """torch.func: vmap over grad of a functional call."""
    ours, batch = twin("masked_lm", SMALL), to_torch(ragged_batch(SMALL))
    batch["labels"][:, 0] = 5
    params = dict(ours.named_parameters())

    def loss(params, row):
        given = {name: value[None] for name, value in row.items()}
        return torch.func.functional_call(ours, params, (), given).loss

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, batch)
    for n in range(5):
        ours.zero_grad()
        ours(**{name: value[n : n + 1] for name, value in batch.items()}).loss.backward()
        for name, parameter in ours.named_parameters():
            assert torch.allclose(found[name][n], parameter.grad, rtol=1e-3, atol=1e-5), name


# Compiled and exported.


def test_torch_compile_uses_one_graph_for_all_shapes():
    """Traced without a break, with dynamic shapes, labels and gradients; compiled by no one."""
    ours = twin("masked_lm", SMALL)
    shapes = []

    def backend(graph, _):
        shapes.append(graph)
        return graph.forward

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for L in (16, 11):
        batch = to_torch(ragged_batch(SMALL, L=L))
        output = compiled(**batch)
        for name, a, b in paired_outputs(output, ours(**batch)):
            assert_close(a, b, name)
        scalar_target(output).backward()
    assert len(shapes) == 1


@pytest.mark.slow
def test_inductor_matches_eager():
    """C++ of its own, forward and backward."""
    ours, batch = twin("sequence_classification", SMALL), ragged_batch(SMALL)
    del batch["labels"]
    batch = to_torch(batch) | {"labels": torch.tensor([0, 1, 0, -100, 1])}
    output = torch.compile(ours, fullgraph=True)(**batch)
    output.loss.backward()
    gradients = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    expected = ours(**batch)
    expected.loss.backward()
    for name, a, b in paired_outputs(output, expected):
        assert_close(a, b, name)
    for found, parameter in zip(gradients, ours.parameters(), strict=True):
        assert torch.allclose(found, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["base", "masked_lm", "causal_lm", "multiple_choice"])
def test_torch_export_with_dynamic_batch_and_length(kind, tmp_path):
    model, config = MODEL_CASES[kind]
    ours = twin(model, config)
    choices = model == "multiple_choice"

    def batch_of(B, L):
        rng = np.random.default_rng(0)
        shape = (B, 2, L) if choices else (B, L)
        ids = torch.from_numpy(rng.integers(4, config.vocab_size, shape))
        mask = torch.ones_like(ids)
        mask[..., -1:, L // 2 + 1 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}

    B, L = torch.export.Dim("B"), torch.export.Dim("L", max=config.max_length)
    axes = {0: B, 2: L} if choices else {0: B, 1: L}
    batch = batch_of(3, 8)
    program = torch.export.export(
        ours, (), batch, dynamic_shapes=dict.fromkeys(batch, axes), strict=False
    )
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for size in ((3, 8), (1, 1), (5, config.max_length - 1), (2, config.max_length)):
        batch = batch_of(*size)
        for name, a, b in paired_outputs(again(**batch), ours(**batch)):
            assert_close(a, b, name)

"""Every model against transformers 5's torch class in float64: outputs, streams, attentions, loss
and every gradient, all parameters random, in odd configurations. Rows are as long as the position
table allows, padded on every side, of one token, and all padding."""

import numpy as np
import pytest
import torch

from tests.helpers.model_cases import MODEL_CASES, case_batch, flax_loss_and_gradients
from tests.helpers.small_models import SMALL, flax_model, random_params
from tests.helpers.tolerances import assert_gradients_match, assert_outputs_match
from tests.helpers.torch_reference import transformers_model


@pytest.mark.parametrize("kind", MODEL_CASES)
def test_parity(kind):
    model, config = MODEL_CASES[kind]
    batch = case_batch(model, config, kind)
    value, found, gradients, weight = flax_loss_and_gradients(kind)
    theirs = transformers_model(model, config, random_params(config, model))
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
    ours = flax_model("masked_lm", SMALL)
    params = random_params(SMALL)
    loss = ours([[5, 6, 7]], params=params, labels=[[-100] * 3]).loss
    assert float(loss) == 0.0
    span = flax_model("question_answering", SMALL)
    params = random_params(SMALL, "question_answering")
    outside = span([[5, 6, 7]], params=params, start_positions=[-1], end_positions=[3]).loss
    assert float(outside) == 0.0


def test_problem_type_is_decided_anew_by_every_call():
    config = SMALL.replace(num_labels=3)
    ours = flax_model("sequence_classification", config)
    params = random_params(config, "sequence_classification")
    for labels in (np.array([1]), np.array([[1.0, 0.0, 1.0]]), np.array([2])):
        assert np.isfinite(float(ours([[5, 6, 7]], params=params, labels=labels).loss))
    assert ours.config.problem_type is None

"""Every model against transformers 5's torch class in float64: outputs, streams, attentions, loss
and every gradient, all parameters random, in odd configurations. Rows are as long as the position
table allows, padded on every side, of one token, and all padding."""

import pytest
import torch

from tests.helpers.model_cases import MODEL_CASES, case_batch, flax_loss_and_gradients
from tests.helpers.small_models import random_params
from tests.helpers.tolerances import assert_gradients_match, assert_outputs_match
from tests.helpers.torch_reference import transformers_model

pytestmark = [pytest.mark.torch, pytest.mark.oracle]


@pytest.mark.parametrize("kind", MODEL_CASES)
def test_outputs_loss_and_gradients_match_torch(kind):
    model, config = MODEL_CASES[kind]
    batch = case_batch(model, config, kind)
    value, found, gradients, weight = flax_loss_and_gradients(kind, model, config)
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

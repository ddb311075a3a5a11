"""Every model against transformers 5's torch class in float64: outputs, streams, attentions, loss
and every gradient, all parameters random, in odd configurations. Rows are as long as the position
table allows, padded on every side, of one token, and all padding."""

import numpy as np

from tests.helpers.small_models import SMALL, flax_model, random_params


def test_loss_without_counted_labels_is_zero():
    ours = flax_model("masked_lm", SMALL)
    params = random_params(SMALL)
    loss = ours([[5, 6, 7]], params=params, labels=[[-100] * 3]).loss
    assert float(loss) == 0.0
    span = flax_model("question_answering", SMALL)
    params = random_params(SMALL, "question_answering")
    outside = span([[5, 6, 7]], params=params, start_positions=[-1], end_positions=[3]).loss
    assert float(outside) == 0.0


def test_problem_type_is_inferred_by_each_call():
    config = SMALL.replace(num_labels=3)
    ours = flax_model("sequence_classification", config)
    params = random_params(config, "sequence_classification")
    for labels in (np.array([1]), np.array([[1.0, 0.0, 1.0]]), np.array([2])):
        assert np.isfinite(float(ours([[5, 6, 7]], params=params, labels=labels).loss))
    assert ours.config.problem_type is None

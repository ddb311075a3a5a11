"""Features of choices, against transformers on random texts."""

import numpy as np
import pytest

from prelnroberta.config import IGNORE_INDEX
from prelnroberta.data.features.multiple_choice import choice_features, mask_missing_choices
from prelnroberta.data.readers.swag import ChoiceExample
from prelnroberta.data.tokenizer import PAD_ID
from tests.helpers.random_texts import assert_same_ids, random_text


@pytest.mark.oracle
def test_choices_match_transformers(tokenizer, theirs):
    rng = np.random.default_rng(4)
    given = [
        ChoiceExample(
            f"f:{i}",
            random_text(rng, 8),
            rng.choice(["", "He"]),
            [random_text(rng, 6) for _ in range(int(rng.integers(2, 6)))],
            1,
        )
        for i in range(300)
    ]
    features = choice_features(given, tokenizer, 40)
    firsts = [e.context for e in given for _ in e.choices]
    seconds = [f"{e.prefix} {c}" if e.prefix else c for e in given for c in e.choices]
    expected = iter(theirs(firsts, seconds, truncation=True, max_length=40)["input_ids"])
    for rows, example in zip(features.input_ids, given, strict=True):
        assert_same_ids(rows, [next(expected) for _ in example.choices])
    assert features.num_choices == 5 and features.num_truncated > 0

    batch = features.batch(np.array([0, -1, 7]), 40)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 5, 40)
    sizes = batch["choice_mask"].sum(axis=1).tolist()
    assert sizes == [len(given[0].choices), 0, len(given[7].choices)]
    assert batch["labels"].tolist() == [1, IGNORE_INDEX, 1] and batch["labels"].dtype == np.int32
    for i, index in ((0, 0), (2, 7)):
        for c, ids in enumerate(features.input_ids[index]):
            np.testing.assert_array_equal(batch["input_ids"][i, c, : len(ids)], ids)
            assert (batch["input_ids"][i, c, len(ids) :] == PAD_ID).all()
    assert (batch["attention_mask"][~batch["choice_mask"]] == 0).all()


def test_masked_choices_are_never_predicted_and_losses_stay_finite():
    import jax
    import jax.numpy as jnp

    from prelnroberta.model.losses import label_scores

    mask = np.array([[True, True, False], [True] * 3, [False] * 3])
    logits = np.array([[-5.0, -4.0, 9.0], [1.0, 2.0, 0.0], [3.0, 1.0, 2.0]], np.float32)
    masked = mask_missing_choices(logits, mask)
    assert masked.argmax(axis=1)[:2].tolist() == [1, 1]

    def loss(x):
        return label_scores(
            mask_missing_choices(x, jnp.asarray(mask)), jnp.array([1, 0, IGNORE_INDEX])
        ).loss

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    two = label_scores(jnp.asarray(logits[:1, :2]), jnp.array([1])).loss
    three = label_scores(jnp.asarray(logits[1:2]), jnp.array([0])).loss
    assert float(value) == pytest.approx(float(two + three))
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[~mask] == 0).all()

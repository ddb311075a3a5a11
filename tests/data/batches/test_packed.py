"""Packed fine-tuning: every token once, deterministic order, the losses of padded examples."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tasks import TASKS, TaskSettings
from prelnroberta.config import IGNORE_INDEX, MULTI_LABEL, REGRESSION
from prelnroberta.data.batches.packed import PackedBatches
from prelnroberta.data.features.base import Features
from prelnroberta.data.readers.classification import TextExample
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.data.readers.swag import ChoiceExample
from prelnroberta.errors import InputError
from prelnroberta.model import heads, losses
from tests.helpers.small_models import TINY, random_params
from tests.helpers.task_files import corpus, example_file


class Rows(Features):
    """Example i is made of tokens 10 + i, and its label is i."""

    lengths = np.array([], int)

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths, int)

    def batch(self, indices, length):
        inside = np.arange(length) < self.lengths[indices, None]
        return {
            "input_ids": np.where(inside, 10 + indices[:, None], 1).astype(np.int32),
            "attention_mask": inside.astype(np.int32),
            "labels": indices.astype(np.int32),
            "weights": np.ones(len(indices), np.float32),
        }


def ragged(n, seed=0):
    return Rows(np.random.default_rng(seed).geometric(0.05, n).clip(2, 120))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 3))
def test_batch_holds_every_token_once(lengths, B, multiple):
    features = Rows(lengths)
    loader = PackedBatches(features, B, 0, steps=8, multiple=multiple, pool=2)
    assert loader.num_rows % multiple == 0
    for step in range(8):
        indices, batch = loader.indices(step), loader.batch(step)
        assert batch["input_ids"].shape == (loader.num_rows, loader.length)
        count, tokens = np.unique(batch["input_ids"][batch["segment_ids"] > 0], return_counts=True)
        expected = sorted((10 + i, lengths[i]) for i in indices)
        assert list(zip(count.tolist(), tokens.tolist(), strict=True)) == expected
        rows, slots = np.nonzero(batch["weights"])
        assert sorted(batch["labels"][rows, slots].tolist()) == sorted(indices.tolist())
        assert (batch["labels"][batch["weights"] == 0] == IGNORE_INDEX).all()
        for row, slot in zip(rows, slots, strict=True):
            begin, label = batch["read_positions"][row, slot], batch["labels"][row, slot]
            its = np.s_[row, begin : begin + lengths[label]]
            assert (batch["input_ids"][its] == 10 + label).all()
            assert (batch["segment_ids"][its] == slot + 1).all()
            assert (batch["position_ids"][its] == 2 + np.arange(lengths[label])).all()


@pytest.mark.parametrize("pool", [1, 3, 50])
@pytest.mark.parametrize("n", [1, 7, 64, 101])
def test_epoch_holds_every_example_once(n, pool):
    loader = PackedBatches(ragged(n), 8, seed=5, steps=3 * -(-n // 8), pool=pool)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        seen = [loader.indices(step).tolist() for step in steps]
        assert sorted(i for indices in seen for i in indices) == list(range(n))
        assert max(map(len, seen)) <= 8
        epochs.append(seen)
    if n > 7:
        assert epochs[0] != epochs[1] != epochs[2]


def test_batch_depends_only_on_seed_and_step():
    features = ragged(203)

    def loader(seed):
        return PackedBatches(features, 8, seed, 60, pool=4)

    first = loader(1)
    through = [first.batch(step) for step in range(60)]
    for step in (37, 5, 59):  # a resumed run begins anywhere
        for name, array in loader(1).batch(step).items():
            np.testing.assert_array_equal(array, through[step][name])
    assert any(set(loader(2).indices(s)) != set(first.indices(s)) for s in range(60))
    with loader(1).prefetch(37) as ahead:
        for step in range(37, 42):
            np.testing.assert_array_equal(next(ahead)["labels"], through[step]["labels"])


def test_host_rows_partition_a_batch():
    loader = PackedBatches(ragged(61), 8, 0, 20, multiple=4, pool=2)
    for step in range(20):
        whole = loader.batch(step)
        hosts = np.arange(loader.num_rows).reshape(2, -1)
        parts = [loader.batch(step, rows) for rows in hosts]
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_pools_fill_rows_and_keep_shuffling():
    features = ragged(2000)
    loader, plain = (PackedBatches(features, 16, 0, 250, pool=pool) for pool in (50, 1))
    assert loader.fill_ratio > 0.8 > 0.6 > plain.fill_ratio
    filled = [(loader.batch(step)["segment_ids"] > 0).mean() for step in range(125)]
    np.testing.assert_allclose(loader.fill_ratio, np.mean(filled), rtol=1e-6)
    assert min(filled) > 0.7, "no step has much less to do than others"
    # A pool is a random draw: the first holds examples from all over the file.
    first = np.concatenate([loader.indices(step) for step in range(50)])
    assert first.min() < 50 and first.max() > 1950
    # And which of its batches holds the longest is another's luck in each pool.
    longest = [features.lengths[loader.indices(step)].max() for step in range(200)]
    assert len({int(np.argmax(longest[at : at + 50])) for at in range(0, 200, 50)}) > 2


def test_unplanned_batches_and_bad_arguments_raise():
    loader = PackedBatches(Rows([8] * 30 + [60] * 8), 8, 0, steps=1, pool=1)
    with pytest.raises(InputError, match=r"step \d+: needs \d+ rows, planned were \d"):
        [loader.batch(step) for step in range(40)]
    for change in ({"batch_size": 0}, {"seed": -1}, {"pool": 0}, {"steps": 0}):
        with pytest.raises(InputError):
            PackedBatches(ragged(10), **({"batch_size": 2, "seed": 0, "steps": 3} | change))
    with pytest.raises(InputError, match="no examples to train on"):
        PackedBatches(Rows([]), 2, 0, 1)


def learned(name):
    """A task with features to train on, and the sort of what it learns, if there are several."""
    name, _, sort = name.partition(" ")
    rng = np.random.default_rng(2)
    texts = [" ".join(["word"] * n) for n in rng.integers(1, 30, 40)]
    settings = TaskSettings(
        task=name, max_length=96, problem_type=sort or TaskSettings.problem_type
    )
    task, bad = TASKS[name](settings), RowErrors()
    if sort == REGRESSION:
        examples = [TextExample("f", text, None, float(len(text))) for text in texts]
    elif sort == MULTI_LABEL:
        examples = [
            TextExample("f", text, None, ["a", "b", "c"][: len(text) % 4]) for text in texts
        ]
    elif name == "multiple_choice":
        choices = [texts[i : i + 2 + i % 3] for i in range(30)]  # 2 to 4 of them
        examples = [ChoiceExample("f", "some context", "", found, 1) for found in choices]
    else:
        examples = task.read_examples(example_file(name), True, bad)
    task = TASKS[name](task.infer_settings(examples))
    return task, task.features(examples, corpus()[2], bad)


KINDS = [
    "sequence_classification",
    f"sequence_classification {REGRESSION}",
    f"sequence_classification {MULTI_LABEL}",
    "token_classification",
    "question_answering",
    "multiple_choice",
    "causal_lm",
]


@pytest.mark.parametrize(
    "settings", [losses.DEFAULT_LOSS, losses.LossSettings(label_smoothing=0.2)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_losses_and_gradients_match_padded_examples(kind, settings):
    task, features = learned(kind)
    config = task.model_config(TINY.replace(vocab_size=600, is_decoder=task.model == "causal_lm"))
    params = random_params(config, task.model, scale=0.1)
    module = heads.MODULES[task.model](config)
    loader = task.training_batches(features, 11, 3, 6, 1)

    @jax.jit
    def sums(params, batch):
        def loss(params):
            logits = task.logits(module, params, batch)
            scores = task.loss(config, logits, batch, settings)
            return scores.loss, scores

        return jax.grad(loss, has_aux=True)(params)

    full = "question_answering", "causal_lm"  # windows and blocks: most fill a row each
    assert loader.num_rows < 11 or kind in full
    for step in (0, 5):
        indices = loader.indices(step)
        packed = sums(params, loader.batch(step))
        padded = sums(params, features.batch(indices, int(features.lengths.max())))
        assert packed[1].weight == padded[1].weight > 0
        assert packed[1].correct == padded[1].correct
        np.testing.assert_allclose(packed[1].loss, padded[1].loss, rtol=2e-6)
        for found, expected in zip(*map(jax.tree.leaves, (packed[0], padded[0])), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max() + 1e-5)

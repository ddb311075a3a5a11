"""The fast start: heads that attend to neighbours, and a loss that falls early."""

import functools

import jax
import numpy as np
import pytest

from prelnroberta import params as parameters
from prelnroberta.data.pretraining.loader import Loader
from prelnroberta.data.pretraining.masking import Masking
from prelnroberta.data.pretraining.packing import Row
from prelnroberta.errors import InputError
from prelnroberta.metrics.unigram_baseline import UnigramBaseline
from prelnroberta.model.encoder import embeddings
from prelnroberta.model.heads import MaskedLM
from prelnroberta.model.layers import layer_norm, project
from prelnroberta.model.losses import masked_lm_scores
from prelnroberta.training.fast_start_init import check_length, fast_start
from prelnroberta.training.optimizer import OptimizerConfig, adamw
from prelnroberta.training.train_step import TrainState, make_train_step
from tests.helpers.small_models import TINY

CONFIG = TINY.replace(
    vocab_size=64,
    hidden_size=64,
    num_attention_heads=4,
    intermediate_size=128,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
L = 32


@pytest.fixture(scope="module")
def started():
    log_frequencies = np.log(np.arange(1, 65) / np.arange(1, 65).sum())
    log_frequencies[:4] = -np.inf
    plain = parameters.init(CONFIG, jax.random.key(0))
    return fast_start(plain, CONFIG, log_frequencies)


def test_fast_start_keeps_the_parameter_tree(started):
    parameters.check(started, CONFIG)
    bias = started["lm_head"]["bias"]
    assert np.isfinite(bias).all() and float(bias[0]) == float(bias.min())
    assert (np.asarray(started["embeddings"]["position"])[CONFIG.pad_token_id] == 0).all()


def test_first_layer_heads_attend_to_neighbours(started):
    ids = np.random.default_rng(0).integers(4, 63, (8, L))
    words, positions = started["embeddings"]["word"][ids], np.tile(np.arange(2, L + 2), (8, 1))
    x = embeddings(started["embeddings"], CONFIG, np.float32, words, None, positions, None)
    layer = jax.tree.map(lambda leaf: leaf[0], started["encoder"]["layers"])
    x = layer_norm(layer["attention_norm"], x, CONFIG.layer_norm_eps)
    q = project(layer["attention"]["query"], "bld,dhk->blhk", x)
    k = project(layer["attention"]["key"], "bld,dhk->blhk", x)
    weights = jax.nn.softmax(np.einsum("bqhk,blhk->bhql", q, k) / CONFIG.head_dim**0.5)
    for head, offset in enumerate((-1, 1, -2, 2)):
        inside = np.arange(2, L - 2)
        assert weights[:, head, inside, inside + offset].mean() > 0.9, offset


def test_rows_too_long_for_the_sinusoids_raise():
    check_length(CONFIG, 32)
    with pytest.raises(InputError, match=r"distinguish 32 positions, but rows have 33"):
        check_length(CONFIG, 33)


class Chains:
    """Rows in which each token follows from the one before: order is all there is to learn."""

    fill = 1.0

    def __init__(self, rows: int = 512):
        rng = np.random.default_rng(0)
        successor = rng.permutation(np.arange(4, 63))
        tokens = np.empty((rows, L), np.int32)
        tokens[:, 0] = rng.integers(4, 63, rows)
        for i in range(1, L):
            jump = rng.random(rows) < 0.1
            tokens[:, i] = np.where(
                jump, rng.integers(4, 63, rows), successor[tokens[:, i - 1] - 4]
            )
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Row:
        positions = np.arange(2, L + 2, dtype=np.int32)
        return Row(self.tokens[index].copy(), np.ones(L, np.int32), positions)


def loss_after(steps: int, params: parameters.Tree, rows: Chains) -> float:
    settings = OptimizerConfig(steps=steps, learning_rate=3e-3, warmup_steps=10, clip_norm=1.0)
    optimizer, module = adamw(settings, CONFIG), MaskedLM(CONFIG)
    masking = Masking(CONFIG.vocab_size, rate=0.4, mask=1.0, random=0.0, keep=0.0)
    loader = Loader(rows, masking, batch_size=16, seed=0)
    score = functools.partial(masked_lm_scores, module)
    step = jax.jit(make_train_step(score, optimizer, seed=0), donate_argnums=0)
    state = TrainState.create(params, optimizer)
    for number in range(steps):
        if number == steps - 10:
            state = state.reset_window()
        state, _ = step(state, loader.batch(number))
    return float(state.window.loss / state.window.weight)


def test_fast_start_leaves_the_unigram_plateau():
    rows = Chains()
    baseline = UnigramBaseline(np.bincount(rows.tokens.ravel(), minlength=64), (0, 1, 2, 3, 63))
    labels = rows.tokens
    unigram = baseline.scores(labels, np.ones(labels.shape))
    plateau = float(unigram.loss / unigram.weight)

    def plain() -> parameters.Tree:
        return parameters.init(CONFIG, jax.random.key(1))

    quick = fast_start(plain(), CONFIG, baseline.log_probabilities)
    assert loss_after(80, quick, rows) < plateau - 0.5
    assert loss_after(80, plain(), rows) > plateau - 0.2

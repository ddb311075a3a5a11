"""200 steps on real data against transformers' own torch models under torch's own AdamW.

Same initial weights, same batches, no dropout, for each task: losses agree step by step. Data is
what `experiments.example_data` makes, from three packages' documentation.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from task_support import corpus, example_file

from experiments.tasks import TASKS, TaskSettings
from prelnroberta import heads
from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.data.bad_rows import BadRows
from prelnroberta.data.bucketing import bucket_lengths
from prelnroberta.huggingface import ARCHITECTURES, save_pretrained
from prelnroberta.optimizer import Optimization, adamw, learning_rate
from prelnroberta.train import TrainState, train_step

STEPS, B, L = 200, 8, 48
SETTINGS = Optimization(
    steps=STEPS, learning_rate=1e-3, warmup_steps=20, weight_decay=0.1, clip_norm=1.0
)


def prepared(name):
    """The task with what its file decides, its features, a config and initial values."""
    _, _, tokenizer = corpus()
    task, bad = TASKS[name](TaskSettings(task=name, max_length=L)), BadRows()
    examples = task.read(example_file(name), True, bad)
    task = TASKS[name](task.settled(examples))
    features = task.features(examples, tokenizer, bad, training=True)
    bad.settle()
    config = task.configure(
        RobertaPreLayerNormConfig.preset(
            "tiny",
            vocab_size=tokenizer.get_vocab_size(),
            initializer_range=0.1,  # or a pooled head takes longer than this to begin
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    return task, features, config, parameters.init(config, jax.random.key(3), task.model)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def our_losses(task, features, config, params, batches):
    module = heads.MODULES[task.model](config)

    def score(params, batch, key):
        return task.loss(config, task.logits(module, params, batch, None), batch, heads.PLAIN)

    optimizer = adamw(SETTINGS, config, task.model)
    step = jax.jit(train_step(score, optimizer, seed=0), donate_argnums=0)
    state, losses = TrainState.create(jax.tree.map(np.array, params), optimizer), []
    for batch in batches:
        state, scores = step(state, batch)
        losses.append(scores.mean)
    return np.array(jax.device_get(losses))


def torch_inputs(batch):
    """The same batch by transformers' names; rows that fill up are left out."""
    real = batch["weights"] > 0 if "weights" in batch else np.ones(len(batch["input_ids"]), bool)
    named = {"input_ids": batch["input_ids"][real]}
    named["attention_mask"] = (named["input_ids"] != 1).astype(np.int64)
    if "masked_labels" in batch:
        labels = np.full_like(batch["input_ids"], heads.IGNORE)
        rows, slots = np.nonzero(batch["masked_weights"])
        labels[rows, batch["masked_positions"][rows, slots]] = batch["masked_labels"][rows, slots]
        named["labels"] = labels
    for name in ("labels", "start_positions", "end_positions"):
        if name in batch:
            named[name] = batch[name][real]
    return {name: torch.tensor(value.astype(np.int64)) for name, value in named.items()}


def torch_losses(task, config, params, batches, folder):
    folder = folder / f"{task.model}-model"
    save_pretrained(folder, jax.tree.map(np.asarray, params), config, task.model)
    model = getattr(transformers, ARCHITECTURES[task.model]).from_pretrained(folder)
    model.train()  # without dropout it is the same function
    for table in model.modules():
        # Answers are sought at pads, too; torch alone stops the gradients of their vectors.
        if isinstance(table, torch.nn.Embedding):
            table.padding_idx = None
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    s = dataclasses.asdict(SETTINGS)
    betas, rate = (s["adam_beta1"], s["adam_beta2"]), learning_rate(SETTINGS)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=s["adam_epsilon"])
    losses = []
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(number))
        loss = model(**torch_inputs(batch)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_loss_curve_is_torchs(name, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    task, features, config, params = prepared(name)
    loader = task.batches(features, B, 5, bucket_lengths(features.lengths, 2))
    batches = [loader.batch(step) for step in range(STEPS)]
    theirs = torch_losses(task, config, params, batches, folder)
    ours = our_losses(task, features, config, params, batches)
    print(name, np.abs(ours - theirs).max(), theirs[:5].mean(), theirs[-20:].mean())
    # The largest difference measured, of any step and task, is 3e-6.
    np.testing.assert_allclose(ours, theirs, atol=5e-5)
    assert theirs[-20:].mean() < theirs[:5].mean() - 0.005, "nothing was learned"

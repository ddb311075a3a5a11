"""Fine-tuning in JAX and, on the same batches, of transformers' torch models by torch's AdamW."""

import dataclasses

import jax
import numpy as np
import torch
import transformers

from experiments.tasks import TASKS, TaskSettings
from prelnroberta import params as parameters
from prelnroberta.config import ARCHITECTURES, IGNORE_INDEX, RobertaPreLayerNormConfig
from prelnroberta.data.batches.packed import PackedBatches
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.model import heads
from prelnroberta.model.losses import DEFAULT_LOSS
from prelnroberta.pretrained.hf_checkpoint import load_pretrained, save_pretrained
from prelnroberta.training.optimizer import OptimizerConfig, adamw, learning_rate_schedule
from prelnroberta.training.train_step import TrainState, make_train_step
from tests.helpers.task_files import corpus, example_file

STEPS, B, L = 200, 8, 64
CURVE_OPTIMIZER = OptimizerConfig(
    steps=STEPS, learning_rate=1e-3, warmup_steps=20, weight_decay=0.1, clip_norm=1.0
)


def prepare_task(name, dropout):
    """The task with what its file decides, its features, a config and initial values."""
    _, _, tokenizer = corpus()
    task, bad = TASKS[name](TaskSettings(task=name, max_length=L)), RowErrors()
    examples = task.read_examples(example_file(name), True, bad)
    task = TASKS[name](task.infer_settings(examples))
    features = task.features(examples, tokenizer, bad)
    bad.raise_if_any()
    config = task.model_config(
        RobertaPreLayerNormConfig.preset(
            "tiny",
            vocab_size=tokenizer.get_vocab_size(),
            initializer_range=0.1,  # or a pooled head takes longer than this to begin
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )
    return task, features, config, parameters.init(config, jax.random.key(3), task.model)


def our_training(task, config, settings=CURVE_OPTIMIZER):
    """(initial values, batches, seed) -> losses and final values; compiled once."""
    module = heads.MODULES[task.model](config)
    optimizer = adamw(settings, config, task.model)

    def score(params, batch, keys):
        return task.loss(config, task.logits(module, params, batch, keys), batch, DEFAULT_LOSS)

    def step(state, batch, seed):
        return make_train_step(score, optimizer, seed)(state, batch)

    step = jax.jit(step, donate_argnums=0)

    def train(params, batches, seed):
        state, losses = TrainState.create(jax.tree.map(np.array, params), optimizer), []
        for batch in batches:
            state, scores = step(state, batch, seed)
            losses.append(scores.mean)
        return np.array(jax.device_get(losses)), state.params

    return train


def torch_inputs(batch):
    """The same batch by transformers' names; rows that fill up are left out."""
    real = batch["weights"] > 0 if "weights" in batch else np.ones(len(batch["input_ids"]), bool)
    named = {"input_ids": batch["input_ids"][real]}
    named["attention_mask"] = (named["input_ids"] != 1).astype(np.int64)
    if "masked_labels" in batch:
        labels = np.full_like(batch["input_ids"], IGNORE_INDEX)
        rows, slots = np.nonzero(batch["masked_weights"])
        labels[rows, batch["masked_positions"][rows, slots]] = batch["masked_labels"][rows, slots]
        named["labels"] = labels
    for name in ("labels", "start_positions", "end_positions"):
        if name in batch:
            named[name] = batch[name][real]
    whole = {k: v if v.dtype.kind == "f" else v.astype(np.int64) for k, v in named.items()}
    return {name: torch.tensor(value) for name, value in whole.items()}


def torch_training(task, config, params, batches, seed, folder, settings=CURVE_OPTIMIZER):
    """Losses and final values, those in our tree. A step's loss is the mean of its parts'."""
    save_pretrained(folder / "first", jax.tree.map(np.asarray, params), config, task.model)
    model = getattr(transformers, ARCHITECTURES[task.model]).from_pretrained(folder / "first")
    model.train()  # without dropout it is the same function
    torch.manual_seed(seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    s = dataclasses.asdict(settings)
    betas, rate = (s["adam_beta1"], s["adam_beta2"]), learning_rate_schedule(settings)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=s["adam_epsilon"])
    losses = []
    for number, parts in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(number))
        loss = torch.stack([model(**torch_inputs(part)).loss for part in parts]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(folder / "last")
    return np.array(losses), load_pretrained(folder / "last", task.model)[0]


def draw_batches(task, features, seed, steps=STEPS):
    """The run's batches as we train on them; and each as a list of those torch's loss can take."""
    loader = task.training_batches(features, B, seed, steps, 1)
    ours = [loader.batch(step) for step in range(steps)]
    if not isinstance(loader, PackedBatches):  # masked blocks have no pads
        return ours, [[batch] for batch in ours]
    drawn = [loader.indices(step) for step in range(steps)]
    if task.model == "question_answering":  # transformers' loss takes pads for possible answers
        drawn = [np.split(indices, len(indices)) for indices in drawn]
    else:
        drawn = [[indices] for indices in drawn]
    theirs = [
        [features.batch(part, int(features.lengths[part].max())) for part in parts]
        for parts in drawn
    ]
    return ours, theirs

"""The Flax classes of transformers 4.57.6, trained as by its example run_mlm_flax.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.benchmark.cases import Case, comparison_batch, split_batches
from experiments.benchmark.workload import Workload
from prelnroberta.config import IGNORE_INDEX

Batch = dict[str, np.ndarray]


def convert_weights(weights: Path, case: Case) -> None:
    """Writes flax_model.msgpack, so that the timed process need not import torch."""
    _class(case).from_pretrained(weights, from_pt=True).save_pretrained(weights / "flax")
    (weights / "flax" / "flax_model.msgpack").rename(weights / "flax_model.msgpack")


def _class(case: Case) -> Any:
    return getattr(transformers, "Flax" + case.architecture)


def make_workloads(
    weights: Path, case: Case, batch: Batch, variants: list[str]
) -> dict[str, Workload]:
    # from_pretrained would find model.safetensors and require torch.
    config = transformers.AutoConfig.from_pretrained(weights)
    model = _class(case)(config, _do_init=False)
    params = jax.device_put(_read_weights(weights))
    make = {"train": _train, "forward": _forward}[case.operation]
    return {variant: make(model, params, case, batch) for variant in variants}


def _read_weights(weights: Path) -> dict:
    from flax.serialization import msgpack_restore

    return msgpack_restore((weights / "flax_model.msgpack").read_bytes())


def _forward(model: Any, params: dict, case: Case, batch: Batch) -> Workload:
    inputs = jax.device_put({name: batch[name] for name in ("input_ids", "attention_mask")})

    @jax.jit
    def forward(params: dict, inputs: dict) -> jax.Array:
        return model(**inputs, params=params, train=False)[0]

    def outputs() -> np.ndarray:
        return np.asarray(forward(params, inputs))[batch["attention_mask"] == 1]

    return Workload(outputs, lambda: jax.block_until_ready(forward(params, inputs)))


def _loss(model: Any, params: dict, batch: Batch, dropout_rng: jax.Array | None) -> jax.Array:
    outputs = model(
        batch["input_ids"],
        batch["attention_mask"],
        params=params,
        dropout_rng=dropout_rng,
        train=dropout_rng is not None,
    )
    if "start_positions" in batch:
        start = _cross_entropy(outputs.start_logits, batch["start_positions"])
        end = _cross_entropy(outputs.end_logits, batch["end_positions"])
        return (start + end) / 2
    logits, labels = outputs.logits, batch["labels"]
    if model.config.is_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return _cross_entropy(logits, labels)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    counted = labels != IGNORE_INDEX
    one_hot = jax.nn.one_hot(jnp.where(counted, labels, 0), logits.shape[-1])
    losses = optax.softmax_cross_entropy(logits, one_hot) * counted
    return losses.sum() / counted.sum()


def _decay_mask(params: dict) -> dict:
    """True for all parameters but biases and norms, as decay_mask_fn of run_mlm_flax.py."""
    flat = flatten_dict(params)
    return unflatten_dict({path: path[-1] not in ("bias", "scale") for path in flat})


def _train(model: Any, params: dict, case: Case, batch: Batch) -> Workload:
    optimizer = optax.adamw(1e-4, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, mask=_decay_mask)
    state = (params, optimizer.init(params), jax.random.key(0))
    batches = [jax.device_put(batch) for batch in split_batches(case, batch)]

    @partial(jax.jit, donate_argnums=0)
    def step(state: tuple, batch: Batch) -> tuple:
        params, opt_state, rng = state
        rng, dropout_rng = jax.random.split(rng)
        gradients = jax.grad(lambda p: _loss(model, p, batch, dropout_rng))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, rng

    def outputs() -> float:
        loss = jax.jit(lambda params, batch: _loss(model, params, batch, None))
        return float(loss(state[0], comparison_batch(case, batch)))

    def run() -> None:
        nonlocal state
        for batch in batches:
            state = step(state, batch)
        jax.block_until_ready(state)

    return Workload(outputs, run)

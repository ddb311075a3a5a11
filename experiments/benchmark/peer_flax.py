"""transformers 4.57.6's Flax classes, trained as its example run_mlm_flax.py trains them."""

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

from experiments.benchmark.cases import Case, checked
from experiments.benchmark.work import Work
from prelnroberta.config import IGNORE_INDEX

Batch = dict[str, np.ndarray]


def prepare(weights: Path, case: Case) -> None:
    """Writes flax_model.msgpack, so that no contender imports torch to read its weights."""
    _class(case).from_pretrained(weights, from_pt=True).save_pretrained(weights / "flax")
    (weights / "flax" / "flax_model.msgpack").rename(weights / "flax_model.msgpack")


def _class(case: Case) -> Any:
    return getattr(transformers, "Flax" + case.architecture)


def build(weights: Path, case: Case, batch: Batch, modes: list[str]) -> dict[str, Work]:
    # Beside model.safetensors transformers would want torch.
    config = transformers.AutoConfig.from_pretrained(weights)
    model = _class(case)(config, _do_init=False)
    params = jax.device_put(_read(weights))
    make = {"train": _train, "forward": _forward}[case.work]
    return {mode: make(model, params, case, batch) for mode in modes}


def _read(weights: Path) -> dict:
    from flax.serialization import msgpack_restore

    return msgpack_restore((weights / "flax_model.msgpack").read_bytes())


def _forward(model: Any, params: dict, case: Case, batch: Batch) -> Work:
    inputs = jax.device_put({name: batch[name] for name in ("input_ids", "attention_mask")})

    @jax.jit
    def forward(params: dict, inputs: dict) -> jax.Array:
        return model(**inputs, params=params, train=False)[0]

    def check() -> np.ndarray:
        return np.asarray(forward(params, inputs))[batch["attention_mask"] == 1]

    return Work(check, lambda: jax.block_until_ready(forward(params, inputs)))


def _loss(model: Any, params: dict, batch: Batch, key: jax.Array | None) -> jax.Array:
    outputs = model(
        batch["input_ids"],
        batch["attention_mask"],
        params=params,
        dropout_rng=key,
        train=key is not None,
    )
    if "start_positions" in batch:
        names = ("start", "end")
        sides = [_mean(outputs[f"{s}_logits"], batch[f"{s}_positions"]) for s in names]
        return sum(sides) / 2
    logits, labels = outputs.logits, batch["labels"]
    if model.config.is_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return _mean(logits, labels)


def _mean(logits: jax.Array, labels: jax.Array) -> jax.Array:
    counted = labels != IGNORE_INDEX
    one_hot = jax.nn.one_hot(jnp.where(counted, labels, 0), logits.shape[-1])
    losses = optax.softmax_cross_entropy(logits, one_hot) * counted
    return losses.sum() / counted.sum()


def _decays(params: dict) -> dict:
    """All but biases and norms, as run_mlm_flax.py's decay_mask_fn."""
    flat = flatten_dict(params)
    return unflatten_dict({path: path[-1] not in ("bias", "scale") for path in flat})


def _train(model: Any, params: dict, case: Case, batch: Batch) -> Work:
    optimizer = optax.adamw(1e-4, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, mask=_decays)
    state = (params, optimizer.init(params), jax.random.key(0))
    parts = [
        jax.device_put({name: rows[at : at + case.B] for name, rows in batch.items()})
        for at in range(0, len(batch["input_ids"]), case.B)
    ]

    @partial(jax.jit, donate_argnums=0)
    def step(state: tuple, part: Batch) -> tuple:
        params, opt_state, key = state
        key, drop = jax.random.split(key)
        gradients = jax.grad(lambda p: _loss(model, p, part, drop))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, key

    def check() -> float:
        loss = jax.jit(lambda params, part: _loss(model, params, part, None))
        return float(loss(state[0], checked(case, batch)))

    def run() -> None:
        nonlocal state
        for part in parts:
            state = step(state, part)
        jax.block_until_ready(state)

    return Work(check, run)

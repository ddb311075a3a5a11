"""Run by test_sharding.py in a process of its own, with 8 CPU devices: the same ten steps on every
mesh, and what can be seen of them. Prints one JSON object.
"""

import json
import sys

import jax
import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.distributed.sharding import Layout, Parallelism
from prelnroberta.distributed.topology_compile import count_collectives
from prelnroberta.model.encoder import Execution
from prelnroberta.model.heads import MaskedLM
from prelnroberta.model.losses import masked_lm_scores
from prelnroberta.training.optimizer import OptimizerConfig, adamw
from prelnroberta.training.train_step import (
    TrainState,
    compile_eval_step,
    compile_train_step,
    make_train_step,
)
from tests.helpers.masked_batches import masked_batch
from tests.helpers.small_models import random_params

CONFIG = RobertaPreLayerNormConfig.preset(
    "tiny", vocab_size=64, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2
)
# name -> mesh, devices, accumulation, whether layers are scanned
CASES = {
    "one": (Parallelism(), 1, 1, False),
    "pmap": (Parallelism(strategy="pmap"), 8, 2, False),
    "data": (Parallelism(), 8, 2, False),
    "fsdp": (Parallelism(data=1, fsdp=-1), 8, 2, False),
    "tensor": (Parallelism(tensor=4), 4, 1, False),
    "mixed": (Parallelism(data=2, fsdp=2, tensor=2), 8, 2, True),
}
STEPS, B = 10, 16


def run(parallelism, devices, accumulate, scan):
    module = MaskedLM(CONFIG, Execution(scan_layers=scan, remat="dots" if scan else "none"))
    optimizer = adamw(
        OptimizerConfig(steps=STEPS, learning_rate=1e-3, warmup_steps=2, clip_norm=1.0), CONFIG
    )

    def score(params, batch, keys):
        return masked_lm_scores(module, params, batch, keys)

    layout = Layout(parallelism, CONFIG, devices=jax.devices()[:devices])
    layout.check_batch(B, accumulate)
    assert layout.local_batch_rows(B).tolist() == list(range(B))
    with layout.use_mesh():
        given = layout.device_put(random_params(CONFIG, scale=0.1))
        state = layout.init_sharded(lambda given: TrainState.create(given, optimizer), given)
        # Rows whose masks differ in number, and some without any.
        batches = [
            layout.shard_batch(masked_batch(B=B, seed=n, empty=(2 * n % B, 2 * n % B + 1)))
            for n in range(STEPS)
        ]
        step = compile_train_step(make_train_step(score, optimizer, 0, accumulate), layout)
        compiled = step.lower(state, batches[0]).compile()
        losses = []
        for batch in batches:
            state, scores = compiled(state, batch)
            losses.append(float(scores.loss) / float(scores.weight))
        check = compile_eval_step(score, layout)(state.params, batches[0])
        flat = parameters.flatten(layout.gather_to_host(state.params))
        held = {
            name: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
            for name, tree in (("params", state.params), ("optimizer", state.opt_state))
        }
    placed = parameters.flatten(jax.tree.map(lambda x: list(x.sharding.spec), state.params))
    return flat, {
        "losses": losses,
        "evaluation": [float(check.loss), float(check.correct), float(check.weight)],
        "norm": float(state.gradient_norm),
        "held": held,
        "specs": placed,
        "collectives": sorted(count_collectives(compiled.as_text())),
    }


def main():
    found, trees = {}, {}
    for name, case in CASES.items():
        print(name, file=sys.stderr, flush=True)
        trees[name], found[name] = run(*case)
    for name, tree in trees.items():
        apart = {path: float(np.abs(tree[path] - trees["one"][path]).max()) for path in tree}
        found[name]["key_bias_apart"] = apart.pop("encoder/layers/attention/key/bias")
        found[name]["apart"] = max(apart.items(), key=lambda item: item[1])
    print(json.dumps(found))


if __name__ == "__main__":
    main()

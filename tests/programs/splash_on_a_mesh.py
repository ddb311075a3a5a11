"""Run by test_attention_kernels.py in a process of its own, with 8 CPU devices: a step of gradient
descent by the interpreted kernel on a mesh and by pmap, and how far it ends from XLA's on one.
"""

import json
from functools import partial

import jax
import numpy as np
import optax

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.distributed.sharding import Layout, Parallelism
from prelnroberta.model import attention_kernels
from prelnroberta.model.encoder import Execution
from prelnroberta.model.heads import MaskedLM
from prelnroberta.model.losses import masked_lm_scores
from prelnroberta.training.train_step import TrainState, compile_train_step, make_train_step
from tests.helpers.masked_batches import masked_batch
from tests.helpers.small_models import random_params

CONFIG = RobertaPreLayerNormConfig.preset(
    "tiny", vocab_size=64, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.0
)
MESHES = {"mesh": Parallelism(data=2, fsdp=2, tensor=2), "pmap": Parallelism(strategy="pmap")}


def run(parallelism, devices, attention):
    module = MaskedLM(CONFIG, Execution(attention=attention, scan_layers=True, remat="dots"))
    optimizer = optax.sgd(1.0)
    layout = Layout(parallelism, CONFIG, devices=jax.devices()[:devices])

    def score(params, batch, keys):
        return masked_lm_scores(module, params, batch, keys)

    with layout.use_mesh():
        given = layout.device_put(random_params(CONFIG, scale=0.1))
        state = layout.init_sharded(lambda given: TrainState.create(given, optimizer), given)
        packed = masked_batch(B=16)
        # Pads on both sides, and two sequences of other lengths in every row.
        packed["segment_ids"] = np.clip((np.arange(16) - np.arange(16)[:, None] % 4) // 5, 0, 2)
        batch = layout.shard_batch(packed)
        state, scores = compile_train_step(make_train_step(score, optimizer, 0), layout)(
            state, batch
        )
        return parameters.flatten(layout.gather_to_host(state.params)), float(scores.loss)


def main():
    plain, loss = run(Parallelism(), 1, "xla")
    attention_kernels.target_platform = lambda: "tpu"
    attention_kernels.splash_attention = partial(attention_kernels.splash_attention, interpret=True)
    found = {}
    for name, mesh in MESHES.items():
        flat, splash_loss = run(mesh, 8, "splash")
        apart = max(float(np.abs(flat[path] - plain[path]).max()) for path in plain)
        found[name] = {"apart": apart, "loss": abs(splash_loss / loss - 1)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

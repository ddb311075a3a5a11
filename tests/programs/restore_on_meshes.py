"""Run by test_multihost.py on 8 CPU devices: restores a checkpoint on four meshes.

python -m tests.programs.restore_on_meshes RUN_DIR STEPS OUTPUT writes MESH.npz of each.
"""

import sys

import jax
import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.distributed.sharding import Layout, Parallelism
from prelnroberta.params import flatten
from prelnroberta.training.checkpoint import CheckpointManager
from prelnroberta.training.optimizer import OptimizerConfig, adamw
from prelnroberta.training.train_step import TrainState

run_dir, steps = sys.argv[1], int(sys.argv[2])
config = RobertaPreLayerNormConfig.from_json(run_dir + "/model")
optimizer = adamw(OptimizerConfig(steps=steps, learning_rate=1e-3), config)
checkpoints = CheckpointManager(run_dir + "/checkpoints")
for name, parallelism, count in (
    ("pmap8", Parallelism(strategy="pmap"), 8),
    ("mixed8", Parallelism(data=2, fsdp=2, tensor=2), 8),
    ("fsdp4", Parallelism(data=1, fsdp=4), 4),
    ("one", Parallelism(), 1),
):
    layout = Layout(parallelism, config, devices=jax.devices()[:count])
    like = jax.eval_shape(
        lambda: TrainState.create(parameters.init(config, jax.random.key(9)), optimizer)
    )
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        like,
        layout.shardings(like),
    )
    with layout.use_mesh():
        state, _ = checkpoints.restore(like)
    assert int(state.step) == steps
    assert len(state.params["embeddings"]["word"].sharding.device_set) == count
    np.savez(f"{sys.argv[3]}/{name}.npz", **flatten(layout.gather_to_host(state.params)))

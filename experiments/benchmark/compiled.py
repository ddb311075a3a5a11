"""What the compiler says of our training step: temporary memory, and how long it takes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prelnroberta.config import RobertaPreLayerNormConfig
    from prelnroberta.distributed.sharding import Layout
    from prelnroberta.model.encoder import Execution


def measure() -> list[dict[str, Any]]:
    """Each entry: what, value, and the figures behind it. A process each: nothing is cached."""
    found = []
    for B, L in ((8, 128), (32, 512)):
        plain = _compile(B, L, scan=False, remat="none")
        small = _compile(B, L, scan=True, remat="full")
        ratio = small["temp"] / plain["temp"]
        found.append(
            {
                "what": f"temporaries of scan + remat over unrolled, roberta-base {B}x{L}",
                "value": f"{ratio:.2f}",
                "detail": f"{small['temp'] >> 20:,} of {plain['temp'] >> 20:,} MiB",
            }
        )
        if (B, L) == (8, 128):
            pairs = [
                [_compile(B, L, scan, remat="none")["seconds"] for scan in (True, False)]
                for _ in range(3)
            ]
            ratio = statistics.median(looped / unrolled for looped, unrolled in pairs)
            found.append(
                {
                    "what": "compile time of scan over unrolled, roberta-base 8x128",
                    "value": f"{ratio:.2f}",
                    "detail": "median of " + ", ".join(f"{a:.1f} of {b:.1f} s" for a, b in pairs),
                }
            )
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (_compile(8, 128, False, "none", cache) for _ in range(2))
    found.append(
        {
            "what": "compile time with a warm cache over cold, roberta-base 8x128",
            "value": f"{warm['seconds'] / cold['seconds']:.2f}",
            "detail": f"{warm['seconds']:.1f} of {cold['seconds']:.1f} s",
        }
    )
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "experiments.pretrain", "--help"], capture_output=True)
    seconds = time.perf_counter() - begin
    found.append({"what": "pretrain --help", "value": f"{seconds:.2f} s", "detail": "once"})
    return found


def _compile(B: int, L: int, scan: bool, remat: str, cache: str = "") -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.benchmark.compiled", str(B), str(L)]
    command += [str(int(scan)), remat, cache]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main(B: int, L: int, scan: bool, remat: str, cache: str) -> None:
    """Compiles the step of roberta-base at 15 % masks, and prints seconds and temporary bytes."""
    import jax

    from prelnroberta.config import RobertaPreLayerNormConfig
    from prelnroberta.distributed.sharding import Layout, Parallelism
    from prelnroberta.model.encoder import Execution

    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    config = RobertaPreLayerNormConfig.preset("roberta-base")
    step, state, batch = masked_lm_step(
        config, Execution(scan_layers=scan, remat=remat), Layout(Parallelism(), config), B, L
    )
    begin = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "temp": compiled.memory_analysis().temp_size_in_bytes}))


def masked_lm_step(
    config: RobertaPreLayerNormConfig, execution: Execution, layout: Layout, B: int, L: int
) -> tuple[Any, Any, Any]:
    """The training step at 15 % masks, and the shapes, on the layout's devices, of what it takes:
    `step.lower(state, batch)`, inside `layout.use_mesh()`."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from prelnroberta import params as parameters
    from prelnroberta.distributed.sharding import BATCH_AXES
    from prelnroberta.model.heads import MaskedLM
    from prelnroberta.model.losses import masked_lm_scores
    from prelnroberta.training.optimizer import OptimizerConfig, adamw
    from prelnroberta.training.train_step import TrainState, compile_train_step, make_train_step

    module = MaskedLM(config, execution)
    optimizer = adamw(OptimizerConfig(steps=100, learning_rate=1e-4), config)

    def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(
        lambda: TrainState.create(parameters.init(config, jax.random.key(0)), optimizer)
    )
    state = jax.tree.map(placed, state, layout.shardings(state))
    rows = jax.ShapeDtypeStruct((B, L), jnp.int32)
    masked = jax.ShapeDtypeStruct((B, round(0.15 * L)), jnp.int32)
    batch = dict.fromkeys(("input_ids", "segment_ids", "position_ids"), rows)
    batch |= {"masked_positions": masked, "masked_labels": masked}
    batch["masked_weights"] = jax.ShapeDtypeStruct(masked.shape, jnp.float32)
    by_rows = NamedSharding(layout.mesh, PartitionSpec(BATCH_AXES))
    batch = {name: placed(leaf, by_rows) for name, leaf in batch.items()}
    step = make_train_step(lambda *a: masked_lm_scores(module, *a), optimizer, seed=0)
    return compile_train_step(step, layout), state, batch


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3])), *sys.argv[4:])

"""Temporary memory and compile time of the training step, as XLA reports them."""

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
    """Compiles the training step of roberta-base in several ways, each in a new process, so that
    nothing is cached.

    Returns:
        what is compared, its value, and the measured numbers as detail.
    """
    return [
        _remat_memory(8, 128),
        _scan_seconds(8, 128),
        _remat_memory(32, 512),
        _cache_seconds(8, 128),
        _help_seconds(),
    ]


def _remat_memory(B: int, L: int) -> dict[str, Any]:
    unrolled = _compile(B, L, scan=False, remat="none")["temp"]
    scanned = _compile(B, L, scan=True, remat="full")["temp"]
    return {
        "what": f"temporary memory of scan with remat over unrolled, roberta-base {B}x{L}",
        "value": f"{scanned / unrolled:.2f}",
        "detail": f"{scanned >> 20:,} of {unrolled >> 20:,} MiB",
    }


def _scan_seconds(B: int, L: int) -> dict[str, Any]:
    pairs = [
        [_compile(B, L, scan, remat="none")["seconds"] for scan in (True, False)] for _ in range(3)
    ]
    return {
        "what": f"compile time of scan over unrolled, roberta-base {B}x{L}",
        "value": f"{statistics.median(scanned / unrolled for scanned, unrolled in pairs):.2f}",
        "detail": "median of " + ", ".join(f"{a:.1f} of {b:.1f} s" for a, b in pairs),
    }


def _cache_seconds(B: int, L: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (_compile(B, L, False, "none", cache)["seconds"] for _ in range(2))
    return {
        "what": f"compile time with a warm cache over a cold one, roberta-base {B}x{L}",
        "value": f"{warm / cold:.2f}",
        "detail": f"{warm:.1f} of {cold:.1f} s",
    }


def _help_seconds() -> dict[str, Any]:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "experiments.pretrain", "--help"], capture_output=True)
    seconds = time.perf_counter() - begin
    return {"what": "pretrain --help", "value": f"{seconds:.2f} s", "detail": "once"}


def _compile(B: int, L: int, scan: bool, remat: str, cache: str = "") -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.benchmark.compile_cost", str(B), str(L)]
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
    """The training step at 15 % masks, and its arguments as shapes with shardings, for
    `step.lower(state, batch)` in `layout.use_mesh()`."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from prelnroberta import params as parameters
    from prelnroberta.model.heads import MaskedLM
    from prelnroberta.model.losses import masked_lm_scores
    from prelnroberta.training.optimizer import OptimizerConfig, adamw
    from prelnroberta.training.train_step import TrainState, compile_train_step, make_train_step

    module = MaskedLM(config, execution)
    optimizer = adamw(OptimizerConfig(steps=100, learning_rate=1e-4), config)

    def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(
        lambda: TrainState.create(parameters.init(config, jax.random.key(0)), optimizer)
    )
    state = jax.tree.map(with_sharding, state, layout.shardings(state))
    rows = jax.ShapeDtypeStruct((B, L), jnp.int32)
    masked = jax.ShapeDtypeStruct((B, round(0.15 * L)), jnp.int32)
    batch = dict.fromkeys(("input_ids", "segment_ids", "position_ids"), rows)
    batch |= {"masked_positions": masked, "masked_labels": masked}
    batch["masked_weights"] = jax.ShapeDtypeStruct(masked.shape, jnp.float32)
    batch = {name: with_sharding(leaf, layout.batch_sharding) for name, leaf in batch.items()}
    step = make_train_step(lambda *a: masked_lm_scores(module, *a), optimizer, seed=0)
    return compile_train_step(step, layout), state, batch


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3])), *sys.argv[4:])

"""Memory, FLOPs and bytes of the training step on a TPU, which is compiled here but not run.

    python -m experiments.benchmark.tpu_compile_cost        # needs `make libtpu`; a minute a line

roberta-base, 16 rows of 512 at 15 % masks, bfloat16, no attention dropout, on one v5e chip.
Temporaries are of the whole step. The compiler counts the FLOPs and bytes of a loop's body once:
two layers (one iteration of the loop, and the last layer), the head, the optimizer. It does not
see inside a kernel, only its inputs and outputs.
"""

from __future__ import annotations

import sys
from typing import Any

from prelnroberta.errors import InputError

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "scan": {},
    "logits_chunk_size=11": {"logits_chunk_size": 11},
    "remat=dots": {"remat": "dots"},
    "remat=full": {"remat": "full"},
    "attention=splash": {"attention": "splash"},
    "splash, dots, logits 11": {"attention": "splash", "remat": "dots", "logits_chunk_size": 11},
}
B, L = 16, 512


def main() -> None:
    from prelnroberta.distributed import topology_compile

    devices = topology_compile.topology_devices("v5e:2x2")[:1]
    import jax
    import jax.numpy as jnp

    from experiments.benchmark.compile_cost import masked_lm_step
    from prelnroberta.config import RobertaPreLayerNormConfig
    from prelnroberta.distributed.sharding import Layout, Parallelism
    from prelnroberta.model.encoder import Execution

    jax.config.update("jax_exec_time_optimization_effort", topology_compile.COMPILE_EFFORT)
    config = RobertaPreLayerNormConfig.preset(
        "roberta-base", vocab_size=50265, attention_probs_dropout_prob=0.0
    )
    layout = Layout(Parallelism(), config, devices=devices)
    print(
        "| configuration | temporaries, GiB | GFLOPs | GB accessed |\n|---|---|---|---|", flush=True
    )
    first: list[float] = []
    for name, options in CONFIGURATIONS.items():
        execution = Execution(dtype=jnp.bfloat16, scan_layers=True, **options)
        with layout.use_mesh():
            step, *shapes = masked_lm_step(config, execution, layout, B, L)
            compiled = step.lower(*shapes).compile()
        cost = compiled.cost_analysis()
        costs = [
            compiled.memory_analysis().temp_size_in_bytes / 2**30,
            cost["flops"] / 1e9,
            cost["bytes accessed"] / 1e9,
        ]
        first = first or costs
        cells = (f"{x:,.2f} ({x / y:.2f})" for x, y in zip(costs, first, strict=True))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")

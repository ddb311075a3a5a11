"""--compile_topology: compiles the training step of a run for a TPU topology, without a TPU.

    python -m experiments.pretrain --flagfile=experiments/recipes/efficient_mlm_large.flags \\
        --run_dir=runs/large --mesh_fsdp=16 --compile_topology=v5e:16x16

The model, the flags and the step are those of the run. Text, tokenizer and weights are not needed,
because only shapes matter. Nothing is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optax

    from experiments.flags.programs import PretrainSettings
    from prelnroberta.config import RobertaPreLayerNormConfig
    from prelnroberta.distributed.topology_compile import CompileReport
    from prelnroberta.training.train_step import ScoreFn

_GIB = 2**30


def compile_topology(
    settings: PretrainSettings,
    config: RobertaPreLayerNormConfig,
    score: ScoreFn,
    optimizer: optax.GradientTransformation,
    row: dict[str, tuple[tuple[int, ...], str]],
    flops_per_row: int,
    model: str = "masked_lm",
) -> int:
    """Compiles the step and prints what it needs; returns the exit code: 0 if it fits, else 1.

    Args:
        row: name -> shape and dtype of a row of the batch.
        flops_per_row: of a forward pass.
    """
    import jax
    from jax.sharding import NamedSharding

    from prelnroberta import params as parameters
    from prelnroberta.distributed import topology_compile
    from prelnroberta.training.train_step import TrainState, compile_train_step, make_train_step

    devices = topology_compile.topology_devices(settings.compile_topology)
    batch_size, microbatches = settings.batch_size, settings.gradient_accumulation_steps
    layout = settings.layout(config, model, batch_size, microbatches, devices)
    state = jax.eval_shape(
        lambda: TrainState.create(parameters.init(config, jax.random.key(0), model), optimizer)
    )

    def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(placed, state, layout.shardings(state))
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=layout.batch_sharding)
        for name, (shape, dtype) in row.items()
    }
    forward = flops_per_row * batch_size / layout.num_devices
    with layout.use_mesh():
        found = topology_compile.compile_for_topology(
            compile_train_step(
                make_train_step(score, optimizer, settings.seed, microbatches), layout
            ),
            state,
            batch,
            devices,
            flops=3 * forward,
            recomputed=forward if settings.remat == "full" else 0.0,
        )
    print(format_report(found, settings))
    return 0 if found.fits else 1


def format_report(found: CompileReport, settings: PretrainSettings) -> str:
    """The report as readable lines."""
    chip = found.chip
    room = chip.memory_bytes / _GIB
    lines = [
        f"compiled in {found.compile_seconds:.0f} s for {found.chips} chips {chip.name} "
        f"({room:.0f} GiB, {chip.peak_flops / 1e12:.0f} TFLOP/s)",
        f"a chip holds   parameters {found.params / _GIB:.2f} GiB, optimizer "
        f"{found.optimizer / _GIB:.2f} GiB",
    ]
    if found.total is None:
        lines.append(f"it does not fit: the compiler says {found.needed}")
    else:
        verdict = "fits" if found.fits else "does not fit"
        lines[-1] += (
            f", activations {found.activations / _GIB:.2f} GiB; in all {found.total / _GIB:.2f} of "
            f"{room:.0f} GiB: {verdict}"
        )
    if found.collectives:
        lines.append("collectives of a step, a chip:")
    for kind, moves in found.collectives.items():
        lines.append(
            f"  {kind:<18} {moves.count:>6,} times, arrays of {moves.bytes / 1e9:8.3f} GB, "
            f"{moves.moved / 1e9:8.3f} GB sent"
        )
    if found.total is not None:
        slowest = max(found.seconds, key=found.seconds.__getitem__)
        lines.append(
            f"a step takes at least {found.seconds[slowest]:.3f} s, for its {slowest} ("
            + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in found.seconds.items())
            + f"); MFU at most {found.mfu_ceiling:.0%}"
        )
    return "\n".join(lines + advice(found, settings))


def advice(found: CompileReport, settings: PretrainSettings) -> list[str]:
    """Which flags to change if it does not fit, the one that frees most memory first."""
    if found.fits:
        return []
    state, room = found.params + found.optimizer, found.chip.memory_bytes
    advised = []
    if state > room / 4:
        fsdp, ways = settings.mesh_fsdp, 1
        while state / ways > room / 4 and abs(fsdp) * ways < found.chips:
            ways *= 2
        advised.append(f"--mesh_fsdp={abs(fsdp) * ways} (parameters and optimizer fill the chip)")
    if settings.remat != "full":
        advised.append(f"--remat={'dots' if settings.remat == 'none' else 'full'}")
    if settings.dtype == "float32":
        advised.append("--dtype=bfloat16")
    advised.append(f"--gradient_accumulation_steps={2 * settings.gradient_accumulation_steps}")
    return ["try, in this order: " + ", ".join(advised)]

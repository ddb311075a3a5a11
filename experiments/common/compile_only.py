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

    def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(with_sharding, state, layout.shardings(state))
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=layout.batch_sharding)
        for name, (shape, dtype) in row.items()
    }
    forward = flops_per_row * batch_size / layout.num_devices
    with layout.use_mesh():
        report = topology_compile.compile_for_topology(
            compile_train_step(
                make_train_step(score, optimizer, settings.seed, microbatches), layout
            ),
            state,
            batch,
            devices,
            model_flops=3 * forward,
            remat_flops=forward if settings.remat == "full" else 0.0,
        )
    print(format_report(report, settings))
    return 0 if report.fits else 1


def format_report(report: CompileReport, settings: PretrainSettings) -> str:
    """Formats memory, collectives, lower bounds on time, and advice if the step does not fit."""
    chip = report.chip
    chip_gib = chip.memory_bytes / _GIB
    lines = [
        f"compiled in {report.compile_seconds:.0f} s for {report.num_chips} {chip.name} chips "
        f"({chip_gib:.0f} GiB, {chip.peak_flops / 1e12:.0f} TFLOP/s)",
        f"memory per chip: parameters {report.param_bytes / _GIB:.2f} GiB, optimizer "
        f"{report.optimizer_bytes / _GIB:.2f} GiB",
    ]
    if report.total_bytes is None:
        lines.append(f"it does not fit; the compiler reports: {report.out_of_memory_message}")
    else:
        verdict = "fits" if report.fits else "does not fit"
        lines[-1] += (
            f", activations {report.activation_bytes / _GIB:.2f} GiB; total "
            f"{report.total_bytes / _GIB:.2f} of {chip_gib:.0f} GiB: {verdict}"
        )
    if report.collectives:
        lines.append("collectives per step and chip:")
    for kind, stats in report.collectives.items():
        lines.append(
            f"  {kind:<18} {stats.count:>6,} times, arrays of {stats.array_bytes / 1e9:8.3f} GB, "
            f"{stats.bytes_sent / 1e9:8.3f} GB sent"
        )
    if report.total_bytes is not None:
        bounds = report.min_seconds
        slowest = max(bounds, key=bounds.__getitem__)
        lines.append(
            f"a step takes at least {bounds[slowest]:.3f} s, limited by {slowest} ("
            + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in bounds.items())
            + f"); MFU at most {report.max_mfu:.0%}"
        )
    return "\n".join(lines + advice(report, settings))


def advice(report: CompileReport, settings: PretrainSettings) -> list[str]:
    """Which flags to change if it does not fit, the one that frees most memory first."""
    if report.fits:
        return []
    state_bytes, chip_bytes = report.param_bytes + report.optimizer_bytes, report.chip.memory_bytes
    advised = []
    if state_bytes > chip_bytes / 4:
        fsdp, shards = settings.mesh_fsdp, 1
        while state_bytes / shards > chip_bytes / 4 and abs(fsdp) * shards < report.num_chips:
            shards *= 2
        advised.append(f"--mesh_fsdp={abs(fsdp) * shards} (parameters and optimizer fill the chip)")
    if settings.remat != "full":
        advised.append(f"--remat={'dots' if settings.remat == 'none' else 'full'}")
    if settings.dtype == "float32":
        advised.append("--dtype=bfloat16")
    advised.append(f"--gradient_accumulation_steps={2 * settings.gradient_accumulation_steps}")
    return ["try, in this order: " + ", ".join(advised)]

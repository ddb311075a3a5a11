"""Ahead-of-time compilation of a training step for a TPU topology, without a TPU.

libtpu compiles for any topology on any Linux machine (jax.experimental.topologies). Memory is the
compiler's own count. Collectives are read from the compiled program, in which loops are multiplied
out. Times are lower bounds from the chip's data sheet, as if everything overlapped.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from prelnroberta.distributed.hardware import CHIP_SPECS, ChipSpec, find_chip_spec
from prelnroberta.errors import InputError

# Where `make libtpu` installs libtpu. Next to jax, it would make every program look for a TPU.
_LIBTPU_DIR = Path(sys.prefix) / "libtpu"
# The compiler's default effort would search for an hour. With this one the memory that it counts is
# slightly larger than that of the real program.
COMPILE_EFFORT = -1.0
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def topology_devices(name: str) -> list[Any]:
    """Returns the devices of a TPU topology, to compile for but not to compute on.

    After this call the process has only CPU devices of its own.

    Args:
        name: chip and shape, such as `v5e:16x16`, `v4:2x2x4`, `v5p:4x4x8`, `v6e:8x8`.

    Raises:
        InputError: the name is not a topology, or libtpu is not installed.
    """
    tpus = [spec.name for spec in CHIP_SPECS if spec.device_kind_prefix.startswith("TPU")]
    if not re.fullmatch(rf"({'|'.join(tpus)}):\d+(x\d+)+", name):
        raise InputError(
            f"topology {name!r}, expected a chip of {', '.join(tpus)} and a shape, such as "
            "v5e:16x16"
        )
    if importlib.util.find_spec("libtpu") is None:
        if not _LIBTPU_DIR.is_dir():
            raise InputError(
                f"topology {name!r} needs libtpu, which is not installed; run `make libtpu`"
            )
        sys.path.append(str(_LIBTPU_DIR))
    _set_libtpu_environment()
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # with libtpu installed, jax would look for a TPU
    # The two cores of a v4 chip are one device, as on a real slice.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        return list(topology.devices)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"topology {name!r} is unknown to libtpu: {reason}") from error


def _set_libtpu_environment() -> None:
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server describes a TPU
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any value, to avoid a warning that it is unknown
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no chip to lock
    }.items():
        os.environ.setdefault(variable, value)
    # libtpu 0.0.42 overflows the stacks of its fibers on our matrix products.
    arguments = os.environ.get("LIBTPU_INIT_ARGS", "")
    if "fibers_default_thread_stack_size" not in arguments:
        stack = "--fibers_default_thread_stack_size=4194304"
        os.environ["LIBTPU_INIT_ARGS"] = f"{arguments} {stack}".strip()


@dataclasses.dataclass(frozen=True)
class CollectiveStats:
    """All collectives of one kind in a step.

    Attributes:
        count: how many run.
        array_bytes: total size of the full arrays as a device sees them: after a gather, before a
            scatter.
        bytes_sent: bytes that a device sends with ring algorithms.
    """

    count: int
    array_bytes: int
    bytes_sent: float


def count_collectives(hlo: str) -> dict[str, CollectiveStats]:
    """Returns the collectives in the text of a compiled program, by kind, with loops multiplied
    out."""
    computations, entry = _split_computations(hlo)
    found: dict[str, list[tuple[int, int, float]]] = defaultdict(list)

    def visit(name: str, runs: int, kind: str | None = None) -> None:
        for line in computations.get(name, ()):
            if re.search(r"\bwhile\(", line):
                body, condition = (
                    re.search(rf"{part}=%?([\w.\-]+)", line)[1] for part in ("body", "condition")
                )
                # A scan counts up to a constant.
                trips = re.findall(r" constant\((\d+)\)", "\n".join(computations[condition]))
                visit(body, runs * (int(trips[0]) if len(trips) == 1 else 1))
                continue
            match = re.search(rf" ({'|'.join(COLLECTIVES)})(-start)?\(", line)
            if match:
                found[kind or match[1]].append((runs, *_bytes_and_group_size(line, match[1])))
                continue
            # A fused reduce-scatter is written as an all-reduce and a slice.
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                fused = "reduce-scatter" if called.startswith("all-reduce-scatter") else kind
                visit(called, runs, fused)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for called in branches.split(","):
                    visit(called.strip().lstrip("%"), runs, kind)

    visit(entry, 1)
    return {
        kind: CollectiveStats(
            count=sum(runs for runs, _, _ in found[kind]),
            array_bytes=sum(runs * size for runs, size, _ in found[kind]),
            bytes_sent=sum(
                runs * _ring_bytes_sent(kind, size, group_size)
                for runs, size, group_size in found[kind]
            ),
        )
        for kind in COLLECTIVES
        if found[kind]
    }


def _ring_bytes_sent(kind: str, array_bytes: int, group_size: float) -> float:
    """Bytes that each of `group_size` devices sends for one collective."""
    if kind == "collective-permute":
        return array_bytes
    share = (group_size - 1) / group_size
    return (2 if kind == "all-reduce" else 1) * array_bytes * share


def _split_computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations, entry


_DTYPE_BYTES = dict.fromkeys(("pred", "s8", "u8"), 1)
_DTYPE_BYTES |= dict.fromkeys(("bf16", "f16", "s16", "u16"), 2)
_DTYPE_BYTES |= dict.fromkeys(("f64", "s64"), 8)


def _bytes_and_group_size(line: str, kind: str) -> tuple[int, int]:
    """Bytes of the full array of a collective, and the number of devices that take part."""
    result, _, rest = line.partition("=")[2].partition(f" {kind}")
    arrays = [
        math.prod(int(n) for n in dimensions.split(",") if n) * _DTYPE_BYTES.get(dtype, 4)
        for dtype, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", result))
        if dtype not in ("token",)
    ]
    group_size = 1
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        group_size = len(listed[1].split(","))
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        group_size = int(iota[2])
    elif named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        axes = dict(axis.split("=") for axis in named[1].split(","))
        group_size = math.prod(int(axes[axis]) for axis in named[2].split(","))
    # A -start operation returns (operands, results, context).
    size = sum(arrays)
    if rest.startswith("-start") and kind != "all-reduce" and len(arrays) > 1:
        size = max(arrays)
    if kind == "reduce-scatter" and not rest.startswith("-start"):
        size *= group_size
    return size, group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What a step needs on a topology. Bytes and FLOPs are those of one chip.

    Attributes:
        chip, num_chips: the chip and how many there are.
        param_bytes, optimizer_bytes: the chip's shards of parameters and optimizer state.
        activation_bytes: peak memory of the step in addition to its arguments and outputs; None if
            the compiler ran out of memory.
        total_bytes: peak memory of everything; None if the compiler ran out of memory.
        out_of_memory_message: the compiler's words in that case.
        model_flops: FLOPs of the model's matrix products in a step, forward and backward.
        remat_flops: FLOPs that rematerialisation adds.
        collectives: kind -> CollectiveStats.
        compile_seconds: compile time on this machine.
    """

    chip: ChipSpec
    num_chips: int
    param_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None
    total_bytes: int | None
    out_of_memory_message: str
    model_flops: float
    remat_flops: float
    collectives: dict[str, CollectiveStats]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.total_bytes is not None and self.total_bytes <= self.chip.memory_bytes

    @property
    def min_seconds(self) -> dict[str, float]:
        """Lower bounds on the time of a step, by the resource that limits it."""
        bytes_sent = sum(stats.bytes_sent for stats in self.collectives.values())
        # Parameters and moments are read and written once, parameters and gradients once more.
        state_bytes = 2 * (self.param_bytes + self.optimizer_bytes) + 2 * self.param_bytes
        return {
            "matrix products": (self.model_flops + self.remat_flops) / self.chip.peak_flops,
            "memory": state_bytes / self.chip.memory_bandwidth,
            "links": bytes_sent / self.chip.link_bandwidth,
        }

    @property
    def max_mfu(self) -> float:
        return self.model_flops / self.chip.peak_flops / max(self.min_seconds.values())


def compile_for_topology(
    step: Any, state: Any, batch: Any, devices: list[Any], model_flops: float, remat_flops: float
) -> CompileReport:
    """Compiles a step for the devices that the shardings of its arguments name.

    Args:
        step: from `compile_train_step`; call this function inside `layout.use_mesh()`.
        state, batch: ShapeDtypeStructs with shardings.
        devices: from `topology_devices`.
        model_flops, remat_flops: FLOPs of one chip in a step.
    """
    import time

    import jax

    jax.config.update("jax_exec_time_optimization_effort", COMPILE_EFFORT)
    begin = time.monotonic()
    activation_bytes = total_bytes = None
    out_of_memory_message, collectives = "", {}
    try:
        compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used [^.]*\.\d+\w* of [^.]*\.\d+\w* \w+", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) and not used:
            raise
        out_of_memory_message = used[0] if used else "more than there is"
    else:
        memory = compiled.memory_analysis()
        activation_bytes = memory.temp_size_in_bytes
        total_bytes = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + activation_bytes
            + memory.generated_code_size_in_bytes
        )
        collectives = count_collectives(compiled.as_text())
    return CompileReport(
        chip=find_chip_spec(devices[0].device_kind),
        num_chips=len(devices),
        param_bytes=_shard_bytes(state.params),
        optimizer_bytes=_shard_bytes(state.opt_state),
        activation_bytes=activation_bytes,
        total_bytes=total_bytes,
        out_of_memory_message=out_of_memory_message,
        model_flops=model_flops,
        remat_flops=remat_flops,
        collectives=collectives,
        compile_seconds=time.monotonic() - begin,
    )


def _shard_bytes(tree: Any) -> int:
    """Bytes of the shards that one device holds."""
    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )

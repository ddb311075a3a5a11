"""A training step compiled for a TPU pod that is not there, and what the program tells of it.

libtpu compiles for any topology on any Linux machine (jax.experimental.topologies). Memory is the
compiler's own count; collectives are read from the compiled program, loops counted as often as they
turn; times are bounds, from the chip's data sheet, if everything overlapped.
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

# Where `make rehearsal` puts libtpu: beside jax, it would have every program look for a TPU.
_KEPT_APART = Path(sys.prefix) / "libtpu"
# The compiler's default would search for an hour; memory is then a little more than it will be.
COMPILE_EFFORT = -1.0
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def topology_devices(name: str) -> list[Any]:
    """The devices of a topology, to compile for and lay out, not to compute on. This process has
    CPU devices alone from now on.

    Args:
        name: chip and shape, as `v5e:16x16`, `v4:2x2x4`, `v5p:4x4x8`, `v6e:8x8`.

    Raises:
        InputError: a name that is none, or libtpu is not installed.
    """
    tpus = [chip.name for chip in CHIP_SPECS if chip.device_kind_prefix.startswith("TPU")]
    if not re.fullmatch(rf"({'|'.join(tpus)}):\d+(x\d+)+", name):
        raise InputError(
            f"topology {name!r}, expected a chip of {', '.join(tpus)} and a shape, as v5e:16x16"
        )
    if importlib.util.find_spec("libtpu") is None:
        if not _KEPT_APART.is_dir():
            raise InputError(f"topology {name!r}: a rehearsal needs libtpu: make rehearsal")
        sys.path.append(str(_KEPT_APART))
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # nobody to ask which TPU this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: it would say that it knows of none
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no chip to be locked
    }.items():
        os.environ.setdefault(variable, value)
    # libtpu 0.0.42 overflows its fibers' stacks on our matrix products.
    arguments = os.environ.get("LIBTPU_INIT_ARGS", "")
    if "fibers_default_thread_stack_size" not in arguments:
        stack = "--fibers_default_thread_stack_size=4194304"
        os.environ["LIBTPU_INIT_ARGS"] = f"{arguments} {stack}".strip()
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # with libtpu there, jax would look for a TPU
    # A v4 chip's two cores are one device, as they are on a slice.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        return list(found.devices)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"topology {name!r} is none that libtpu knows: {reason}") from error


@dataclasses.dataclass(frozen=True)
class Collective:
    """What all collectives of one kind move in a step.

    Attributes:
        count: how often one is run.
        bytes: of the arrays in full, as each device sees them: gathered, or before they are
            scattered.
        moved: bytes that a device sends, by the ring algorithms.
    """

    count: int
    bytes: int
    moved: float


def count_collectives(hlo: str) -> dict[str, Collective]:
    """kind -> what a compiled program's text holds of it, loops multiplied out."""
    computations, entry = _computations(hlo)
    found: dict[str, list[tuple[int, int, float]]] = defaultdict(list)

    def visit(name: str, times: int, kind: str | None = None) -> None:
        for line in computations.get(name, ()):
            if re.search(r"\bwhile\(", line):
                body, condition = (
                    re.search(rf"{part}=%?([\w.\-]+)", line)[1] for part in ("body", "condition")
                )
                # A scan counts to a constant.
                turns = re.findall(r" constant\((\d+)\)", "\n".join(computations[condition]))
                visit(body, times * (int(turns[0]) if len(turns) == 1 else 1))
                continue
            match = re.search(rf" ({'|'.join(KINDS)})(-start)?\(", line)
            if match:
                found[kind or match[1]].append((times, *_sizes(line, match[1])))
                continue
            # A reduce-scatter may stand in a fusion as an all-reduce and a slice.
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                fused = "reduce-scatter" if called.startswith("all-reduce-scatter") else kind
                visit(called, times, fused)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for called in branches.split(","):
                    visit(called.strip().lstrip("%"), times, kind)

    visit(entry, 1)
    return {
        kind: Collective(
            count=sum(times for times, _, _ in found[kind]),
            bytes=sum(times * size for times, size, _ in found[kind]),
            moved=sum(times * _ring(kind, size, group) for times, size, group in found[kind]),
        )
        for kind in KINDS
        if found[kind]
    }


def _ring(kind: str, size: int, group: float) -> float:
    """Bytes that each of `group` devices sends for an array of `size` bytes."""
    if kind == "collective-permute":
        return size
    share = (group - 1) / group
    return (2 if kind == "all-reduce" else 1) * size * share


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """name -> lines of each computation, and the entry's name."""
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


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}


def _sizes(line: str, kind: str) -> tuple[int, int]:
    """Bytes of a collective's array in full, and how many devices take part."""
    result, _, rest = line.partition("=")[2].partition(f" {kind}")
    arrays = [
        math.prod(int(n) for n in dimensions.split(",") if n) * _BYTES.get(dtype, 4)
        for dtype, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", result))
        if dtype not in ("token",)
    ]
    group = 1
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        group = len(listed[1].split(","))
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        group = int(iota[2])
    elif named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        axes = dict(axis.split("=") for axis in named[1].split(","))
        group = math.prod(int(axes[axis]) for axis in named[2].split(","))
    # A start returns (operands, results, context): half of what it lists is the result.
    size = sum(arrays)
    if rest.startswith("-start") and kind != "all-reduce" and len(arrays) > 1:
        size = max(arrays)
    if kind == "reduce-scatter" and not rest.startswith("-start"):
        size *= group
    return size, group


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What a step will be on that pod; bytes and FLOPs are one chip's.

    Attributes:
        chip, chips: which, and how many.
        params, optimizer: bytes of what a chip holds of them.
        activations: bytes that the step needs beside its arguments, at most at once.
        total: bytes of everything at once; None where the compiler ran out of memory.
        needed: what the compiler then said it needs.
        flops: of the model's matrix products, forward and backward, in a step.
        recomputed: FLOPs that rematerialisation adds.
        collectives: kind -> Collective.
        compile_seconds: here, on this machine.
    """

    chip: ChipSpec
    chips: int
    params: int
    optimizer: int
    activations: int | None
    total: int | None
    needed: str
    flops: float
    recomputed: float
    collectives: dict[str, Collective]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.total is not None and self.total <= self.chip.memory_bytes

    @property
    def seconds(self) -> dict[str, float]:
        """The least time a step can take, by what it waits for."""
        moved = sum(c.moved for c in self.collectives.values())
        # Parameters and moments are read and written once, parameters and gradients once more.
        state = 2 * (self.params + self.optimizer) + 2 * self.params
        return {
            "matrix products": (self.flops + self.recomputed) / self.chip.peak_flops,
            "memory": state / self.chip.memory_bandwidth,
            "links": moved / self.chip.link_bandwidth,
        }

    @property
    def mfu_ceiling(self) -> float:
        return self.flops / self.chip.peak_flops / max(self.seconds.values())


def compile_for_topology(
    step: Any, state: Any, batch: Any, devices: list[Any], flops: float, recomputed: float
) -> CompileReport:
    """Compiles a step for the devices that its arguments' shardings name.

    Args:
        step: from `compile_train_step`, inside `layout.use_mesh()`.
        state, batch: ShapeDtypeStructs with shardings.
        devices: of `topology_devices`.
        flops, recomputed: of one chip, in a step.
    """
    import time

    import jax

    def held(tree: Any) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    jax.config.update("jax_exec_time_optimization_effort", COMPILE_EFFORT)
    begin = time.monotonic()
    total = activations = None
    needed, moved = "", {}
    try:
        compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"Used [^.]*\.\d+\w* of [^.]*\.\d+\w* \w+", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) and not found:
            raise
        needed = found[0] if found else "more than there is"
    else:
        memory = compiled.memory_analysis()
        activations = memory.temp_size_in_bytes
        total = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + activations
            + memory.generated_code_size_in_bytes
        )
        moved = count_collectives(compiled.as_text())
    return CompileReport(
        chip=find_chip_spec(devices[0].device_kind),
        chips=len(devices),
        params=held(state.params),
        optimizer=held(state.opt_state),
        activations=activations,
        total=total,
        needed=needed,
        flops=flops,
        recomputed=recomputed,
        collectives=moved,
        compile_seconds=time.monotonic() - begin,
    )

"""What accelerators can do: one table for the rehearsal's bounds and a run's MFU."""

from __future__ import annotations

import dataclasses

_GB, _GIB, _T = 1e9, 2**30, 1e12


@dataclasses.dataclass(frozen=True)
class ChipSpec:
    """One device as jax counts them, by its maker's data sheet.

    Attributes:
        name: as in `v5e:16x16`.
        kind: how jax's `device_kind` begins.
        flops: a second, dense, bfloat16 with float32 sums.
        memory: bytes of HBM.
        memory_bandwidth: bytes a second.
        link_bandwidth: bytes a second to neighbours (ICI or NVLink), all links, one direction.
    """

    name: str
    device_kind_prefix: str
    peak_flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float


# Longer kinds first: "TPU v5 lite" is v5e, "TPU v5" is v5p. TPUs: cloud.google.com/tpu/docs, the
# page of each version; GPUs: NVIDIA's data sheets, SXM forms.
CHIP_SPECS = (
    ChipSpec("v6e", "TPU v6 lite", 918 * _T, 32 * _GIB, 1640 * _GB, 400 * _GB),
    ChipSpec("v5e", "TPU v5 lite", 197 * _T, 16 * _GIB, 819 * _GB, 200 * _GB),
    ChipSpec("v5p", "TPU v5", 459 * _T, 95 * _GIB, 2765 * _GB, 600 * _GB),
    ChipSpec("v4", "TPU v4", 275 * _T, 32 * _GIB, 1228 * _GB, 300 * _GB),
    ChipSpec("h100", "NVIDIA H100", 989 * _T, 80 * _GIB, 3350 * _GB, 450 * _GB),
    ChipSpec("a100", "NVIDIA A100", 312 * _T, 80 * _GIB, 2039 * _GB, 300 * _GB),
)


def find_chip_spec(device_kind: str) -> ChipSpec | None:
    """The chip that jax calls so; None for one that is not in the table: never a guess."""
    return next((chip for chip in CHIP_SPECS if device_kind.startswith(chip.device_kind_prefix)), None)

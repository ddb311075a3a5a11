"""Peak numbers of accelerators: one table for the bounds of `topology_compile` and for MFU."""

from __future__ import annotations

import dataclasses

_GB, _GIB, _TERA = 1e9, 2**30, 1e12


@dataclasses.dataclass(frozen=True)
class ChipSpec:
    """One JAX device, by its maker's data sheet.

    Attributes:
        name: as in `v5e:16x16`.
        device_kind_prefix: how JAX's `device_kind` begins.
        peak_flops: FLOP/s, dense, bfloat16 inputs with float32 sums.
        memory_bytes: bytes of HBM.
        memory_bandwidth: bytes/s.
        link_bandwidth: bytes/s to neighbours (ICI or NVLink), all links together, one direction.
    """

    name: str
    device_kind_prefix: str
    peak_flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float


# Longer prefixes come first: "TPU v5 lite" is v5e, "TPU v5" is v5p. Sources: for TPUs,
# cloud.google.com/tpu/docs, the page of each version; for GPUs, NVIDIA's data sheets, SXM variants.
CHIP_SPECS = (
    ChipSpec("v6e", "TPU v6 lite", 918 * _TERA, 32 * _GIB, 1640 * _GB, 400 * _GB),
    ChipSpec("v5e", "TPU v5 lite", 197 * _TERA, 16 * _GIB, 819 * _GB, 200 * _GB),
    ChipSpec("v5p", "TPU v5", 459 * _TERA, 95 * _GIB, 2765 * _GB, 600 * _GB),
    ChipSpec("v4", "TPU v4", 275 * _TERA, 32 * _GIB, 1228 * _GB, 300 * _GB),
    ChipSpec("h100", "NVIDIA H100", 989 * _TERA, 80 * _GIB, 3350 * _GB, 450 * _GB),
    ChipSpec("a100", "NVIDIA A100", 312 * _TERA, 80 * _GIB, 2039 * _GB, 300 * _GB),
)


def find_chip_spec(device_kind: str) -> ChipSpec | None:
    """Returns the spec of a JAX `device_kind`; None if it is not in the table."""
    matches = (spec for spec in CHIP_SPECS if device_kind.startswith(spec.device_kind_prefix))
    return next(matches, None)

"""Chip specifications by the names that jax reports."""

from prelnroberta.distributed.hardware import find_chip_spec


def test_chip_specs_by_jax_device_kind():
    names = {
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v4": "v4",
        "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "h100",
    }
    assert {kind: find_chip_spec(kind).name for kind in names} == names
    assert find_chip_spec("cpu") is None and find_chip_spec("TPU v9") is None

"""`pretrain --compile_topology`: a step compiled for a TPU slice, its report and its advice.

The collectives that a strategy must have are stated here: fsdp gathers each kernel twice a step, in
bfloat16, and scatters its gradient; tensor sums activations four times a layer; nothing is moved
from all to all.
"""

import math

import pytest

from experiments.common.compile_only import format_report
from experiments.flags.programs import PretrainSettings
from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.distributed.hardware import CHIP_SPECS
from prelnroberta.distributed.topology_compile import (
    CollectiveStats,
    CompileReport,
)
from tests.helpers.programs import ROOT, call, tiny_flags


def report(**changes):
    [v5e] = [chip for chip in CHIP_SPECS if chip.name == "v5e"]
    values = {
        "chip": v5e,
        "num_chips": 256,
        "param_bytes": 1 << 30,
        "optimizer_bytes": 2 << 30,
        "activation_bytes": 4 << 30,
        "total_bytes": 7 << 30,
        "out_of_memory_message": "",
        "model_flops": 197e12,
        "remat_flops": 0.0,
        "collectives": {"all-gather": CollectiveStats(10, 10**9, 4 * 10**11)},
        "compile_seconds": 1.0,
    }
    return CompileReport(**values | changes)


def test_report_of_a_step_that_fits():
    text = format_report(report(), PretrainSettings(run_dir="x"))
    assert "total 7.00 of 16 GiB: fits" in text and "try" not in text
    # A second of matrix products, two of links.
    assert "a step takes at least 2.000 s, limited by links" in text and "MFU at most 50%" in text
    assert "matrix products 1.000 s" in text


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (
            {"total_bytes": 20 << 30},
            "--remat=dots, --dtype=bfloat16, --gradient_accumulation_steps=2",
        ),
        (
            {
                "param_bytes": 8 << 30,
                "optimizer_bytes": 16 << 30,
                "total_bytes": None,
                "out_of_memory_message": "Used 30G of 16G",
            },
            "--mesh_fsdp=8 (parameters and optimizer fill the chip), --remat=dots",
        ),
    ],
)
def test_advice_for_a_step_that_does_not_fit(changes, advice):
    text = format_report(report(**changes), PretrainSettings(run_dir="x"))
    assert "not fit" in text and f"try, in this order: {advice}" in text


@pytest.mark.libtpu
@pytest.mark.parametrize(("slice_name", "kind"), [("v5e:2x2", "v5 lite"), ("v4:2x2x1", "v4")])
def test_compile_topology_writes_nothing(slice_name, kind, tmp_path):
    run_dir = tmp_path / "run"
    done = call(
        "pretrain", *tiny_flags(), f"--run_dir={run_dir}", f"--compile_topology={slice_name}"
    )
    assert done.returncode == 0, done.stderr
    assert f"4 devices (TPU {kind}), jit, mesh data 4" in done.stdout
    assert ": fits" in done.stdout and "all-reduce" in done.stdout
    assert not (tmp_path / "run").exists()


LARGE = RobertaPreLayerNormConfig.preset("roberta-large", vocab_size=50265)


def large(slice_name, *flags):
    """kind -> times, GB of the arrays in full; and all that was said."""
    done = call(
        "pretrain",
        f"--flagfile={ROOT / 'experiments/recipes/efficient_mlm_large.flags'}",
        "--run_dir=none",
        f"--compile_topology={slice_name}",
        *flags,
        timeout=1200,
    )
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:])
    found = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if words and words[0] in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"):
            found[words[0]] = (int(words[1].replace(",", "")), float(words[5]))
    return found, done.stdout


def kernels():
    """Elements of all layers' kernels."""
    rows, shapes = parameters.table(LARGE), parameters.shapes(LARGE)
    return sum(math.prod(shapes[p]) for p, r in rows.items() if r.is_stacked and r.kind == "kernel")


@pytest.mark.libtpu
@pytest.mark.slow
def test_large_recipe_fits_v5e_pod_with_fsdp():
    found, said = large("v5e:16x16", "--mesh_fsdp=16")
    assert "256 devices (TPU v5 lite), jit, mesh data 16 x fsdp 16" in said and ": fits" in said
    N, V, D = LARGE.num_hidden_layers, LARGE.vocab_size, LARGE.hidden_size
    times, size = found["all-gather"]
    # Six kernels a layer, forward and backward; the word table for lookups, and for logits.
    assert 12 * N <= times <= 12 * N + 8
    expected = (2 * 2 * kernels() + (4 + 2) * V * D) / 1e9
    assert expected <= size <= 1.02 * expected
    times, size = found["reduce-scatter"]
    assert times >= 4 * N and 0.8 <= size / (2 * kernels() / 1e9) <= 1.05
    assert "all-to-all" not in found and "collective-permute" not in said


@pytest.mark.libtpu
@pytest.mark.slow
def test_large_recipe_fits_v5p_with_tensor_and_fsdp():
    found, said = large("v5p:4x4x4", "--mesh_fsdp=4", "--mesh_tensor=4")
    assert "mesh data 4 x fsdp 4 x tensor 4" in said and ": fits" in said
    assert "vocab_size=50,265 is not divisible by mesh_tensor=4: it is not sharded" in said
    assert found["all-reduce"][0] >= 4 * LARGE.num_hidden_layers
    assert "all-to-all" not in found


@pytest.mark.libtpu
def test_rehearse_refuses_bad_batch_size_before_compiling():
    done = call(
        "pretrain", *tiny_flags(batch_size=10), "--run_dir=none", "--compile_topology=v5e:2x2"
    )
    assert done.returncode == 2, done.stdout
    assert "batch_size=10 is not divisible by 4 devices" in done.stderr

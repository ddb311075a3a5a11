"""A pod's step compiled here: what is read of the program, what is told, what is advised.

The collectives that a strategy must have are stated here: fsdp gathers each kernel twice a step, in
bfloat16, and scatters its gradient; tensor sums activations four times a layer; nothing is moved
from all to all.
"""

import dataclasses
import math

import pytest

from experiments.common import compile_topology as rehearse
from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.distributed.hardware import CHIP_SPECS, find_chip_spec
from prelnroberta.distributed.topology_compile import (
    Collective,
    CompileReport,
    topology_devices,
)
from prelnroberta.errors import InputError
from tests.helpers.programs import ROOT, call, tiny_flags

HLO = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[16,8] {
  %all-reduce.1 = bf16[64,8]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[16,8]{1,0} dynamic-slice(%all-reduce.1, %at)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %turns = s32[] constant(23)
  ROOT %less = pred[] compare(%i, %turns), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=mesh['a'=4] {'a'}
  %fusion.1 = bf16[16,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%start), condition=%condition, body=%body
  %all-reduce.2 = (f32[100]{0}, f32[]) all-reduce(%g, %n), replica_groups=[2,4]<=[8], to_apply=%add
  %reduce-scatter.1 = f32[25]{0} reduce-scatter(%h), replica_groups={{0,1,2,3}}, to_apply=%add
  %permute = f32[10]{0} collective-permute(%z), source_target_pairs={{0,1}}
  %all-gather-start.1 = (f32[5]{0}, f32[20]{0}) all-gather-start(%w), replica_groups={{0,1,2,3}}
  ROOT %all-gather-done.1 = f32[20]{0} all-gather-done(%all-gather-start.1)
}
"""


def test_collectives_are_counted_with_their_loops_and_sizes():
    found = count_collectives(HLO)
    gathered = 23 * 16 * 8 * 2 + 20 * 4
    assert found == {
        "all-reduce": Collective(1, 404, 2 * 404 * 3 / 4),
        "all-gather": Collective(24, gathered, gathered * 3 / 4),
        "reduce-scatter": Collective(24, 23 * 64 * 8 * 2 + 400, (23 * 64 * 8 * 2 + 400) * 3 / 4),
        "collective-permute": Collective(1, 40, 40),
    }


def rehearsal(**changes):
    [v5e] = [chip for chip in CHIP_SPECS if chip.name == "v5e"]
    values = {
        "chip": v5e,
        "chips": 256,
        "params": 1 << 30,
        "optimizer": 2 << 30,
        "activations": 4 << 30,
        "total": 7 << 30,
        "needed": "",
        "flops": 197e12,
        "recomputed": 0.0,
        "collectives": {"all-gather": Collective(10, 10**9, 4 * 10**11)},
        "compile_seconds": 1.0,
    }
    return CompileReport(**values | changes)


def test_what_is_told():
    text = rehearse.tell(rehearsal())
    assert "in all 7.00 of 16 GiB: fits" in text and "try" not in text
    # A second of matrix products, two of links.
    assert "a step takes at least 2.000 s, for its links" in text and "MFU at most 50%" in text
    assert "matrix products 1.000 s" in text


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"total": 20 << 30}, "--remat=dots, --dtype=bfloat16, --accumulate=2"),
        (
            {"params": 8 << 30, "optimizer": 16 << 30, "total": None, "needed": "Used 30G of 16G"},
            "--mesh_fsdp=8 (parameters and optimizer fill the chip), --remat=dots",
        ),
    ],
)
def test_what_is_advised_where_it_does_not_fit(changes, advice, monkeypatch):
    flags = dataclasses.make_dataclass(
        "Flags",
        [
            ("mesh_fsdp", int, 1),
            ("remat", str, "none"),
            ("dtype", str, "float32"),
            ("accumulate", int, 1),
        ],
    )
    monkeypatch.setattr(rehearse, "FLAGS", flags())
    text = rehearse.tell(rehearsal(**changes))
    assert "not fit" in text and f"try, in this order: {advice}" in text


def test_chips_are_known_by_what_jax_calls_them():
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


@pytest.mark.parametrize("name", ["v5e", "v5e:16", "v7:4x4", "h100:2x2", "v5e:3x5"])
def test_a_slice_that_is_none_is_named(name):
    with pytest.raises(InputError, match=name):
        topology_devices(name)


@pytest.mark.parametrize(("slice_name", "kind"), [("v5e:2x2", "v5 lite"), ("v4:2x2x1", "v4")])
def test_a_rehearsal_writes_nothing(slice_name, kind, tmp_path):
    run_dir = tmp_path / "run"
    done = call("pretrain", *tiny_flags(), f"--run_dir={run_dir}", f"--rehearse={slice_name}")
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
        f"--rehearse={slice_name}",
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
    return sum(math.prod(shapes[p]) for p, r in rows.items() if r.stacked and r.kind == "kernel")


@pytest.mark.slow
def test_the_large_recipe_fits_a_v5e_pod_by_fsdp():
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


@pytest.mark.slow
def test_the_large_recipe_fits_v5p_by_tensor_and_fsdp():
    found, said = large("v5p:4x4x4", "--mesh_fsdp=4", "--mesh_tensor=4")
    assert "mesh data 4 x fsdp 4 x tensor 4" in said and ": fits" in said
    assert "vocab_size=50,265 does not divide by mesh_tensor=4: it stays whole" in said
    assert found["all-reduce"][0] >= 4 * LARGE.num_hidden_layers
    assert "all-to-all" not in found


def test_the_same_command_is_refused_before_anything_is_compiled():
    done = call("pretrain", *tiny_flags(batch_size=10), "--run_dir=none", "--rehearse=v5e:2x2")
    assert done.returncode == 2, done.stdout
    assert "batch_size=10 does not divide by 4 devices" in done.stderr

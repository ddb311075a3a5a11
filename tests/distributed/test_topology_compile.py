"""Compilation for TPU slices: collectives counted in the program, and unknown slices."""

import pytest

from prelnroberta.distributed.topology_compile import (
    CollectiveStats,
    count_collectives,
    topology_devices,
)
from prelnroberta.errors import InputError

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


def test_collectives_are_counted_with_loops_and_sizes():
    found = count_collectives(HLO)
    gathered = 23 * 16 * 8 * 2 + 20 * 4
    assert found == {
        "all-reduce": CollectiveStats(1, 404, 2 * 404 * 3 / 4),
        "all-gather": CollectiveStats(24, gathered, gathered * 3 / 4),
        "reduce-scatter": CollectiveStats(
            24, 23 * 64 * 8 * 2 + 400, (23 * 64 * 8 * 2 + 400) * 3 / 4
        ),
        "collective-permute": CollectiveStats(1, 40, 40),
    }


@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["v5e", "v5e:16", "v7:4x4", "h100:2x2", "v5e:3x5"])
def test_unknown_slice_raises_with_its_name(name):
    with pytest.raises(InputError, match=name):
        topology_devices(name)

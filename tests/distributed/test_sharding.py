"""One step on every mesh: the same numbers, arrays sharded by the rules, errors for bad sizes."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.distributed.sharding import Layout, Parallelism, constrain, make_mesh
from prelnroberta.errors import InputError
from prelnroberta.model.heads import MODULES
from tests.helpers.programs import ROOT
from tests.helpers.small_models import TINY

LARGE = RobertaPreLayerNormConfig.preset("roberta-large", vocab_size=50265)


@functools.cache
def eight_devices():
    """What eight_devices.py found, and what XLA said meanwhile."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, ROOT / "tests/programs/eight_devices.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


MESHES = ["pmap", "data", "fsdp", "tensor", "mixed"]


@pytest.mark.parametrize("mesh", MESHES)
def test_ten_steps_match_one_device(mesh):
    """With dropout, accumulation, clipping, and masks that differ in number from row to row.

    The key bias has a gradient of zero, whose rounding Adam makes steps of: it is held to 5e-6.
    """
    found, one = eight_devices()[0][mesh], eight_devices()[0]["one"]
    np.testing.assert_allclose(found["losses"], one["losses"], rtol=1e-6)
    assert one["losses"][0] > one["losses"][-1] + 0.05
    assert found["apart"][1] <= 1e-6, found["apart"]
    assert found["key_bias_apart"] <= 5e-6
    np.testing.assert_allclose(found["evaluation"], one["evaluation"], rtol=1e-6)
    np.testing.assert_allclose(found["norm"], one["norm"], rtol=1e-5)


def test_no_array_is_gathered_in_full():
    """XLA warns when it can only gather an array in full to shard it again."""
    assert "full rematerialization" not in eight_devices()[1]


@pytest.mark.parametrize("mesh", MESHES)
def test_no_all_to_all_collectives(mesh):
    """As it did where dropout's bits were drawn in one line over heads and positions."""
    assert "all-to-all" not in eight_devices()[0][mesh]["collectives"]


def test_state_bytes_fall_with_fsdp():
    found = eight_devices()[0]
    for kind in ("params", "optimizer"):
        whole, cut = found["one"]["held"][kind], found["fsdp"]["held"][kind]
        # What has no hidden dimension is whole: the biases of heads, MLP and vocabulary.
        assert whole / 8 <= cut <= 1.15 * whole / 8, kind
        assert found["pmap"]["held"][kind] == found["data"]["held"][kind] == whole
    layout = Layout(Parallelism(data=1, fsdp=16), LARGE, devices=devices(16))
    sizes = {path: np.prod(shape) for path, shape in parameters.shapes(LARGE).items()}
    held = sum(size / ways(layout, path) for path, size in sizes.items())
    assert held <= 1.01 * sum(sizes.values()) / 16


@dataclasses.dataclass(frozen=True)
class Device:
    """One to lay out, that computes nothing."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def devices(count, per_slice=None):
    """Four a host."""
    return [Device(n, n // 4, n // (per_slice or count)) for n in range(count)]


def ways(layout, path):
    cut = [axes for axes in layout.parameter_spec(path) if axes]
    return int(np.prod([layout.mesh.shape[axis] for axis in cut]))


GOLDEN = """
embeddings/norm/bias                   fsdp
embeddings/norm/scale                  fsdp
embeddings/position                    - fsdp
embeddings/token_type                  - fsdp
embeddings/word                        tensor fsdp
encoder/final_norm/bias                fsdp
encoder/final_norm/scale               fsdp
encoder/layers/attention/key/bias      - tensor
encoder/layers/attention/key/kernel    - fsdp tensor
encoder/layers/attention/output/bias   - fsdp
encoder/layers/attention/output/kernel - tensor - fsdp
encoder/layers/attention/query/bias    - tensor
encoder/layers/attention/query/kernel  - fsdp tensor
encoder/layers/attention/value/bias    - tensor
encoder/layers/attention/value/kernel  - fsdp tensor
encoder/layers/attention_norm/bias     - fsdp
encoder/layers/attention_norm/scale    - fsdp
encoder/layers/mlp/wi/bias             - tensor
encoder/layers/mlp/wi/kernel           - fsdp tensor
encoder/layers/mlp/wo/bias             - fsdp
encoder/layers/mlp/wo/kernel           - tensor fsdp
encoder/layers/mlp_norm/bias           - fsdp
encoder/layers/mlp_norm/scale          - fsdp
lm_head/bias                           tensor
lm_head/dense/bias                     fsdp
lm_head/dense/kernel                   fsdp
lm_head/norm/bias                      fsdp
lm_head/norm/scale                     fsdp
"""


@pytest.mark.parametrize("mesh", ["pmap", "data", "fsdp", "tensor", "mixed"])
def test_golden_shardings(mesh):
    """One table: a mesh cuts along the axes that it has."""
    axes = {"pmap": "", "data": "", "fsdp": "fsdp", "tensor": "tensor", "mixed": "fsdp tensor"}
    for line in GOLDEN.strip().splitlines():
        path, *cuts = line.split()
        expected = [cut if cut in axes[mesh].split() else None for cut in cuts]
        found = eight_devices()[0][mesh]["specs"][path]
        # An axis of size 1 may stand there: it cuts nothing.
        sizes = {"fsdp": {"fsdp": 8}, "tensor": {"tensor": 4}, "mixed": {"fsdp": 2, "tensor": 2}}
        real = [axis if axis in sizes.get(mesh, {}) else None for axis in found]
        real += [None] * (len(expected) - len(real))
        assert real == expected, path
    assert len(eight_devices()[0][mesh]["specs"]) == len(GOLDEN.strip().splitlines())


@pytest.mark.parametrize("model", MODULES)
def test_every_model_has_a_sharding_for_every_leaf(model):
    config = TINY.replace(num_labels=2, is_decoder=True, add_cross_attention=True)
    layout = Layout(Parallelism(fsdp=2, tensor=2), config, model, devices(8))
    for path, shape in parameters.shapes(config, model).items():
        for size, axes in zip(shape, layout.parameter_spec(path), strict=False):
            assert axes is None or size % layout.mesh.shape[axes] == 0
        assert len(layout.parameter_spec(path)) <= len(shape)


def test_all_indivisible_sizes_are_reported_together():
    with pytest.raises(InputError) as error:
        Layout(Parallelism(fsdp=5, tensor=3), LARGE, devices=devices(30))
    text = str(error.value)
    for part in (
        "hidden_size=1,024 is not divisible by mesh_fsdp=5",
        "num_attention_heads=16 is not divisible by mesh_tensor=3",
        "intermediate_size=4,096 is not divisible by mesh_tensor=3",
    ):
        assert part in text
    assert "\n" not in text and "vocab" not in text  # 50,265 divides by 3
    with pytest.raises(
        InputError,
        match=r"batch_size=60 is not divisible by 8 devices.*gradient_accumulation_steps=2",
    ):
        Layout(Parallelism(), TINY, devices=devices(8)).check_batch(
            60, gradient_accumulation_steps=2
        )


def test_indivisible_vocabulary_is_replicated_and_reported():
    layout = Layout(Parallelism(tensor=2), LARGE, devices=devices(4))
    assert layout.notes == [
        "vocab_size=50,265 is not divisible by mesh_tensor=2: it is not sharded over this axis"
    ]
    assert tuple(layout.parameter_spec("embeddings/word")) == (None, "fsdp")
    assert (
        Layout(
            Parallelism(tensor=3),
            LARGE.replace(num_attention_heads=3, hidden_size=1026, intermediate_size=4098),
            devices=devices(3),
        ).notes
        == []
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": 0}, "mesh_data=0"),
        ({"fsdp": -2}, "mesh_fsdp=-2"),
        ({"fsdp": -1}, "one -1"),
        ({"strategy": "pmap", "fsdp": 2}, "parallelism=pmap"),
    ],
)
def test_bad_meshes_raise(changes, message):
    with pytest.raises(InputError, match=message):
        Parallelism(**changes)


def test_meshes_that_do_not_fill_the_devices_raise():
    assert Parallelism(fsdp=2).mesh_shape(8) == (4, 2, 1)
    assert Parallelism(data=2, fsdp=-1, tensor=2).mesh_shape(8) == (2, 2, 2)
    for bad in (Parallelism(fsdp=3), Parallelism(data=2, fsdp=2)):
        with pytest.raises(InputError, match="do not make up 8 devices"):
            bad.mesh_shape(8)


@pytest.mark.parametrize(("axis", "mesh"), [("data", (4, 2, 2)), ("fsdp", (1, 16, 1))])
def test_only_one_axis_crosses_slices(axis, mesh):
    data, fsdp, tensor = mesh
    asked = Parallelism(data=data, fsdp=fsdp, tensor=tensor, dcn_axis=axis)
    made = make_mesh(asked, devices(16, per_slice=8))
    slices = np.vectorize(lambda device: device.slice_index)(made.devices)
    assert slices.shape == mesh
    across = ("data", "fsdp", "tensor").index(axis)
    halves = np.split(slices, 2, axis=across)
    assert all(len(np.unique(half)) == 1 for half in halves)
    with pytest.raises(InputError, match=f"mesh_{axis}=1 is not divisible by 2 slices"):
        other = {"data": 1, "fsdp": 1} | {"fsdp" if axis == "data" else "data": 16}
        make_mesh(Parallelism(**other, dcn_axis=axis), devices(16, per_slice=8))


def test_each_host_reads_the_rows_of_its_devices_once():
    """Four hosts of four devices; where tensor spans hosts, two of them read the same rows."""
    seen = []
    for mesh in (Parallelism(fsdp=4), Parallelism(tensor=8, fsdp=2), Parallelism(strategy="pmap")):
        layout = Layout(mesh, TINY.replace(num_attention_heads=8), devices=devices(16))
        parts = layout.mesh.devices.reshape(layout.num_batch_shards, -1)
        for host in range(4):
            mine = [i for i, row in enumerate(parts) if any(d.process_index == host for d in row)]
            seen.append(mine)
    assert sorted(itertools.chain(*seen[:4])) == list(range(16))
    assert seen[4] == seen[5] and seen[6] == seen[7] and seen[4] != seen[6]
    assert seen[8:] == [list(range(4 * h, 4 * h + 4)) for h in range(4)]


def test_constrain_without_mesh_is_identity():
    x = jnp.ones((3, 5))
    assert constrain(x, "BL") is x
    assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: constrain(x, "BL"))(x))

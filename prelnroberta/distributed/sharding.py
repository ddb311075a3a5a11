"""Sharding: the device mesh, the rules from shape letters to mesh axes, and what follows from them.

`SHARDING_RULES` is the one place that says which mesh axes shard which letter of the parameter
table. The shardings of parameters, optimizer state, batches and activations follow from it. The
model only names letters, with `constrain`, which does nothing outside of `Layout.use_mesh`.

    data     rows of the batch
    fsdp     rows of the batch, and the hidden dimension of everything that is stored
    tensor   heads, MLP and vocabulary, in storage and in computation
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
Strategy = Literal["jit", "pmap"]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Shape letter -> the mesh axes that shard it. Other letters are never sharded.

    Attributes:
        parameters: for parameters and everything of their shape. A mesh axis shards one dimension
            of an array, the first that names it: for DE (a matrix from hidden to hidden), D.
        activations: for activations, and for weights that are looked up rather than multiplied.
        may_replicate: letters that are not sharded, with a note, if their size is not divisible.
            A vocabulary size is given by the tokenizer.
    """

    parameters: dict[str, tuple[str, ...]]
    activations: dict[str, tuple[str, ...]]
    may_replicate: str


_TENSOR = {"H": ("tensor",), "F": ("tensor",), "V": ("tensor",)}
SHARDING_RULES = ShardingRules(
    parameters={"D": ("fsdp",), "E": ("fsdp",), **_TENSOR},
    activations={"B": BATCH_AXES, **_TENSOR},
    may_replicate="V",
)

_CONFIG_FIELDS = {
    "B": "batch_size",
    "D": "hidden_size",
    "E": "hidden_size",
    "F": "intermediate_size",
    "H": "num_attention_heads",
    "V": "vocab_size",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How a model is distributed over devices.

    Attributes:
        strategy: jit shards arrays over the mesh; pmap keeps the whole state on every device.
        data, fsdp, tensor: sizes of the mesh axes. One of them may be -1, which takes the remaining
            devices.
        dcn_axis: the axis that spans the slices (TPU) or hosts (GPU) of a job with several. It is
            the only axis that crosses their slow network.

    Raises:
        InputError: names the field, its value and what was expected.
    """

    strategy: Strategy = "jit"
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    dcn_axis: Literal["data", "fsdp"] = "data"

    def __post_init__(self) -> None:
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if size < 1 and size != -1:
                raise InputError(f"mesh_{axis}={size}, expected 1 or more, or -1 for the rest")
        if [self.data, self.fsdp, self.tensor].count(-1) > 1:
            raise InputError(
                f"mesh_data={self.data}, mesh_fsdp={self.fsdp}, mesh_tensor={self.tensor}, "
                "expected at most one -1, which takes the remaining devices"
            )
        if self.strategy == "pmap" and (self.fsdp, self.tensor) != (1, 1):
            raise InputError(
                f"parallelism=pmap with mesh_fsdp={self.fsdp}, mesh_tensor={self.tensor}, expected "
                "1 and 1, as every device of a pmap holds the whole model, or parallelism=jit"
            )

    def mesh_shape(self, num_devices: int) -> tuple[int, int, int]:
        """Sizes of the mesh axes. Raises InputError if their product is not `num_devices`."""
        sizes = [self.data, self.fsdp, self.tensor]
        known = math.prod(size for size in sizes if size != -1)
        data, fsdp, tensor = (num_devices // known if size == -1 else size for size in sizes)
        if data * fsdp * tensor != num_devices:
            raise InputError(
                f"mesh_data={self.data}, mesh_fsdp={self.fsdp}, mesh_tensor={self.tensor} do not "
                f"make up {num_devices} devices, expected sizes whose product is {num_devices}, or "
                "one -1"
            )
        return data, fsdp, tensor


def make_mesh(parallelism: Parallelism, devices: list[Any]) -> Mesh:
    """Returns the mesh data x fsdp x tensor, with its inner axes along the fastest links.

    Raises:
        InputError: the axes do not fill the devices, or another axis than `dcn_axis` would cross
            slices.
    """
    from jax.experimental import mesh_utils

    shape = parallelism.mesh_shape(len(devices))
    if parallelism.strategy == "pmap":  # pmap's order: the devices of a host are neighbours
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        return Mesh(np.array(devices).reshape(shape), MESH_AXES)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        slice_shape, dcn_shape = _split_over_slices(shape, parallelism.dcn_axis, num_slices)
        arranged = mesh_utils.create_hybrid_device_mesh(
            slice_shape, dcn_shape, devices, allow_split_physical_axes=True
        )
    # Gathers, Linen's and ours, fail with Explicit axes, the default of jax.make_mesh.
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _split_over_slices(
    shape: tuple[int, ...], dcn_axis: str, num_slices: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The mesh of one slice, and the mesh of slices."""
    dcn = MESH_AXES.index(dcn_axis)
    if shape[dcn] % num_slices:
        raise InputError(
            f"mesh_{dcn_axis}={shape[dcn]} is not divisible by {num_slices} slices, which it spans "
            "(--dcn_axis)"
        )
    slice_shape = tuple(n // num_slices if i == dcn else n for i, n in enumerate(shape))
    dcn_shape = tuple(num_slices if i == dcn else 1 for i in range(len(shape)))
    return slice_shape, dcn_shape


def partition_spec(
    letters: str,
    rules: dict[str, tuple[str, ...]],
    is_divisible: Callable[[str, tuple[str, ...]], bool],
) -> PartitionSpec:
    """Maps letters to the mesh axes that shard them, each axis once, where sizes are divisible."""
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for letter in letters:
        axes = rules.get(letter, ())
        if not axes or used & set(axes) or not is_divisible(letter, axes):
            entries.append(None)
            continue
        used |= set(axes)
        entries.append(axes if len(axes) > 1 else axes[0])
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Constrains the sharding of x, whose dimensions are named by letters, to the current mesh.

    Returns x itself if no mesh is set. A dimension whose size is not divisible is not sharded.
    """
    if not _has_several_devices():
        return x
    return jax.lax.with_sharding_constraint(x, _activation_specs([x], [letters])[0])


def apply_per_shard(function: Callable, arrays: list[jax.Array], letters: list[str]) -> jax.Array:
    """Runs function(*arrays) on each device's shards, for a kernel that XLA cannot partition.

    Rows and heads must be independent. The result is sharded as the first array.
    """
    if not _has_several_devices():
        return function(*arrays)
    specs = tuple(_activation_specs(arrays, letters))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def target_platform() -> str:
    """The platform that the program is compiled for: "cpu", "gpu" or "tpu".

    It is that of the current mesh, whose devices may exist only as a topology description, or else
    that of this process.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def is_single_cpu() -> bool:
    """Whether the program is compiled for one CPU device, which holds every array in full."""
    return target_platform() == "cpu" and not _has_several_devices()


def _has_several_devices() -> bool:
    """Whether a mesh of `Layout.use_mesh` with more than one device is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.axis_names == MESH_AXES and mesh.size > 1


def _activation_specs(arrays: list[jax.Array], letters: list[str]) -> list[PartitionSpec]:
    mesh = jax.sharding.get_abstract_mesh()

    def activation_spec(x: jax.Array, names: str) -> PartitionSpec:
        sizes = dict(zip(names, x.shape, strict=True))

        def is_divisible(letter: str, axes: tuple[str, ...]) -> bool:
            return sizes[letter] % math.prod(mesh.shape[axis] for axis in axes) == 0

        return partition_spec(names, SHARDING_RULES.activations, is_divisible)

    return [activation_spec(x, names) for x, names in zip(arrays, letters, strict=True)]


class Layout:
    """The shardings of one model's state and batches on the devices of all hosts.

    Args:
        parallelism: strategy and mesh sizes.
        config, model: select the parameter table.
        devices: devices of all hosts; JAX's by default.

    Attributes:
        mesh: data x fsdp x tensor. With pmap it has a data axis only.
        notes: lines for the user about dimensions that are not sharded.

    Raises:
        InputError: one message that names every dimension whose size is not divisible.
    """

    def __init__(
        self,
        parallelism: Parallelism,
        config: RobertaPreLayerNormConfig,
        model: str = "masked_lm",
        devices: list[Any] | None = None,
    ):
        self.parallelism = parallelism
        self.mesh = make_mesh(parallelism, jax.devices() if devices is None else devices)
        self._sizes = parameters.letter_sizes(config)
        self._letters = {path: row.shape for path, row in parameters.table(config, model).items()}
        used = {letter for letters in self._letters.values() for letter in letters}
        sharded = sorted(used & SHARDING_RULES.parameters.keys())
        indivisible = [
            letter
            for letter in sharded
            if not self._is_divisible(letter, SHARDING_RULES.parameters[letter])
        ]
        # E has the size of D, so one line is enough.
        problems = [
            self._describe_indivisible(letter)
            for letter in indivisible
            if letter not in SHARDING_RULES.may_replicate and letter != "E"
        ]
        if problems:
            raise InputError("the model does not fit the mesh: " + "; ".join(problems))
        self.notes = [
            f"{self._describe_indivisible(letter)}: it is not sharded over this axis"
            for letter in indivisible
            if letter in SHARDING_RULES.may_replicate
        ]

    def _is_divisible(self, letter: str, axes: tuple[str, ...]) -> bool:
        return self._sizes[letter] % self._num_shards(axes) == 0

    def _num_shards(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _describe_indivisible(self, letter: str) -> str:
        [axis] = SHARDING_RULES.parameters[letter]
        return (
            f"{_CONFIG_FIELDS[letter]}={self._sizes[letter]:,} is not divisible by mesh_{axis}="
            f"{self.mesh.shape[axis]}"
        )

    @property
    def is_pmap(self) -> bool:
        return self.parallelism.strategy == "pmap"

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    @property
    def num_batch_shards(self) -> int:
        """How many parts the rows of a batch are sharded into."""
        return self._num_shards(BATCH_AXES)

    def describe(self) -> str:
        """One line about devices and mesh, for the user."""
        kind = self.mesh.devices.flat[0].device_kind
        if self.num_devices == 1:
            return f"1 device ({kind})"
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        strategy = self.parallelism.strategy
        return f"{self.num_devices} devices ({kind}), {strategy}, mesh {axes}"

    def check_batch(self, batch_size: int, gradient_accumulation_steps: int = 1) -> None:
        """Raises InputError unless each device gets the same number of rows per microbatch."""
        if batch_size % (self.num_batch_shards * gradient_accumulation_steps):
            steps = f" x gradient_accumulation_steps={gradient_accumulation_steps}"
            raise InputError(
                f"batch_size={batch_size} is not divisible by {self.num_batch_shards} devices that "
                f"share its rows (mesh_data={self.mesh.shape['data']} x mesh_fsdp="
                f"{self.mesh.shape['fsdp']})" + steps * (gradient_accumulation_steps > 1)
            )

    def use_mesh(self) -> contextlib.AbstractContextManager:
        """Sets the mesh for `constrain`. Trace and run the program inside this context."""
        return contextlib.nullcontext() if self.is_pmap else jax.set_mesh(self.mesh)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that every device holds in full."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of arrays [B, ...] by rows."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    def parameter_spec(self, path: str) -> PartitionSpec:
        """The spec of a parameter, and of anything of its shape."""
        if self.is_pmap:
            return PartitionSpec()
        return partition_spec(self._letters[path], SHARDING_RULES.parameters, self._is_divisible)

    def shardings(self, state: Any) -> Any:
        """Returns the shardings of any pytree of arrays or ShapeDtypeStructs.

        A leaf whose path ends in that of a parameter, such as an optimizer's moments, is sharded as
        that parameter. Other leaves are replicated.
        """

        def sharding(path: Any, leaf: Any) -> NamedSharding:
            names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            for start in range(len(names)):
                parameter_path = "/".join(names[start:])
                letters = self._letters.get(parameter_path)
                if letters is not None and len(letters) == leaf.ndim:
                    return NamedSharding(self.mesh, self.parameter_spec(parameter_path))
            return self.replicated

        return jax.tree_util.tree_map_with_path(sharding, state)

    def init_sharded(self, init: Callable[..., Any], *args: Any) -> Any:
        """Runs init(*args) under jit with output shardings, so that no array is materialized
        unsharded."""
        return jax.jit(init, out_shardings=self.shardings(jax.eval_shape(init, *args)))(*args)

    def gather_to_host(self, tree: Any) -> Any:
        """Returns the tree as numpy arrays on host 0, and None leaves on other hosts. All hosts
        must call it."""
        replicate = jax.jit(lambda x: x, out_shardings=self.replicated)

        def gather(leaf: jax.Array) -> np.ndarray | None:
            # One leaf after the other, so that only one has to fit on a device.
            replicated = replicate(leaf)
            return np.asarray(replicated) if jax.process_index() == 0 else None

        return jax.tree.map(gather, tree)

    def device_put(self, tree: Any) -> Any:
        """Copies host arrays, which must be the same on every host, to devices with `shardings`."""

        def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(put, tree, self.shardings(tree))

    def _local_batch_shards(self) -> list[int]:
        """Indices, ascending, of the `num_batch_shards` parts that this host's devices hold."""
        indices = self.batch_sharding.addressable_devices_indices_map((self.num_batch_shards,))
        return sorted({index.start or 0 for (index,) in indices.values()})

    def local_batch_rows(self, batch_size: int) -> np.ndarray:
        """[local rows] int64, ascending: the rows of the global batch that this host loads."""
        size = batch_size // self.num_batch_shards
        shards = self._local_batch_shards()
        return np.concatenate([np.arange(s * size, (s + 1) * size) for s in shards])

    def shard_batch(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Copies a batch to the devices.

        Args:
            batch: this host's rows, each array [local rows, ...] in the order of
                `local_batch_rows`.

        Returns:
            The global batch, as the functions of `train_step` take it.
        """
        shards = self._local_batch_shards()
        if self.is_pmap:
            return {name: x.reshape(len(shards), -1, *x.shape[1:]) for name, x in batch.items()}

        def shard(x: np.ndarray) -> jax.Array:
            size = len(x) // len(shards)

            def shard_rows(index: tuple[slice, ...]) -> np.ndarray:
                local = shards.index((index[0].start or 0) // size)
                return x[local * size : (local + 1) * size]

            shape = (size * self.num_batch_shards, *x.shape[1:])
            return jax.make_array_from_callback(shape, self.batch_sharding, shard_rows)

        return {name: shard(x) for name, x in batch.items()}

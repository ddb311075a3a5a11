"""Where arrays live: the mesh, the rules from shape letters to its axes, and what follows of them.

One typed place (`SHARDING_RULES`) says which mesh axis cuts which letter of the parameter table; shardings
of parameters, optimizer state, batches and activations all follow. The model names letters only,
by `constrain`, which does nothing where no mesh of ours is set.

    data     rows of the batch
    fsdp     rows of the batch, and the hidden dimension of all that is stored
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
    """Shape letter -> the mesh axes that cut it. A letter that is not named is never cut.

    Attributes:
        stored: of parameters and whatever has their shape. An axis cuts one dimension of an array,
            the first that asks for it: of DE (a matrix from hidden to hidden), D.
        computed: of activations, and of weights that are looked up rather than multiplied.
        may_be_whole: letters that are left whole, with a note, where they do not divide;
            vocabularies come as they are.
    """

    stored: dict[str, tuple[str, ...]]
    computed: dict[str, tuple[str, ...]]
    may_be_whole: str


_TENSOR = {"H": ("tensor",), "F": ("tensor",), "V": ("tensor",)}
SHARDING_RULES = ShardingRules(
    stored={"D": ("fsdp",), "E": ("fsdp",), **_TENSOR},
    computed={"B": BATCH_AXES, **_TENSOR},
    may_be_whole="V",
)

# What a user calls a letter.
_NAMES = {
    "B": "batch_size",
    "D": "hidden_size",
    "E": "hidden_size",
    "F": "intermediate_size",
    "H": "num_attention_heads",
    "V": "vocab_size",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How many devices share what.

    Attributes:
        strategy: jit cuts arrays over the mesh; pmap keeps the whole state on every device.
        data, fsdp, tensor: sizes of the mesh axes; -1 takes what the others leave, in one of them.
        dcn_axis: the axis that spans slices (TPU), or hosts (GPU), where there are several: their
            network is slow, and this axis alone crosses it.

    Raises:
        InputError: naming the field, its value and what was expected.
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
                "of mesh_data, mesh_fsdp and mesh_tensor, expected one -1 at most: it takes what "
                "the others leave"
            )
        if self.strategy == "pmap" and (self.fsdp, self.tensor) != (1, 1):
            raise InputError(
                f"parallelism=pmap with mesh_fsdp={self.fsdp}, mesh_tensor={self.tensor}: every "
                "device of a pmap holds the whole model; expected 1 and 1, or parallelism=jit"
            )

    def mesh_shape(self, devices: int) -> tuple[int, int, int]:
        """The mesh of this many devices. Raises InputError where its axes do not fill them."""
        sizes = [self.data, self.fsdp, self.tensor]
        known = math.prod(size for size in sizes if size != -1)
        filled = [devices // known if size == -1 else size for size in sizes]
        if math.prod(filled) != devices:
            raise InputError(
                f"mesh_data={self.data}, mesh_fsdp={self.fsdp}, mesh_tensor={self.tensor} do not "
                f"make up {devices} devices, expected sizes whose product is {devices}, or one -1"
            )
        return tuple(filled)


def make_mesh(parallelism: Parallelism, devices: list[Any]) -> Mesh:
    """The mesh data x fsdp x tensor, its inner axes along the fastest links.

    Raises:
        InputError: axes that do not fill the devices, or an axis that would have to cross slices.
    """
    from jax.experimental import mesh_utils

    shape = parallelism.mesh_shape(len(devices))
    if parallelism.strategy == "pmap":  # in its order: a host's devices are neighbours
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        return Mesh(np.array(devices).reshape(shape), MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        across = MESH_AXES.index(parallelism.dcn_axis)
        if shape[across] % slices:
            raise InputError(
                f"mesh_{parallelism.dcn_axis}={shape[across]} does not divide by {slices} slices: "
                "it is the axis that spans them (--dcn_axis)"
            )
        within = tuple(n // slices if i == across else n for i, n in enumerate(shape))
        over = tuple(slices if i == across else 1 for i in range(len(shape)))
        arranged = mesh_utils.create_hybrid_device_mesh(
            within, over, devices, allow_split_physical_axes=True
        )
    # Linen's and our gathers fail under Explicit, which jax.make_mesh has by default.
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(letters: str, axes: dict[str, tuple[str, ...]], cuts: Callable) -> PartitionSpec:
    """Letters -> the axes that cut them, each axis once, where `cuts(letter, axes)` allows."""
    used: set[str] = set()
    entries = []
    for letter in letters:
        wanted = axes.get(letter, ())
        if not wanted or used & set(wanted) or not cuts(letter, wanted):
            entries.append(None)
            continue
        used |= set(wanted)
        entries.append(wanted if len(wanted) > 1 else wanted[0])
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Says how x, its dimensions named by letters, lies on the mesh; x itself where none is set.

    A dimension that does not divide is left whole; `Layout` has told of those.
    """
    if not _cuts():
        return x
    return jax.lax.with_sharding_constraint(x, _computed([x], [letters])[0])


def apply_per_shard(function: Callable, arrays: list[jax.Array], letters: list[str]) -> jax.Array:
    """function(*arrays), each device on its part of them: for a kernel that no partitioner can cut.

    Rows and heads must not depend on one another, and the result lies as the first array does.
    """
    if not _cuts():
        return function(*arrays)
    specs = tuple(_computed(arrays, letters))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def target_platform() -> str:
    """cpu, gpu or tpu: of the mesh that is set, whose devices a rehearsal only describes, or else
    of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def is_single_cpu() -> bool:
    """Whether the program is for a CPU that has all of every array."""
    return target_platform() == "cpu" and not _cuts()


def _cuts() -> bool:
    """Whether a mesh of ours is set, and one of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.axis_names == MESH_AXES and mesh.size > 1


def _computed(arrays: list[jax.Array], letters: list[str]) -> list[PartitionSpec]:
    """How activations whose dimensions are named so lie on the mesh."""
    mesh = jax.sharding.get_abstract_mesh()

    def lies(x: jax.Array, names: str) -> PartitionSpec:
        size = dict(zip(names, x.shape, strict=True))

        def divides(letter: str, axes: tuple[str, ...]) -> bool:
            return size[letter] % math.prod(mesh.shape[axis] for axis in axes) == 0

        return spec(names, SHARDING_RULES.computed, divides)

    return [lies(x, names) for x, names in zip(arrays, letters, strict=True)]


class Layout:
    """Where one model's state and batches live on the devices of all hosts.

    Args:
        parallelism: how many devices share what.
        config, model: whose parameter table is laid out.
        devices: of all hosts; jax's by default.

    Attributes:
        mesh: data x fsdp x tensor. A pmap has one of data alone, to say where its arrays are.
        notes: what a user should know of it, a line each.

    Raises:
        InputError: one message that names every dimension that does not divide.
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
        self._size = parameters.sizes(config)
        self._letters = {path: row.shape for path, row in parameters.table(config, model).items()}
        used = {letter for letters in self._letters.values() for letter in letters}
        undivided = [x for x in sorted(used & SHARDING_RULES.stored.keys()) if not self._divides(x)]
        # E is D again: one line is enough.
        problems = [
            self._problem(letter)
            for letter in undivided
            if letter not in SHARDING_RULES.may_be_whole and letter != "E"
        ]
        if problems:
            raise InputError("the model does not fit the mesh: " + "; ".join(problems))
        self.notes = [
            f"{self._problem(letter)}: it stays whole on each of them"
            for letter in undivided
            if letter in SHARDING_RULES.may_be_whole
        ]

    def _divides(self, letter: str, axes: tuple[str, ...] | None = None) -> bool:
        return self._size[letter] % self._ways(axes or SHARDING_RULES.stored[letter]) == 0

    def _ways(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _problem(self, letter: str) -> str:
        [axis] = SHARDING_RULES.stored[letter]
        return (
            f"{_NAMES[letter]}={self._size[letter]:,} does not divide by mesh_{axis}="
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
        """How many parts the rows of a batch are cut into."""
        return self._ways(BATCH_AXES)

    def describe(self) -> str:
        """One line for whoever started the run."""
        kind = self.mesh.devices.flat[0].device_kind
        if self.num_devices == 1:
            return f"1 device ({kind})"
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        how = "pmap" if self.is_pmap else "jit"
        return f"{self.num_devices} devices ({kind}), {how}, mesh {axes}"

    def check_batch(self, batch_size: int, gradient_accumulation_steps: int = 1) -> None:
        """Raises InputError where a device would not get the same number of rows as the others."""
        if batch_size % (self.num_batch_shards * gradient_accumulation_steps):
            raise InputError(
                f"batch_size={batch_size} does not divide by {self.num_batch_shards} devices that share "
                f"its rows (mesh_data={self.mesh.shape['data']} x mesh_fsdp="
                f"{self.mesh.shape['fsdp']})" + f" x gradient_accumulation_steps={gradient_accumulation_steps}" * (gradient_accumulation_steps > 1)
            )

    def use_mesh(self) -> contextlib.AbstractContextManager:
        """While entered, `constrain` means this mesh. Trace and run the program inside."""
        return contextlib.nullcontext() if self.is_pmap else jax.set_mesh(self.mesh)

    @property
    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def parameter_spec(self, path: str) -> PartitionSpec:
        """Of one parameter, or of whatever has its shape."""
        if self.is_pmap:
            return PartitionSpec()
        return spec(self._letters[path], SHARDING_RULES.stored, self._divides)

    def shardings(self, state: Any) -> Any:
        """The shardings of any pytree of arrays or of their shapes: a leaf whose path ends in a
        parameter's, as an optimizer's moments do, lies as that parameter; the rest is whole."""

        def sharding(path: Any, leaf: Any) -> NamedSharding:
            names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            for start in range(len(names)):
                letters = self._letters.get(found := "/".join(names[start:]))
                if letters is not None and len(letters) == leaf.ndim:
                    return NamedSharding(self.mesh, self.parameter_spec(found))
            return self.replicated

        return jax.tree_util.tree_map_with_path(sharding, state)

    def init_sharded(self, make: Callable[..., Any], *given: Any) -> Any:
        """make(*given), each array made where it lies: no host or device holds one it need not."""
        return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make, *given)))(*given)

    def gather_to_host(self, tree: Any) -> Any:
        """The tree as numpy arrays on the first host, None on the others; all hosts must call."""
        collect = jax.jit(lambda x: x, out_shardings=self.replicated)

        def gather(leaf: jax.Array) -> np.ndarray | None:
            whole = collect(leaf)  # one after the other: only one need fit a device
            return np.asarray(whole) if jax.process_index() == 0 else None

        return jax.tree.map(gather, tree)

    def device_put(self, tree: Any) -> Any:
        """Arrays of the host, the same on every host, to where they lie."""

        def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(place, tree, self.shardings(tree))

    def _parts(self) -> list[int]:
        """Which of the `num_batch_shards` parts of a batch lie on this host's devices, ascending."""
        indices = self._by_rows.addressable_devices_indices_map((self.num_batch_shards,))
        return sorted({index.start or 0 for (index,) in indices.values()})

    @property
    def _by_rows(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    def local_batch_rows(self, batch_size: int) -> np.ndarray:
        """[rows of this host] int64, ascending: which of a batch's rows its devices work on."""
        size = batch_size // self.num_batch_shards
        return np.concatenate([np.arange(p * size, (p + 1) * size) for p in self._parts()])

    def shard_batch(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """This host's rows of a batch, each array [rows of this host, ...] in the order of `rows`,
        -> the batch as a step and an evaluation take it."""
        parts = self._parts()
        if self.is_pmap:
            return {name: x.reshape(len(parts), -1, *x.shape[1:]) for name, x in batch.items()}

        def placed(x: np.ndarray) -> jax.Array:
            size = len(x) // len(parts)

            def part(index: tuple[slice, ...]) -> np.ndarray:
                at = parts.index((index[0].start or 0) // size)
                return x[at * size : (at + 1) * size]

            shape = (size * self.num_batch_shards, *x.shape[1:])
            return jax.make_array_from_callback(shape, self._by_rows, part)

        return {name: placed(x) for name, x in batch.items()}

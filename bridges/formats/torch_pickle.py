"""Reads files of `torch.save` without torch and without running anything in them.

A pickle is a program. This module interprets the few opcodes that torch's files consist of.
Classes and functions are never imported: their names select constructors defined here, and any
other name is refused. Tensors stay on disk until they are read, and their sizes are checked against
the size of the file before any memory is allocated.

The standard library's `pickle.Unpickler` with an allow-listing `find_class` is not enough for
untrusted files: 10 bytes make it allocate gigabytes for its memo, nested tuples as a dictionary key
overflow the C stack, and BUILD changes the classes that `find_class` returns.

Both containers of torch are read: the zip archive (since 1.6; torch/serialization.py `_save`) and
the older stream of pickles followed by raw storages (`_legacy_save`).
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import operator
import pickletools
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from prelnroberta.errors import InputError

ZIP_MAGIC = b"PK\x03\x04"
# The pickle of torch's magic number, protocol 2.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# A pickle holds names and settings only: a checkpoint of a thousand tensors takes 200 KB.
_MAX_PICKLE_BYTES = 1 << 28
_MAX_DIMENSIONS = 8
_MAX_NESTED_TUPLES = 10_000

_STORAGE_DTYPES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}


class NamespaceDict(dict):
    """The attributes of a pickled `argparse.Namespace`, by name."""


@dataclasses.dataclass(eq=False)
class Storage:
    """A flat array inside a file; `data` reads it.

    Attributes:
        count: number of elements.
        offset: position of the first byte; None until it is known.
        checksum: CRC-32 of the bytes, if the container has one.
    """

    path: Path
    dtype: np.dtype
    count: int
    offset: int | None = None
    checksum: int | None = None

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    @functools.cached_property
    def data(self) -> np.ndarray:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.nbytes)
        if len(data) != self.nbytes:
            raise InputError(f"{self.path}: truncated; copy it again")
        if self.checksum is not None and zlib.crc32(data) != self.checksum:
            raise InputError(f"{self.path}: damaged, a tensor fails its checksum; copy it again")
        return np.frombuffer(data, self.dtype)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: shape and dtype are known, `np.asarray` reads its data.

    `offset` and `strides` count elements, as in torch.

    Raises:
        ValueError: negative numbers, too many dimensions, or elements outside the storage.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.shape, *self.strides)
        if not all(type(n) is int and n >= 0 for n in numbers) or (
            len(self.shape) != len(self.strides) or len(self.shape) > _MAX_DIMENSIONS
        ):
            raise ValueError(f"a tensor of shape {self.shape} and strides {self.strides}")
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        count = self.storage.count
        if math.prod(self.shape) > count or (math.prod(self.shape) and self.offset + last >= count):
            raise ValueError(f"a tensor of shape {self.shape} in a storage of {count}")

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        flat = self.storage.data
        if not math.prod(self.shape):
            value = np.empty(self.shape, self.dtype)
        else:
            strides = [stride * self.dtype.itemsize for stride in self.strides]
            value = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides)
        return value if dtype is None else value.astype(dtype)


def is_torch_file(path: Path) -> bool:
    with path.open("rb") as file:
        magic = file.read(len(LEGACY_MAGIC))
    return magic.startswith(ZIP_MAGIC) or magic == LEGACY_MAGIC


def load(path: str | Path) -> Any:
    """Returns the saved object: dicts, lists and numbers as they are, tensors as `StoredTensor`,
    namespaces as `NamespaceDict`.

    Raises:
        InputError: the file is damaged, claims more data than it holds, or names anything other
            than tensors and settings. No code from the file has been run.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            legacy = file.read(len(ZIP_MAGIC)) != ZIP_MAGIC
        return _load_legacy(path) if legacy else _load_zip(path)
    except InputError:
        raise
    except Exception as error:  # zipfile and pickletools raise a dozen types on damaged bytes
        if isinstance(error, OSError) and error.filename:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path}: damaged or not a file of torch.save ({reason})") from None


def _load_zip(path: Path) -> Any:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        [pickled] = [name for name in entries if name.count("/") == 1 and name.endswith("data.pkl")]
        root = pickled.removesuffix("data.pkl")
        if root + "constants.pkl" in entries:
            raise InputError(f"{path}: a TorchScript program, expected a checkpoint's tensors")
        # Compressed entries could claim any size; torch never compresses.
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise InputError(f"{path}: compressed entries, which torch.save never writes: refused")
        if entries[pickled].file_size > min(size, _MAX_PICKLE_BYTES):
            raise InputError(f"{path}: a pickle of {entries[pickled].file_size} bytes: refused")
        order = root + "byteorder"
        if order in entries and archive.read(order) != b"little":
            raise InputError(f"{path}: written on a big-endian machine, expected little-endian")
        program = io.BytesIO(archive.read(pickled))

    def locate(storage: Storage, key: str) -> None:
        entry = entries[f"{root}data/{key}"]
        if storage.nbytes != entry.file_size:
            raise ValueError(f"storage {key} has {entry.file_size} bytes, not {storage.nbytes}")
        with path.open("rb") as file:
            file.seek(entry.header_offset)
            header = file.read(30)
        name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        storage.offset = entry.header_offset + 30 + name + extra
        storage.checksum = entry.CRC

    return _Interpreter(path, _StorageTable(path, size, locate)).run(program)


def _load_legacy(path: Path) -> Any:
    size = path.stat().st_size
    storages = _StorageTable(path, size)
    with path.open("rb") as file:
        if file.read(len(LEGACY_MAGIC)) != LEGACY_MAGIC:
            raise ValueError("neither a zip archive nor torch's older format")
        _protocol, system, saved, keys = (
            _Interpreter(path, storages).run(file, end=size) for _ in range(4)
        )
        if system.get("little_endian") is not True or sys.byteorder != "little":
            raise InputError(f"{path}: written on a big-endian machine, expected little-endian")
        for key in keys:
            storage = storages.by_key[key]
            count = int.from_bytes(file.read(8), "little")
            storage.offset = file.tell()
            if count != storage.count or storage.offset + storage.nbytes > size:
                raise InputError(f"{path}: truncated; copy it again")
            file.seek(storage.nbytes, 1)
    if any(storage.offset is None for storage in storages.by_key.values()):
        raise ValueError("a storage is missing")
    return saved


class _StorageTable:
    """All storages of one file by key. Their total size is limited to that of the file."""

    def __init__(
        self, path: Path, size: int, locate: Callable[[Storage, str], None] = lambda *_: None
    ):
        self.path, self.bytes_left, self.locate = path, size, locate
        self.by_key: dict[str, Storage] = {}

    def __call__(self, tag: str, kind: str, key: str, location: str, count: int, view: Any = None):
        """Returns the storage of a persistent id; see `persistent_id` in torch/serialization.py."""
        dtype = _STORAGE_DTYPES[kind]
        if tag != "storage" or view is not None or type(key) is not str or type(count) is not int:
            raise ValueError("a storage of an unknown kind")
        if key not in self.by_key:
            storage = Storage(self.path, dtype, count)
            self.bytes_left -= storage.nbytes
            if count < 0 or self.bytes_left < 0:
                raise InputError(
                    f"{self.path}: claims more tensors than its size holds: truncated or forged"
                )
            self.locate(storage, key)
            self.by_key[key] = storage
        storage = self.by_key[key]
        if (storage.dtype, storage.count) != (dtype, count):
            raise ValueError(f"storage {key} of two kinds")
        return storage


class _GlobalName(str):
    """The name of a class or function in a pickle."""


def _rebuild_tensor(
    storage: Storage, offset: int, shape: tuple, strides: tuple, *_: Any
) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    return StoredTensor(storage, offset, _integers(shape), _integers(strides))


def _integers(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(map(operator.index, values))


def _discard(*_: Any) -> None:
    """Replaces numpy's numbers, which occur in training logs and are not read."""


# The only names that a checkpoint may contain, besides storages, and their constructors here.
_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": NamespaceDict,
    "collections.OrderedDict": dict,
    "torch.Size": _integers,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "numpy.core.multiarray.scalar": _discard,
    "numpy._core.multiarray.scalar": _discard,
    "numpy.dtype": _discard,
    "_codecs.encode": _discard,
}

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Interpreter:
    """Runs one pickle with a stack, a memo, and no names other than `_CONSTRUCTORS`."""

    def __init__(self, path: Path, storages: _StorageTable):
        self.path, self.storages = path, storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        # By id, with their counts. Holding the tuples keeps their ids from being used again.
        self.tuples: dict[int, tuple[tuple, int]] = {}

    def run(self, file: BinaryIO, end: int = _MAX_PICKLE_BYTES) -> Any:
        """Returns the object that the pickle at the current position of `file` describes.

        Raises:
            Exception: of any type, if the pickle is damaged.
        """
        begin = file.tell()
        for opcode, argument, position in pickletools.genops(file):
            if position - begin > min(end, _MAX_PICKLE_BYTES):
                raise ValueError("the pickle does not end")
            self.execute(opcode.name, argument)
        [result] = self.stack
        return result

    def execute(self, opcode: str, argument: Any) -> None:
        """Runs one opcode; see `pickletools.opcodes` for what each one does."""
        stack, push = self.stack, self.stack.append
        if opcode in _CONSTANTS:
            push(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            push(_EMPTY[opcode]())
        elif opcode in _LITERALS:
            push(argument)
        elif opcode == "MARK":
            self.marks.append(len(stack))
        elif opcode == "TUPLE":
            push(self.make_tuple(self.pop_mark()))
        elif opcode in _TUPLES:
            push(self.make_tuple(self.pop(_TUPLES[opcode])))
        elif opcode in ("APPEND", "APPENDS"):
            items = self.pop(1) if opcode == "APPEND" else self.pop_mark()
            self.top(list).extend(items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self.pop(2) if opcode == "SETITEM" else self.pop_mark()
            self.top(dict).update(zip(items[::2], items[1::2], strict=True))
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if opcode == "MEMOIZE" else argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif opcode == "GLOBAL":
            push(self.global_name(argument.replace(" ", ".")))
        elif opcode == "STACK_GLOBAL":
            push(self.global_name(".".join(self.pop(2))))
        elif opcode in ("REDUCE", "NEWOBJ"):
            name, arguments = self.pop(2)
            if not isinstance(name, _GlobalName):
                raise TypeError("a call of something that is not a constructor")
            push(_CONSTRUCTORS[name](*arguments))
        elif opcode == "BUILD":
            [state] = self.pop(1)
            if isinstance(stack[-1], NamespaceDict):
                stack[-1].update(state)
        elif opcode == "BINPERSID":
            [persistent_id] = self.pop(1)
            push(self.storages(*persistent_id))
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise InputError(f"{self.path}: its pickle has {opcode}, which no checkpoint needs")

    def make_tuple(self, items: list[Any]) -> tuple:
        """Limits the tuples inside a tuple, each counted as often as it occurs: a hash visits all
        of them, which takes forever if they double and overflows the C stack if they nest."""
        count = 1 + sum(self.tuples.get(id(item), ((), 0))[1] for item in items)
        if count > _MAX_NESTED_TUPLES:
            raise ValueError(f"more than {_MAX_NESTED_TUPLES} tuples inside one")
        made = tuple(items)
        self.tuples[id(made)] = made, count
        return made

    def top(self, expected: type) -> Any:
        if not isinstance(self.stack[-1], expected):
            raise TypeError(f"expected a {expected.__name__}, not {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise IndexError("the pickle pops an empty stack")
        popped = self.stack[-count:]
        del self.stack[-count:]
        return popped

    def pop_mark(self) -> list[Any]:
        popped = self.stack[self.marks[-1] :]
        del self.stack[self.marks.pop() :]
        return popped

    def global_name(self, name: str) -> _GlobalName:
        if name not in _CONSTRUCTORS and name not in _STORAGE_DTYPES:
            raise InputError(
                f"{self.path}: refused, nothing was run: its pickle names {name[:100]!r}, which is "
                "neither a tensor nor a setting"
            )
        return _GlobalName(name)

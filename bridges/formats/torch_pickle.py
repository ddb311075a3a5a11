"""Reads files of `torch.save` without torch and without running anything that is in them.

A pickle is a program. This is an interpreter for the few instructions that torch's files consist
of; classes and functions are never looked up, their names stand for constructors written here,
and any other name is refused. Tensors stay on disk until they are read, and are held to the size
of the file before a byte is allocated.

Both containers of torch are read: the zip archive (since 1.6; torch/serialization.py `_save`) and
the older stream of pickles followed by raw storages (`_legacy_save`).
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import pickletools
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from prelnroberta.errors import InputError

ZIP_MAGIC = b"PK\x03\x04"
# The pickle of torch's magic number, protocol 2.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# The pickle holds names and settings only: a checkpoint of a thousand tensors takes 200 KB.
_MOST_PICKLE_BYTES = 1 << 28
_MOST_DIMENSIONS = 8

_STORAGES = {
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


class Settings(dict):
    """What was an `argparse.Namespace`: its attributes by name."""


@dataclasses.dataclass(eq=False)
class Storage:
    """A flat array somewhere in a file."""

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
    """A tensor on disk: shape and dtype are known, `np.asarray` reads it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.shape, *self.strides)
        if not all(type(n) is int and n >= 0 for n in numbers) or (
            len(self.shape) != len(self.strides) or len(self.shape) > _MOST_DIMENSIONS
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
    """The object that was saved: dicts, lists and numbers as they are, tensors as `StoredTensor`,
    namespaces as `Settings`.

    Raises:
        InputError: a file that is damaged, claims more than it holds, or names anything but
            tensors and settings; nothing of it was run.
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
        if entries[pickled].file_size > min(size, _MOST_PICKLE_BYTES):
            raise InputError(f"{path}: a pickle of {entries[pickled].file_size} bytes: refused")
        order = root + "byteorder"
        if order in entries and archive.read(order) != b"little":
            raise InputError(f"{path}: written on a big-endian machine, expected little-endian")
        program = io.BytesIO(archive.read(pickled))

    def place(storage: Storage, key: str) -> None:
        entry = entries[f"{root}data/{key}"]
        if storage.nbytes != entry.file_size:
            raise ValueError(f"storage {key} has {entry.file_size} bytes, not {storage.nbytes}")
        with path.open("rb") as file:
            file.seek(entry.header_offset)
            header = file.read(30)
        name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        storage.offset = entry.header_offset + 30 + name + extra
        storage.checksum = entry.CRC

    storages = _Storages(path, size, place)
    return _Interpreter(path, storages).run(program)


def _load_legacy(path: Path) -> Any:
    size = path.stat().st_size
    storages = _Storages(path, size)
    with path.open("rb") as file:
        if file.read(len(LEGACY_MAGIC)) != LEGACY_MAGIC:
            raise ValueError("neither a zip archive nor torch's older form")
        _protocol, system, found, keys = (
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
    return found


class _Storages:
    """The storages a pickle speaks of, each once, together no larger than the file."""

    def __init__(
        self, path: Path, size: int, place: Callable[[Storage, str], None] = lambda *_: None
    ):
        self.path, self.left, self.place = path, size, place
        self.by_key: dict[str, Storage] = {}

    def __call__(self, tag: str, kind: str, key: str, location: str, count: int, view: Any = None):
        dtype = _STORAGES[kind]
        if tag != "storage" or view is not None or type(key) is not str or type(count) is not int:
            raise ValueError("a storage of an unknown kind")
        if key not in self.by_key:
            storage = Storage(self.path, dtype, count)
            self.left -= storage.nbytes
            if count < 0 or self.left < 0:
                raise InputError(
                    f"{self.path}: claims more tensors than its size holds: truncated or forged"
                )
            self.place(storage, key)
            self.by_key[key] = storage
        storage = self.by_key[key]
        if (storage.dtype, storage.count) != (dtype, count):
            raise ValueError(f"storage {key} of two kinds")
        return storage


class _Name(str):
    """A class or function that a pickle names."""


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


def _nothing(*_: Any) -> None:
    """Numbers of numpy, in the logs of a training: not read."""


# All that a checkpoint may name, and what it becomes.
_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": Settings,
    "collections.OrderedDict": dict,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "numpy.core.multiarray.scalar": _nothing,
    "numpy._core.multiarray.scalar": _nothing,
    "numpy.dtype": _nothing,
    "_codecs.encode": _nothing,
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
    """Runs one pickle: a stack, a memo, and no names but `_CONSTRUCTORS`."""

    def __init__(self, path: Path, storages: _Storages):
        self.path, self.storages = path, storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: BinaryIO, end: int = _MOST_PICKLE_BYTES) -> Any:
        begin = file.tell()
        for opcode, argument, position in pickletools.genops(file):
            if position - begin > min(end, _MOST_PICKLE_BYTES):
                raise ValueError("the pickle does not end")
            self.step(opcode.name, argument)
        [result] = self.stack
        return result

    def step(self, name: str, argument: Any) -> None:
        stack, push = self.stack, self.stack.append
        if name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _EMPTY:
            push(_EMPTY[name]())
        elif name in _LITERALS:
            push(argument)
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            push(tuple(self.above_mark()))
        elif name in _TUPLES:
            push(tuple(self.take(_TUPLES[name])))
        elif name in ("APPEND", "APPENDS"):
            items = self.take(1) if name == "APPEND" else self.above_mark()
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.take(2) if name == "SETITEM" else self.above_mark()
            self.top(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif name == "GLOBAL":
            push(self.allowed(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            push(self.allowed(".".join(self.take(2))))
        elif name in ("REDUCE", "NEWOBJ"):
            maker, arguments = self.take(2)
            if not isinstance(maker, _Name):
                raise TypeError("a call of what is no constructor")
            push(_CONSTRUCTORS[maker](*arguments))
        elif name == "BUILD":
            [state] = self.take(1)
            if isinstance(stack[-1], Settings):
                stack[-1].update(state)
        elif name == "BINPERSID":
            [identity] = self.take(1)
            push(self.storages(*identity))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise InputError(f"{self.path}: its pickle has {name}, which no checkpoint needs")

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"{type(self.stack[-1]).__name__} where a {kind.__name__} belongs")
        return self.stack[-1]

    def take(self, count: int) -> list[Any]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise IndexError("the pickle takes more than it has")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def above_mark(self) -> list[Any]:
        taken = self.stack[self.marks[-1] :]
        del self.stack[self.marks.pop() :]
        return taken

    def allowed(self, name: str) -> _Name:
        if name not in _CONSTRUCTORS and name not in _STORAGES:
            raise InputError(
                f"{self.path}: refused, nothing was run: its pickle names {name[:100]!r}, which is "
                "neither a tensor nor a setting"
            )
        return _Name(name)

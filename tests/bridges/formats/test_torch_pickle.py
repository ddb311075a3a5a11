"""PyTorch files are read without PyTorch: the same values, and no code of the file runs."""

import argparse
import collections
import copy
import io
import os
import pathlib
import pickle
import random
import time
import zipfile

import numpy as np
import pytest
import torch

from bridges.formats.torch_pickle import StoredTensor, load
from prelnroberta.errors import InputError

pytestmark = pytest.mark.torch

CONTAINERS = {"zip": True, "older": False}


def save(path, value, container="zip"):
    torch.save(value, path, _use_new_zipfile_serialization=CONTAINERS[container])
    return path


def refusal(path):
    """The one line with which a file is refused; reading its tensors counts."""
    with pytest.raises(InputError) as error:
        read_all(load(path))
    line = str(error.value)
    assert "\n" not in line and str(path) in line and len(line) < 500, line
    return line


def read_all(found):
    if isinstance(found, StoredTensor):
        np.asarray(found)
    elif isinstance(found, dict):
        for value in found.values():
            read_all(value)


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_dtype_and_strided_view_is_read(container, tmp_path):
    base = torch.arange(60).reshape(3, 4, 5)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
             torch.int16, torch.int8, torch.uint8, torch.bool)  # fmt: skip
    tensors = {str(kind): base.to(kind) for kind in kinds}
    tensors |= {
        "transposed": base.float().transpose(0, 2),
        "cut": base.float()[1:, ::2, 3],
        "expanded": torch.arange(4.0)[None].expand(1, -1),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }
    shared = torch.rand(10)
    whole = {
        "tensors": collections.OrderedDict(tensors),
        "shared": [shared[:5], shared[5:]],
        "args": argparse.Namespace(lr=[0.1], name="a", size=torch.Size([2, 3]), big=1 << 70),
        "best": np.float64(3.5),
        "none": (None, True, -5, 2.5, b"bytes", {"k": ()}),
    }
    found = load(save(tmp_path / "a.pt", whole, container))
    for name, tensor in tensors.items():
        value = np.asarray(found["tensors"][name])
        assert value.shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(np.float64(value), tensor.detach().double(), err_msg=name)
    np.testing.assert_array_equal(np.asarray(found["shared"][1]), shared[5:])
    assert found["args"] == {"lr": [0.1], "name": "a", "size": (2, 3), "big": 1 << 70}
    assert found["none"][:4] == (None, True, -5, 2.5) and found["none"][5] == {"k": ()}


# Files that would run code.

MARK = "prelnroberta_was_run"


class Runs:
    def __init__(self, what, *arguments):
        self.what, self.arguments = what, arguments

    def __reduce__(self):
        return self.what, self.arguments


ATTACKS = {
    "os.system": lambda mark: Runs(os.system, f"touch {mark}"),
    "eval": lambda mark: Runs(eval, f"open({mark!r}, 'w')"),
    "exec": lambda mark: Runs(exec, f"open({mark!r}, 'w')"),
    "open": lambda mark: Runs(open, mark, "w"),
    "another class": lambda mark: pathlib.PurePosixPath(mark),
    "torch's own": lambda mark: Runs(torch.save, 1, mark),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_pickle_that_would_run_code_raises(attack, container, tmp_path):
    mark = tmp_path / MARK
    harm = ATTACKS[attack](str(mark))
    for where in ({"model": {"a": torch.ones(2)}, "args": harm}, [harm], {"x": {"y": harm}}):
        line = refusal(save(tmp_path / "a.pt", where, container))
        assert "refused, nothing was run" in line
        assert not mark.exists()


HAND_WRITTEN = {
    "protocol 0": b"cos\nsystem\n(S'touch MARK'\ntR.",
    "INST": b"(S'touch MARK'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch MARK'\no.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch MARK\x85R.",
    "NEWOBJ_EX": b"\x80\x04cargparse\nNamespace\n)}\x92.",
    "EXT1": b"\x82\x01.",
    "a call of a tensor": b"\x80\x02]]R.",
    "BUILD on a class": b"\x80\x02cargparse\nNamespace\n}U\x01aK\x01sb.",
    "PERSID": b"Pnonsense\n.",
    "a mark that is not there": b"\x80\x02t.",
    "a memo that is not there": b"\x80\x02h\x05.",
    "a huge memo index": b"\x80\x02Nr\xff\xff\xff\x7f0r.",
    "a huge string": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "nothing": b"",
    "no end": b"\x80\x02" + b"N" * 1000,
    "two results": b"\x80\x02NN.",
    "unhashable keys": b"\x80\x02}]Ns.",
    "a key of nested tuples": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
    "a key of tuples that double": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "a shape of lists that double": b"\x80\x02](]"
    + b"q\x00]h\x00ah\x00a" * 60
    + b"q\x00ctorch._utils\n_rebuild_tensor\n((U\x07storagectorch\nFloatStorage\nU\x010"
    + b"U\x03cpuK\x00tQK\x00h\x00]tRe.",
    "a storage of its own": b"\x80\x02(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ.",
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_pickles_raise(name, tmp_path):
    program = HAND_WRITTEN[name].replace(b"MARK", str(tmp_path / MARK).encode())
    if name == "STACK_GLOBAL":
        program = pickle.dumps(Runs(os.system, f"touch {tmp_path / MARK}"), 4)
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/data/0", b"")
    begin = time.monotonic()
    if name == "BUILD on a class":
        load(path)
        assert argparse.Namespace.__dict__.get("a") is None
    else:
        refusal(path)
    assert not (tmp_path / MARK).exists() and time.monotonic() - begin < 2


# Files that claim what they do not hold.


def rewritten(path, changes, **options):
    """A copy of a zip archive with other entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    entries |= {name: change(entries.get(name, b"")) for name, change in changes.items()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def test_sizes_beyond_the_file_raise(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.ones(4, 4)})
    with zipfile.ZipFile(path) as archive:
        program = archive.read("a/data.pkl")
        assert program.count(b"K\x10t") == 1 and program.count(b"K\x04K\x04\x86") == 1

    def claim(storage, shape):
        return lambda data: data.replace(b"K\x10t", storage + b"t").replace(
            b"K\x04K\x04\x86", shape + b"\x86"
        )

    huge = b"J\xff\xff\xff\x7f"
    for changes in (
        {"a/data.pkl": claim(huge, b"K\x04K\x04")},
        {"a/data.pkl": claim(huge, huge + huge)},
        {"a/data.pkl": claim(b"K\x10", huge + huge)},
        {"a/data.pkl": claim(b"K\x10", b"K\x05K\x04")},
        {"a/data.pkl": claim(b"K\x10", b"J\xff\xff\xff\xffK\x04")},
        {"a/data.pkl": lambda data: data.replace(b"K\x04K\x01\x86", b"K\x05K\x01\x86")},
        {"a/data/0": lambda data: data[:-4]},
        {"a/byteorder": lambda data: b"big"},
        {"a/constants.pkl": lambda data: b"N."},
    ):
        rewritten(save(path, {"a": torch.ones(4, 4)}), changes)
        refusal(path)


def test_overlapping_zip_entries_are_counted_separately(tmp_path):
    """One megabyte on disk, a hundred in memory."""
    path = save(tmp_path / "a.pt", {i: torch.zeros(1 << 18) for i in range(100)})
    with zipfile.ZipFile(path) as archive:
        program, one = archive.read("a/data.pkl"), archive.read("a/data/0")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/data/0", one)
        for i in range(1, 100):
            again = copy.copy(archive.getinfo("a/data/0"))
            again.filename = f"a/data/{i}"
            archive.filelist.append(again)
    assert path.stat().st_size < 1 << 21
    assert "claims more tensors than its size holds" in refusal(path)


def test_tensors_sharing_a_storage_are_counted_once(tmp_path):
    shared = torch.ones(1000)
    found = load(save(tmp_path / "a.pt", dict.fromkeys(range(100), shared)))
    assert len({id(tensor.storage) for tensor in found.values()}) == 1


def test_zip_bomb_raises(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.zeros(1 << 20)})
    rewritten(path, {}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 15
    assert "compressed" in refusal(path)


def test_flipped_bit_in_tensor_raises(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.arange(4096.0)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "fails its checksum" in refusal(path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_corrupted_files_are_read_or_raise_one_line(container, tmp_path):
    """Cut anywhere, with any bits flipped: a value or one line, soon."""
    whole = {"args": argparse.Namespace(a=1, b=[2.5, "x"]), "model": {"w": torch.ones(3, 5)}}
    path = save(tmp_path / "a.pt", whole, container)
    content = path.read_bytes()
    rng = random.Random(0)
    cuts = [content[:n] for n in sorted({*range(0, 200, 7), *rng.sample(range(len(content)), 60)})]
    flips = []
    for _ in range(500):
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 20))):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        flips.append(bytes(flipped))
    begin, refused = time.monotonic(), 0
    for damaged in (*cuts, *flips):
        path.write_bytes(damaged)
        try:
            read_all(load(path))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused > len(cuts) + 50 and time.monotonic() - begin < 60


def test_other_files_are_not_torch_files(tmp_path):
    path = tmp_path / "a.pt"
    for content in (b"", b"PK", b"PK\x03\x04", os.urandom(1000), io.BytesIO().getvalue()):
        path.write_bytes(content)
        refusal(path)

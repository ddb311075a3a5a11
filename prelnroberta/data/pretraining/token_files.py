"""Text tokenized once, into memory-mapped files that later runs reuse.

    cache_dir/<sha256 of corpus manifest, tokenizer, fraction, format>/
        train/       tokens.bin  document_ends.bin  counts.bin  manifest.json
        validation/  the same

`tokens.bin` holds the documents one after the other, each without `<s>` and with `</s>` at its end.
All files are little-endian and have no header; `manifest.json` says their types and lengths.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from prelnroberta.data.pretraining.corpus import Document, in_validation_split
from prelnroberta.data.tokenizer import EOS_ID
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

if TYPE_CHECKING:
    import tokenizers

FORMAT = 1
SPLITS = ("train", "validation")
# Enough text to keep every thread of the tokenizer busy; each byte costs some 100 while encoded.
_BATCH_BYTES = 1 << 21


class Corpus(Protocol):
    """What `tokenize_corpus` reads; see corpus.py."""

    def documents(self) -> Iterator[Document]: ...
    def manifest(self) -> dict: ...


@dataclass(frozen=True)
class TokenFiles:
    """One split of a tokenized corpus, memory-mapped.

    Attributes:
        tokens: [T] uint16, or uint32 if V > 65536: each document's ids, then `</s>`.
        document_ends: [documents] int64: where each document ends in `tokens`, past its `</s>`.
        counts: [V] int64: how often each id stands in `tokens`.
        manifest: `corpus` (its manifest), `text` (sha256, bytes and documents of both splits),
            `tokenizer_sha256`, `validation_fraction`, `split`, `files` (dtype and length of each).
        directory: where the files are.
    """

    tokens: np.ndarray
    document_ends: np.ndarray
    counts: np.ndarray
    manifest: dict
    directory: Path

    @classmethod
    def open(cls, directory: str | Path) -> TokenFiles:
        """Maps the files of one split.

        Raises:
            InputError: a file is missing, or not of the size that the manifest tells.
        """
        directory = Path(directory)
        try:
            manifest = json.loads((directory / "manifest.json").read_bytes())
            arrays = {
                name: _open_array(directory / f"{name}.bin", **entry)
                for name, entry in manifest["files"].items()
            }
            return cls(**arrays, manifest=manifest, directory=directory)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{directory}: not a directory of token files ({error}); delete it and run again"
            ) from error


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: tokenizers.Tokenizer,
    cache_dir: str | Path,
    validation_fraction: float = 0.05,
    progress: bool = True,
) -> tuple[TokenFiles, TokenFiles]:
    """Tokenizes a corpus into (train, validation) in one pass, or opens what an earlier call made.

    The text is read once, encoded in parallel by the tokenizer's own threads, and written as it
    comes: memory is the same for every size of corpus. Special tokens that are spelled out in the
    text are encoded as text. Files appear under their final name only when complete; of processes
    that want the same ones, the first makes them and the others wait.

    Args:
        validation_fraction: share of the keys (not of the text) that is held out; 0 for none.
        progress: say on standard error what is done: a line, and a bar if it is a terminal.

    Raises:
        InputError: the corpus is at fault, a split stays empty, the disk is full.
    """
    corpus_manifest = corpus.manifest()
    identity = {
        "corpus": corpus_manifest,
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "validation_fraction": validation_fraction,
        "format": FORMAT,
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    cache_dir = Path(cache_dir).expanduser()
    final = cache_dir / name
    with _writing_below(cache_dir), _locked(cache_dir, name, progress):
        if final.exists():
            _say(f"reusing {final}", progress)
        else:
            # The lock is ours: unfinished files were left by a process that died.
            for partial in cache_dir.glob(f".{name}.*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            with atomic_write(final) as partial:
                _tokenize(corpus, tokenizer, partial, identity, progress)
    train, validation = (TokenFiles.open(final / split) for split in SPLITS)
    return train, validation


def _tokenize(
    corpus: Corpus, tokenizer: tokenizers.Tokenizer, directory: Path, identity: dict, progress: bool
) -> None:
    from tokenizers import Tokenizer
    from tqdm import tqdm

    encoder = Tokenizer.from_str(tokenizer.to_str())  # a copy: the caller's stays as it is
    encoder.encode_special_tokens = True  # a "<mask>" in the text is text
    encoder.no_padding()
    encoder.no_truncation()
    writers = {split: _Writer(directory / split, encoder.get_vocab_size()) for split in SPLITS}
    fraction = identity["validation_fraction"]
    digest, started = hashlib.sha256(), time.monotonic()
    size = documents = 0
    with tqdm(
        desc="tokenizing",
        total=identity["corpus"].get("text_bytes"),
        unit="B",
        unit_scale=True,
        disable=None if progress else True,  # None: shown on a terminal only
    ) as bar:
        for batch in _batches(corpus.documents()):
            texts = [document.text for document in batch]
            encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
            ids = {split: [] for split in SPLITS}
            for document, encoding in zip(batch, encodings, strict=True):
                ids[SPLITS[in_validation_split(document.key, fraction)]].append(encoding.ids)
            for split, writer in writers.items():
                writer.add(ids[split])
            raw = "\0".join([*texts, ""]).encode()
            digest.update(raw)
            size += len(raw) - len(texts)
            documents += len(texts)
            bar.update(len(raw))
    text = {"sha256": digest.hexdigest(), "bytes": size, "documents": documents}
    for split, writer in writers.items():
        if not writer.documents and (split == "train" or fraction > 0):
            raise InputError(
                f"the {split} split is empty: none of the corpus's {documents} document(s) falls "
                f"in it at validation fraction {fraction}; give more documents (in plain text a "
                "blank line separates them) or another fraction"
            )
        writer.close(identity | {"text": text, "split": split})
    seconds = time.monotonic() - started
    tokens = sum(writer.tokens for writer in writers.values())
    _say(
        f"{documents:,} documents, {size / 1e6:,.1f} MB, {tokens:,} tokens "
        f"in {seconds:.1f} s ({size / 1e6 / max(seconds, 1e-9):.1f} MB/s)",
        progress,
    )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends the documents of one split to its files."""

    def __init__(self, directory: Path, vocab_size: int):
        directory.mkdir(parents=True)
        self.directory = directory
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.counts = np.zeros(vocab_size, "<i8")
        self.tokens = self.documents = 0
        self._tokens_file = (directory / "tokens.bin").open("wb")
        self._ends_file = (directory / "document_ends.bin").open("wb")

    def add(self, documents: list[list[int]]) -> None:
        ids = np.array([i for document in documents for i in (*document, EOS_ID)], self.dtype)
        ends = self.tokens + np.cumsum([len(document) + 1 for document in documents], dtype="<i8")
        self._tokens_file.write(ids.tobytes())
        self._ends_file.write(ends.tobytes())
        self.counts += np.bincount(ids, minlength=len(self.counts))
        self.tokens += len(ids)
        self.documents += len(ends)

    def close(self, manifest: dict) -> None:
        self._tokens_file.close()
        self._ends_file.close()
        (self.directory / "counts.bin").write_bytes(self.counts.tobytes())
        files = {
            "tokens": {"dtype": self.dtype.str, "length": self.tokens},
            "document_ends": {"dtype": "<i8", "length": self.documents},
            "counts": {"dtype": "<i8", "length": len(self.counts)},
        }
        text = json.dumps(manifest | {"files": files}, indent=2, ensure_ascii=False)
        (self.directory / "manifest.json").write_text(text + "\n", encoding="utf-8")


def _open_array(path: Path, dtype: str, length: int) -> np.ndarray:
    expected, found = np.dtype(dtype).itemsize * length, path.stat().st_size
    if found != expected:
        raise InputError(
            f"{path}: {found} bytes, its manifest says {expected}: the file was cut or changed; "
            f"delete {path.parent.parent} and run again"
        )
    if not length:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", shape=(length,))


@contextmanager
def _locked(cache_dir: Path, name: str, progress: bool) -> Iterator[None]:
    """Holds `name` among all processes; the system lets go of it when its holder dies."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that is preparing them", progress)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


_CANNOT_WRITE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "no permission to write",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "not a directory",
    errno.EEXIST: "not a directory",
    errno.ENOLCK: "the file system has no locks",
    errno.EOPNOTSUPP: "the file system has no locks",
}


@contextmanager
def _writing_below(cache_dir: Path) -> Iterator[None]:
    """Turns the failures to write that a user can mend into an InputError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise InputError(
            f"cannot prepare token files in {cache_dir}: {_CANNOT_WRITE[error.errno]}; they need "
            "about as much space as the text; make room there or name another cache directory"
        ) from error


def _say(message: str, progress: bool) -> None:
    if progress:
        print(f"token files: {message}", file=sys.stderr)

"""Tokenizes text once, into memory-mapped files that later runs reuse.

    cache_dir/<sha256 of corpus manifest, tokenizer, fraction, format>/
        train/       tokens.bin  document_ends.bin  counts.bin  manifest.json
        validation/  the same

`tokens.bin` holds all documents in sequence, each without `<s>` and followed by `</s>`. The files
are little-endian and have no header; `manifest.json` has their dtypes and lengths.
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

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
# Enough text to keep all threads of the tokenizer busy; encoding takes some 100 bytes per byte.
_BATCH_BYTES = 1 << 21


class Corpus(Protocol):
    """The input of `tokenize_corpus`, see corpus.py."""

    def documents(self) -> Iterator[Document]: ...
    def manifest(self) -> dict: ...


@dataclass(frozen=True)
class TokenFiles:
    """One split of a tokenized corpus, memory-mapped.

    Attributes:
        tokens: uint16 [U], or uint32 if V > 65536: each document's ids, then `</s>`.
        document_ends: int64 [documents]: exclusive end of each document in `tokens`, after `</s>`.
        counts: int64 [V]: number of occurrences of each id in `tokens`.
        manifest: `corpus` (its manifest), `text` (sha256, bytes and documents of both splits),
            `tokenizer_sha256`, `validation_fraction`, `split`, `files` (dtype and length of each).
        directory: the folder of the files.
    """

    tokens: np.ndarray
    document_ends: np.ndarray
    counts: np.ndarray
    manifest: dict
    directory: Path

    @classmethod
    def open(cls, directory: str | Path) -> TokenFiles:
        """Maps the files of one split into memory.

        Raises:
            InputError: a file is missing, or its size is not the one in the manifest.
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
    """Tokenizes a corpus into (train, validation) in one pass, or opens existing token files.

    The text is read once, encoded in parallel by the tokenizer's threads, and written in order, so
    memory does not depend on the size of the corpus. Special tokens spelled out in the text are
    encoded as text. Files get their final name only when complete. If several processes need the
    same files, one writes them and the others wait.

    Args:
        validation_fraction: share of the keys (not of the text) that is held out; 0 for none.
        progress: report on standard error: one line, and a progress bar on a terminal.

    Raises:
        InputError: the corpus cannot be read, a split is empty, or the disk is full.
    """
    corpus_manifest = corpus.manifest()
    identity = {
        "corpus": corpus_manifest,
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "validation_fraction": validation_fraction,
        "format": FORMAT_VERSION,
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    cache_dir = Path(cache_dir).expanduser()
    final = cache_dir / name
    with _explain_write_errors(cache_dir), _lock(cache_dir, name, progress):
        if final.exists():
            _log(f"reusing {final}", progress)
        else:
            # This process has the lock, so unfinished files are from a process that died.
            for partial in cache_dir.glob(f".{name}.*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            with atomic_write(final) as partial:
                _tokenize(corpus, tokenizer, partial, identity, progress)
    train, validation = (TokenFiles.open(final / split) for split in SPLITS)
    return train, validation


def _tokenize(
    corpus: Corpus, tokenizer: tokenizers.Tokenizer, directory: Path, identity: dict, progress: bool
) -> None:
    """Writes the token files of both splits to `directory`."""
    encoder = _text_encoder(tokenizer)
    writers = {split: _SplitWriter(directory / split, encoder.get_vocab_size()) for split in SPLITS}
    started = time.monotonic()
    text = _encode_documents(corpus, encoder, writers, identity, progress)
    fraction, documents, size = identity["validation_fraction"], text["documents"], text["bytes"]
    for split, writer in writers.items():
        if not writer.documents and (split == "train" or fraction > 0):
            raise InputError(
                f"the {split} split is empty: none of the corpus's {documents} document(s) is in "
                f"it at validation fraction {fraction}; give more documents (in plain text a blank "
                "line separates them) or another fraction"
            )
        writer.close(identity | {"text": text, "split": split})
    seconds = time.monotonic() - started
    tokens = sum(writer.tokens for writer in writers.values())
    _log(
        f"{documents:,} documents, {size / 1e6:,.1f} MB, {tokens:,} tokens "
        f"in {seconds:.1f} s ({size / 1e6 / max(seconds, 1e-9):.1f} MB/s)",
        progress,
    )


def _text_encoder(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that encodes special tokens in the text as text, and neither pads nor truncates."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.encode_special_tokens = True
    encoder.no_padding()
    encoder.no_truncation()
    return encoder


def _encode_documents(
    corpus: Corpus,
    encoder: tokenizers.Tokenizer,
    writers: dict[str, _SplitWriter],
    identity: dict,
    progress: bool,
) -> dict:
    """Encodes all documents and adds them to their split's writer.

    Returns:
        `sha256`, `bytes` and `documents` of the text.
    """
    from tqdm import tqdm

    digest = hashlib.sha256()
    size = documents = 0
    with tqdm(
        desc="tokenizing",
        total=identity["corpus"].get("text_bytes"),
        unit="B",
        unit_scale=True,
        disable=None if progress else True,  # None: show on a terminal only
    ) as bar:
        for batch in _batch_documents(corpus.documents()):
            texts = [document.text for document in batch]
            encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
            ids: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
            for document, encoding in zip(batch, encodings, strict=True):
                held_out = in_validation_split(document.key, identity["validation_fraction"])
                ids[SPLITS[held_out]].append(encoding.ids)
            for split, writer in writers.items():
                writer.add(ids[split])
            raw = "\0".join([*texts, ""]).encode()
            digest.update(raw)
            size += len(raw) - len(texts)
            documents += len(texts)
            bar.update(len(raw))
    return {"sha256": digest.hexdigest(), "bytes": size, "documents": documents}


def _batch_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents with at least `_BATCH_BYTES` characters, except the last."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
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
def _lock(cache_dir: Path, name: str, progress: bool) -> Iterator[None]:
    """Holds a lock named `name` across processes; the system releases it if the holder dies."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log("waiting for another process that is preparing them", progress)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


_WRITE_ERRORS = {
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
def _explain_write_errors(cache_dir: Path) -> Iterator[None]:
    """Turns write errors that the user can fix into an InputError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in _WRITE_ERRORS:
            raise
        raise InputError(
            f"cannot prepare token files in {cache_dir}: {_WRITE_ERRORS[error.errno]}; they need "
            "about as much space as the text; make room there or name another cache directory"
        ) from error


def _log(message: str, progress: bool) -> None:
    if progress:
        print(f"token files: {message}", file=sys.stderr)

"""Opens a checkpoint of any format by its path, and the tokenizer next to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bridges.formats import torch_pickle
from bridges.formats import transformers_legacy as transformers_files
from bridges.formats.fairseq import fsdp_shards, reader
from bridges.formats.foreign_checkpoint import Checkpoint
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers

# In order of preference, if a folder has several checkpoints.
_FAIRSEQ_NAMES = ("checkpoint_best.pt", "checkpoint_last.pt", "model.pt")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "dict.txt", "encoder.json", "vocab.bpe")


def open_checkpoint(path: str | Path, head: str | None = None) -> Checkpoint:
    """Reads what a file or folder holds. Tensor data is read on use.

    Args:
        head: head to convert: masked_lm, none, or the name of a classification head. None takes
            the LM head or the only head.

    Raises:
        InputError: there is no readable checkpoint, or it is damaged or unsafe.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir() and (weights := transformers_files.find_weights_file(path)):
            return transformers_files.read_checkpoint(weights, head)
        file = _find_fairseq_file(path)
        if torch_pickle.is_torch_file(fsdp_shards.shard_paths(file)[0]):
            saved = fsdp_shards.load(file)
            if reader.is_fairseq(saved):
                return reader.read_checkpoint(file, saved, head)
            tensors = transformers_files.require_state_dict(file, saved)
            return transformers_files.describe_checkpoint(
                file, tensors, "transformers PyTorch file", head
            )
        return transformers_files.read_checkpoint(file, head)
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from None


def _find_fairseq_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists() and fsdp_shards.shard_paths(path) == [path]:
            raise InputError(f"{path}: no such file or folder, expected a checkpoint")
        return path
    files = sorted(p.name for p in path.glob("*.pt"))
    preferred = [name for name in _FAIRSEQ_NAMES if name in files]
    unsharded = preferred or [name for name in files if "-shard" not in name]
    names = unsharded or sorted({name.partition("-shard")[0] + ".pt" for name in files})
    if not names:
        raise InputError(
            f"{path}: no checkpoint there, expected fairseq's *.pt, or config.json and "
            + ", ".join(transformers_files.FORMATS)
        )
    if len(names) > 1 and not preferred:
        raise InputError(f"{path}: several checkpoints, name one: {', '.join(names[:8])}")
    return path / names[0]


def find_tokenizer(checkpoint: Checkpoint) -> tuple[tokenizers.Tokenizer | None, str]:
    """Loads the tokenizer next to a checkpoint's weights.

    Returns:
        The tokenizer, or None if there is none, and one line about it.

    Raises:
        InputError: its number of tokens does not fit the weights.
    """
    from prelnroberta.data.tokenizer import load_tokenizer

    folder, V = checkpoint.path.parent, checkpoint.config.vocab_size
    _check_dictionary(folder, V)
    present = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        return None, "no tokenizer: there is none next to the weights"
    if present == ["dict.txt"]:
        return None, (
            "no tokenizer: put GPT-2's encoder.json and vocab.bpe next to dict.txt to have one"
        )
    try:
        tokenizer = load_tokenizer(folder)
    except InputError as error:
        return None, f"no tokenizer: {error}"
    size = tokenizer.get_vocab_size()
    if size > V:
        raise InputError(f"{folder}: a tokenizer of {size} tokens, but the model has {V}")
    return tokenizer, f"tokenizer of {size} tokens"


def _check_dictionary(folder: Path, V: int) -> None:
    """dict.txt omits the 4 special tokens and the last `<mask>` (fairseq/tasks/masked_lm.py)."""
    path = folder / "dict.txt"
    if not path.is_file():
        return
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    expected = 4 + len(lines) + (not any(line.startswith(b"<mask> ") for line in lines))
    if expected != V:
        raise InputError(
            f"{path}: {len(lines)} lines make {expected} tokens with special tokens and <mask>, "
            f"but the model has {V}: this is the dictionary of another model"
        )

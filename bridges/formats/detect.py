"""Any checkpoint by its path: what form it is, and the tokenizer beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bridges.formats import torch_pickle
from bridges.formats import transformers as transformers_files
from bridges.formats.checkpoint import Checkpoint
from bridges.formats.fairseq import reading, shards
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers

# In a folder of fairseq, the one that is meant.
_FAIRSEQ_NAMES = ("checkpoint_best.pt", "checkpoint_last.pt", "model.pt")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "dict.txt", "encoder.json", "vocab.bpe")


def open_checkpoint(path: str | Path, head: str | None = None) -> Checkpoint:
    """What a file or folder holds.

    Args:
        head: which head to take: masked_lm, none, or the name of a classification head.

    Raises:
        InputError: nothing there that can be read; damaged, unsafe.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir() and (weights := transformers_files.weights_in(path)):
            return transformers_files.read(weights, head)
        file = _fairseq_file(path)
        if torch_pickle.is_torch_file(shards.shards_of(file)[0]):
            found = shards.load(file)
            if reading.is_fairseq(found):
                return reading.read(file, found, head)
            own = transformers_files.state_dict(file, found)
            return transformers_files.describe(file, own, "transformers PyTorch file", head)
        return transformers_files.read(file, head)
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from None


def _fairseq_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists() and shards.shards_of(path) == [path]:
            raise InputError(f"{path}: no such file or folder, expected a checkpoint")
        return path
    files = sorted(p.name for p in path.glob("*.pt"))
    named = [name for name in _FAIRSEQ_NAMES if name in files]
    whole = named or [name for name in files if "-shard" not in name]
    stems = whole or sorted({name.partition("-shard")[0] + ".pt" for name in files})
    if not stems:
        raise InputError(
            f"{path}: no checkpoint there, expected fairseq's *.pt, or config.json and "
            + ", ".join(transformers_files.FORMS)
        )
    if len(stems) > 1 and not named:
        raise InputError(f"{path}: several checkpoints, name one: {', '.join(stems[:8])}")
    return path / stems[0]


def find_tokenizer(checkpoint: Checkpoint) -> tuple[tokenizers.Tokenizer | None, str]:
    """The tokenizer beside a checkpoint's weights, and a remark.

    Raises:
        InputError: it does not belong to the weights: another number of tokens.
    """
    from prelnroberta.data.tokenizer import load_tokenizer

    folder, V = checkpoint.source.parent, checkpoint.config.vocab_size
    _check_dictionary(folder, V)
    present = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        return None, "no tokenizer: none beside the weights"
    if present == ["dict.txt"]:
        return None, (
            "no tokenizer: put GPT-2's encoder.json and vocab.bpe beside dict.txt to have one"
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
    """dict.txt lacks the 4 specials and `<mask>`, which is last (fairseq/tasks/masked_lm.py)."""
    path = folder / "dict.txt"
    if not path.is_file():
        return
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    expected = 4 + len(lines) + (not any(line.startswith(b"<mask> ") for line in lines))
    if expected != V:
        raise InputError(
            f"{path}: {len(lines)} lines make {expected} tokens with the specials and <mask>, but "
            f"the model has {V}: the dictionary of another model"
        )

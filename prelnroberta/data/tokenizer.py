"""RoBERTa's byte-level BPE: training, loading from three formats, saving in Hugging Face's.

Ids are RoBERTa's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, then the BPE tokens, and `<mask>` last.
A row is `<s> A </s>`, a pair `<s> A </s></s> B </s>`. In the vocabulary, each byte of a token is
written as one printable character (GPT-2's map), so `Ġthe` is " the".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers

BOS_TOKEN, PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
BOS_ID, PAD_ID, EOS_ID, UNK_ID = range(4)
MASK_TOKEN = "<mask>"

# Bounds the time and memory of training. For English, merges learned from the first 100 MB are the
# merges of a whole corpus.
MAX_TRAINING_BYTES = 100_000_000

_FAIRSEQ_FILES = ("encoder.json", "vocab.bpe", "dict.txt")


def _byte_characters() -> list[str]:
    """The printable character that represents each byte in the vocabulary, as GPT-2's encoder.py.

    Printable Latin-1 bytes represent themselves. The other bytes (space, controls, ...) are mapped
    to the characters from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE with RoBERTa's special tokens.

    Reads the first `MAX_TRAINING_BYTES` of the text. A small corpus yields fewer merges than
    requested, so take V from the result's `get_vocab_size()`. The same documents in the same order
    give the same tokenizer.

    Raises:
        InputError: `vocab_size` has no room for the special tokens and the 256 bytes.
    """
    from tokenizers import Tokenizer, models, trainers

    smallest = len(SPECIAL_TOKENS) + 256 + 1
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size {vocab_size} is too small: the {len(SPECIAL_TOKENS) + 1} special tokens "
            f"and 256 bytes alone take {smallest}; give {smallest} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    _add_byte_level_parts(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # <mask> is added afterwards, so that its id is the last
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        # All 256 bytes; otherwise bytes that are not in the training text could not be encoded.
        initial_alphabet=_byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(documents, MAX_TRAINING_BYTES), trainer)
    _add_special_tokens(tokenizer)
    check_tokenizer(tokenizer, "the trained tokenizer")
    return tokenizer


def load_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
    """Loads a tokenizer from a `tokenizer.json`, or from a directory with one of, in this order:

    * `tokenizer.json`
    * `vocab.json` and `merges.txt` (Hugging Face)
    * `encoder.json`, `vocab.bpe` and `dict.txt` (fairseq: GPT-2's BPE and the checkpoint's
      dictionary; the id is 4 + the row in dict.txt, `madeupword` rows are kept, `<mask>` is last;
      fairseq/data/dictionary.py and fairseq/tasks/masked_lm.py)

    Raises:
        InputError: naming the file that is missing, unreadable, or not a RoBERTa tokenizer.
    """
    path = Path(path).expanduser()
    if path.is_file():
        tokenizer = _read_tokenizer_json(path)
    elif (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
        tokenizer = _read_tokenizer_json(path)
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        tokenizer = _from_vocab_and_merges(
            _read_vocab(path / "vocab.json"), _read_merges(path / "merges.txt"), path
        )
    elif all((path / name).is_file() for name in _FAIRSEQ_FILES):
        tokenizer = _from_vocab_and_merges(
            _fairseq_vocab(path), _read_merges(path / "vocab.bpe"), path
        )
    elif not path.exists():
        raise InputError(f"tokenizer {path} does not exist: name a tokenizer.json or its directory")
    else:
        found = sorted(child.name for child in path.iterdir())[:8]
        raise InputError(
            f"tokenizer directory {path} holds neither tokenizer.json, nor vocab.json + "
            f"merges.txt, nor fairseq's {' + '.join(_FAIRSEQ_FILES)}; "
            f"it holds {', '.join(found) or 'nothing'}"
        )
    check_tokenizer(tokenizer, path)
    return tokenizer


def check_tokenizer(tokenizer: tokenizers.Tokenizer, name: str | Path) -> None:
    """Checks the special tokens' ids, `<mask>` last, contiguous ids, and a token for every byte.

    Raises:
        InputError: naming `name`, the token, and its actual and expected id.
    """
    vocab = tokenizer.get_vocab()
    size = tokenizer.get_vocab_size()
    expected = dict(zip(SPECIAL_TOKENS, range(4), strict=True)) | {MASK_TOKEN: size - 1}
    for token, expected_id in expected.items():
        if vocab.get(token) != expected_id:
            found = f"id {vocab[token]}" if token in vocab else "absent"
            where = f"id {expected_id}" + (" (the last)" if token == MASK_TOKEN else "")
            raise InputError(
                f"{name}: not a RoBERTa tokenizer: {token} is {found}, expected {where}; "
                "use one trained here or by RoBERTa, its ids are built into the model"
            )
    if sorted(vocab.values()) != list(range(size)):
        raise InputError(f"{name}: its {size} ids are not 0 to {size - 1}, each once; rebuild it")
    missing = [byte for byte, character in enumerate(_byte_characters()) if character not in vocab]
    if missing:
        raise InputError(
            f"{name}: not a byte-level BPE: {len(missing)} of 256 bytes have no token "
            f"(the first is byte {missing[0]:#04x}); use a tokenizer of RoBERTa's or GPT-2's kind"
        )


def save_tokenizer(
    tokenizer: tokenizers.Tokenizer, directory: str | Path, model_max_length: int
) -> None:
    """Writes Hugging Face's five files, which `AutoTokenizer` of transformers 4 and 5 loads.

    Args:
        directory: created if needed. transformers also needs the model's `config.json` there.
        model_max_length: maximal number of tokens of a row, including special tokens:
            max_position_embeddings - 2.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    _write_json(directory / "vocab.json", dict(by_id), indent=None)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (directory / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8"
    )

    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    mask = {"content": MASK_TOKEN, **plain, "lstrip": True}
    roles = {
        "bos_token": BOS_TOKEN,
        "cls_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "sep_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        "unk_token": UNK_TOKEN,
    }
    added = {
        str(tokenizer.token_to_id(token)): {"content": token, **plain, "special": True}
        for token in SPECIAL_TOKENS
    } | {str(tokenizer.token_to_id(MASK_TOKEN)): {**mask, "special": True}}
    _write_json(directory / "special_tokens_map.json", roles | {"mask_token": mask})
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "RobertaTokenizer",
            "model_max_length": model_max_length,
            "add_prefix_space": False,
            "trim_offsets": True,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            **roles,
            "mask_token": {"__type": "AddedToken", **mask, "special": True},
            "added_tokens_decoder": added,
        },
    )


def word_start_mask(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """bool [V]: which ids begin a word, for whole-word masking.

    The rule is fairseq's (fairseq/data/encoders/utils.py with gpt2_bpe.py): a token begins a word
    if its text begins with a space; special tokens and `madeupword` rows always do. Here, any ASCII
    whitespace counts, because documents may hold newlines, which fairseq's never do. Consequences:

    * Punctuation belongs to the word before it: " (not" + "," is one word, as is " don" + "'t".
    * Whitespace, newlines included, belongs to the word after it.
    * The first token of a text has no space before it, so it is False although it begins a word.
      Callers must therefore also begin a word after each special token. fairseq does not, and so
      masks `<s>` together with the first token.
    """
    whitespace = {_byte_characters()[byte] for byte in b" \t\n\r\v\f"}
    tokens = _tokens_by_id(tokenizer)
    starts = np.array([token[:1] in whitespace or token[:10] == "madeupword" for token in tokens])
    starts[[*range(len(SPECIAL_TOKENS)), tokenizer.token_to_id(MASK_TOKEN)]] = True
    return starts


def newline_mask(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """bool [V]: which ids have a newline in their text."""
    newline = _byte_characters()[ord("\n")]
    return np.array([newline in token for token in _tokens_by_id(tokenizer)])


def _tokens_by_id(tokenizer: tokenizers.Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]


def _first_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    for document in documents:
        yield document
        limit -= len(document.encode())
        if limit <= 0:
            return


def _add_byte_level_parts(tokenizer: tokenizers.Tokenizer) -> None:
    from tokenizers import decoders, pre_tokenizers, processors

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The first two by position: their names differ between releases of tokenizers.
    tokenizer.post_processor = processors.RobertaProcessing(
        (EOS_TOKEN, EOS_ID), (BOS_TOKEN, BOS_ID), trim_offsets=True, add_prefix_space=False
    )


def _add_special_tokens(tokenizer: tokenizers.Tokenizer) -> None:
    """Marks special tokens. Those in the vocabulary keep their ids; others get the next ids."""
    from tokenizers import AddedToken

    tokens = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    # "Paris is <mask>." must not leave a lone space before the mask.
    mask = AddedToken(MASK_TOKEN, lstrip=True, normalized=False, special=True)
    tokenizer.add_special_tokens([*tokens, mask])


def _from_vocab_and_merges(
    vocab: dict[str, int], merges: list[tuple[str, str]], directory: Path
) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, models

    absent = [a + b for a, b in merges if not {a, b, a + b} <= vocab.keys()]
    if absent:
        raise InputError(
            f"{directory}: {len(absent)} of {len(merges)} merges need tokens that the vocabulary "
            f"lacks (the first makes {absent[0]!r}): the files do not belong together, or the "
            "dictionary was reduced to the tokens seen; use the full one"
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    _add_byte_level_parts(tokenizer)
    _add_special_tokens(tokenizer)
    return tokenizer


def _fairseq_vocab(directory: Path) -> dict[str, int]:
    """token -> id. Rows of dict.txt are `gpt2id count`; encoder.json maps tokens to GPT-2 ids."""
    gpt2_tokens = {
        str(gpt2_id): token for token, gpt2_id in _read_vocab(directory / "encoder.json").items()
    }
    path = directory / "dict.txt"
    vocab = dict(zip(SPECIAL_TOKENS, range(4), strict=True))
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        symbol, _, rest = line.partition(" ")
        token = symbol if symbol.startswith(("madeupword", "<")) else gpt2_tokens.get(symbol)
        if token is None or not rest:
            raise InputError(
                f"{path}:{number}: expected 'id count', the id in encoder.json, found {line[:60]!r}"
            )
        if token in vocab:
            raise InputError(f"{path}:{number}: {token!r} occurs a second time")
        vocab[token] = len(vocab)
    return vocab | ({} if MASK_TOKEN in vocab else {MASK_TOKEN: len(vocab)})


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    text = _read_text(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(
            f"{path}: not a tokenizer.json of the tokenizers library: {error}"
        ) from error


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        vocab = json.loads(_read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise InputError(f"{path}: expected a JSON object from token to id")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip() and not (number == 1 and line.startswith("#version")):
            left, _, right = line.rstrip("\r").partition(" ")
            if not right or " " in right:
                raise InputError(f"{path}:{number}: expected two tokens, found {line[:60]!r}")
            merges.append((left, right))
    return merges


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _write_json(path: Path, value: object, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")

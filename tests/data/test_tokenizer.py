"""The tokenizer: ids of RoBERTa, every file layout, and agreement with transformers."""

import itertools
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, trainers

from prelnroberta.data import tokenizer as module
from prelnroberta.data.tokenizer import (
    check_tokenizer,
    load_tokenizer,
    newline_mask,
    save_tokenizer,
    train_tokenizer,
    word_start_mask,
)
from prelnroberta.errors import InputError

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.",
    "A model reads the words before and after the mask.\nThen it guesses the word.",
    "Words that were seen, words that were not: the model is asked for all of them!",
] * 3
PROBES = [
    "Paris is <mask>.",
    " Hello\nworld,  it's  <mask><mask> 42",
    "é 日本 🙂\t\r\n",
    "",
    "<s></s>",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


def pieces(tokenizer):
    return [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]


def test_special_tokens_have_roberta_ids_and_mask_is_last(tokenizer):
    names = pieces(tokenizer)
    assert names[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert names[-1] == "<mask>"
    assert tokenizer.encode("a").ids[0] == 0
    assert tokenizer.encode("a").ids[-1] == 2
    pair = tokenizer.encode("a", "b").ids
    assert [i for i in pair if i < 4] == [0, 2, 2, 2]


def test_mask_token_includes_preceding_space(tokenizer):
    assert tokenizer.encode("is <mask>.").ids == tokenizer.encode("is<mask>.").ids


@settings(deadline=None, max_examples=200)
@given(st.text().filter(lambda text: "<" not in text))
def test_any_text_round_trips(tokenizer, text):
    encoding = tokenizer.encode(text)
    assert module.UNK_ID not in encoding.ids
    assert tokenizer.decode(encoding.ids) == text


def test_offsets_exclude_leading_space(tokenizer):
    text = "over the dog"
    spans = [text[start:end] for start, end in tokenizer.encode(text).offsets]
    assert "".join(spans) == "overthedog"


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer(TEXTS, 400).to_str() == tokenizer.to_str()


def test_small_corpus_gives_fewer_tokens_than_requested():
    tokenizer = train_tokenizer(TEXTS, 100_000)
    assert 261 < tokenizer.get_vocab_size() < 1000
    assert tokenizer.token_to_id("<mask>") == tokenizer.get_vocab_size() - 1


def test_smallest_vocabulary_is_special_tokens_and_bytes():
    assert train_tokenizer(TEXTS, 261).get_vocab_size() == 261
    with pytest.raises(InputError, match=r"vocab_size 260.*261"):
        train_tokenizer(TEXTS, 260)


def test_training_reads_at_most_its_byte_limit(monkeypatch):
    monkeypatch.setattr(module, "MAX_TRAINING_BYTES", 2000)
    train_tokenizer(itertools.cycle(TEXTS), 300)  # would not end otherwise


def test_every_file_layout_loads_to_the_same_ids(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, 510)
    expected = [tokenizer.encode(probe).ids for probe in PROBES]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert [load_tokenizer(path).encode(probe).ids for probe in PROBES] == expected
    (tmp_path / "tokenizer.json").unlink()  # now from vocab.json and merges.txt
    loaded = load_tokenizer(tmp_path)
    assert [loaded.encode(probe).ids for probe in PROBES] == expected
    models = [json.loads(each.to_str())["model"] for each in (loaded, tokenizer)]
    assert models[0]["merges"] == models[1]["merges"]


def write_fairseq(tokenizer, directory, rows=None):
    """A fairseq triple of the tokenizer's pieces: GPT-2 ids in one order, dict.txt in another."""
    save_tokenizer(tokenizer, directory, 510)
    merges = (directory / "merges.txt").read_text()
    for file in directory.iterdir():
        file.unlink()
    ordinary = pieces(tokenizer)[4:-1]
    gpt2_ids = {piece: i for i, piece in enumerate(reversed(ordinary))}
    (directory / "encoder.json").write_text(json.dumps(gpt2_ids))
    (directory / "vocab.bpe").write_text(merges)
    if rows is None:
        order = np.random.default_rng(0).permutation(len(ordinary))
        rows = [f"{i} 7" for i in order] + ["madeupword0000 0", "madeupword0001 0"]
    (directory / "dict.txt").write_text("\n".join(rows) + "\n")
    return {str(i): piece for piece, i in gpt2_ids.items()}, rows


def test_fairseq_ids_follow_dict_txt(tokenizer, tmp_path):
    piece_of, rows = write_fairseq(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab_size() == 4 + len(rows) + 1
    for row, line in enumerate(rows):
        symbol = line.split()[0]
        assert loaded.token_to_id(piece_of.get(symbol, symbol)) == 4 + row
    assert loaded.token_to_id("<mask>") == 4 + len(rows)
    for probe in PROBES:  # other ids, same pieces
        assert loaded.encode(probe).tokens == tokenizer.encode(probe).tokens


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0 7", "99999 7"], r"dict\.txt:2: expected 'id count'"),
        (["0 7", "1"], r"dict\.txt:2: expected 'id count'"),
        (["0 7", "0 7"], r"dict\.txt:2: .* second time"),
        (["0 7", "1 7"], r"merges need tokens"),
    ],
)
def test_bad_fairseq_dictionaries_raise(tokenizer, tmp_path, rows, message):
    write_fairseq(tokenizer, tmp_path, rows)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


def test_bad_paths_and_files_raise(tmp_path):
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds neither .* it holds config\.json"):
        load_tokenizer(tmp_path)
    bad = tmp_path / "tokenizer.json"
    bad.write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(bad)
    bad.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"tokenizer\.json: not UTF-8 at byte 2"):
        load_tokenizer(tmp_path)
    bad.unlink()
    (tmp_path / "vocab.json").write_text("[]")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(InputError, match=r"vocab\.json: expected a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(InputError, match=r"1 of 1 merges"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(InputError, match=r"merges\.txt:1: expected two tokens"):
        load_tokenizer(tmp_path)


def test_check_reports_token_with_found_and_expected_id(tokenizer, tmp_path):
    early = Tokenizer(models.BPE())
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    early.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=specials, vocab_size=300))
    with pytest.raises(InputError, match=r"file: .*<mask> is id 4, expected id \d+ \(the last\)"):
        check_tokenizer(early, "file")
    with pytest.raises(InputError, match=r"<s> is absent, expected id 0"):
        check_tokenizer(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])), "file")
    few = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(specials)}, merges=[]))
    with pytest.raises(InputError, match=r"not a byte-level BPE: 256 of 256"):
        check_tokenizer(few, "file")
    vocab = tokenizer.get_vocab()
    vocab["A"] = 1000
    holed = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    with pytest.raises(InputError, match=r"ids are not 0 to \d+"):
        check_tokenizer(holed, "file")


@pytest.mark.oracle
def test_transformers_loads_saved_tokenizer(tokenizer, tmp_path, caplog, capfd):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path, model_max_length=62)
    config = {"model_type": "roberta-prelayernorm", "vocab_size": tokenizer.get_vocab_size()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert not caplog.records
    assert capfd.readouterr().err == ""
    assert theirs.model_max_length == 62
    assert len(theirs) == tokenizer.get_vocab_size()
    assert theirs.added_tokens_decoder[len(theirs) - 1].lstrip
    assert not theirs.added_tokens_decoder[0].lstrip
    assert [theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id] == [0, 1, 2]
    assert [theirs.cls_token_id, theirs.sep_token_id, theirs.unk_token_id] == [0, 2, 3]
    assert theirs.mask_token_id == len(theirs) - 1
    for probe in PROBES:
        assert theirs(probe)["input_ids"] == tokenizer.encode(probe).ids
        assert theirs(probe, "so")["input_ids"] == tokenizer.encode(probe, "so").ids
    text = "It isn't , is it ?"
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text


def test_word_starts_follow_fairseq(tokenizer):
    starts = word_start_mask(tokenizer)
    assert starts.shape == (tokenizer.get_vocab_size(),)
    assert starts.dtype == bool

    def words(text):
        encoding = tokenizer.encode(text)
        groups = []
        for i, piece in zip(encoding.ids, encoding.tokens, strict=True):
            groups += [piece] if starts[i] else []
            groups[-1] += "" if starts[i] else piece
        return groups

    # The first piece has no space, so that fairseq's rule alone leaves it with <s>.
    assert words("Xylo zebra, don't!")[:3] == ["<s>Xylo", "Ġzebra,", "Ġdon't!"]
    assert words(" a\nb") == ["<s>", "Ġa", "Ċb", "</s>"]
    assert starts[[0, 1, 2, 3, -1]].all()
    assert not starts[tokenizer.token_to_id(",")]


def test_madeupword_tokens_start_words(tokenizer, tmp_path):
    write_fairseq(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert word_start_mask(loaded)[loaded.token_to_id("madeupword0000")]


def test_line_end_tokens_contain_a_newline(tokenizer):
    ends = newline_mask(tokenizer)
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(len(ends))]
    assert ends.tolist() == ["\n" in text for text in texts]
    assert ends.any()


def test_fork_after_training_does_not_warn_or_hang():
    code = """
import os, sys
from prelnroberta.data.tokenizer import train_tokenizer
tokenizer = train_tokenizer(["some words, some more words"] * 9, 300)
tokenizer.encode_batch(["some words"] * 50)
child = os.fork()
if child == 0:
    tokenizer.encode_batch(["some words"] * 50)
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

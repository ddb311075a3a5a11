"""Token files: their content, their reuse, and that incomplete files are never read."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from prelnroberta.data.pretraining import docstrings
from prelnroberta.data.pretraining import token_files as module
from prelnroberta.data.pretraining.corpus import Document, FileCorpus, in_validation_split
from prelnroberta.data.pretraining.token_files import TokenFiles, tokenize_corpus
from prelnroberta.data.tokenizer import EOS_ID, save_tokenizer, train_tokenizer
from prelnroberta.errors import InputError


class Texts:
    """A corpus of given texts that counts how often it is read."""

    def __init__(self, texts, name="texts"):
        self.texts, self.name, self.reads = texts, name, 0

    def documents(self):
        self.reads += 1
        yield from (Document(text, text[:20]) for text in self.texts)

    def manifest(self):
        return {"kind": self.name}


TEXTS = [
    f"{i} is the number of this text, which says:\nno <mask> or </s> here." for i in range(200)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def decoded(tokenizer, files):
    starts = [0, *files.document_ends[:-1]]
    documents = []
    for start, end in zip(starts, files.document_ends, strict=True):
        assert files.tokens[end - 1] == EOS_ID
        assert not (files.tokens[start : end - 1] < 4).any()
        documents.append(tokenizer.decode(files.tokens[start : end - 1]))
    return documents


def test_every_document_is_in_its_split_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_BYTES", 1000)
    train, validation = tokenize_corpus(Texts(TEXTS), tokenizer, tmp_path, validation_fraction=0.2)
    for files, held_out in ((train, False), (validation, True)):
        expected = [text for text in TEXTS if in_validation_split(text[:20], 0.2) == held_out]
        assert decoded(tokenizer, files) == expected
        assert files.document_ends[-1] == len(files.tokens)
        assert files.tokens.dtype == np.uint16
        assert files.document_ends.dtype == files.counts.dtype == np.int64
        counts = np.bincount(files.tokens, minlength=tokenizer.get_vocab_size())
        np.testing.assert_array_equal(files.counts, counts)
        assert files.manifest["text"]["documents"] == len(TEXTS)
        assert files.manifest["text"]["bytes"] == sum(map(len, TEXTS))
    assert validation.manifest["split"] == "validation"


def test_special_tokens_in_text_are_plain_text_and_tokenizer_is_unchanged(tokenizer, tmp_path):
    before = tokenizer.to_str()
    train, _ = tokenize_corpus(Texts(["say <mask></s>"]), tokenizer, tmp_path, 0.0)
    assert tokenizer.token_to_id("<mask>") not in train.tokens
    assert (train.tokens == EOS_ID).sum() == 1
    assert tokenizer.to_str() == before
    assert tokenizer.token_to_id("<mask>") in tokenizer.encode("say <mask>").ids


def test_id_dtype_follows_vocabulary_size(tmp_path):
    writer = module._SplitWriter(tmp_path / "a", (1 << 16) + 1)
    writer.add([[1 << 16]])
    writer.close({})
    assert TokenFiles.open(tmp_path / "a").tokens.tolist() == [1 << 16, EOS_ID]
    assert module._SplitWriter(tmp_path / "b", 1 << 16).dtype == np.uint16


def test_second_call_reuses_files(tokenizer, tmp_path, capfd):
    corpus = Texts(TEXTS)
    first, _ = tokenize_corpus(corpus, tokenizer, tmp_path)
    said = capfd.readouterr().err
    assert said.count("\n") == 1  # no bar where there is no terminal
    assert "200 documents" in said
    second, _ = tokenize_corpus(corpus, tokenizer, tmp_path)
    assert "reusing" in capfd.readouterr().err
    assert corpus.reads == 1
    assert first.directory == second.directory


def test_cache_key_covers_everything_that_changes_tokens(tokenizer, tmp_path):
    corpora = [Texts(TEXTS), Texts(TEXTS, name="other")]
    made = [tokenize_corpus(corpus, tokenizer, tmp_path)[0].directory for corpus in corpora]
    made.append(tokenize_corpus(corpora[0], tokenizer, tmp_path, 0.1)[0].directory)
    made.append(tokenize_corpus(corpora[0], train_tokenizer(TEXTS, 290), tmp_path)[0].directory)
    assert len(set(made)) == 4


def test_the_version_of_the_extraction_rules_is_in_the_cache_key(tokenizer, tmp_path, monkeypatch):
    sentence = "The beginning of the module is to say a thing that no other one says."
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text(f'"""{sentence}\n"""\n')
    corpus = docstrings.DocstringCorpus([])
    corpus.roots = {"package": [tmp_path / "package"]}
    cache = tmp_path / "cache"
    before = tokenize_corpus(corpus, tokenizer, cache, 0.0)[0]
    assert decoded(tokenizer, before) == [sentence]
    assert tokenize_corpus(corpus, tokenizer, cache, 0.0)[0].directory == before.directory
    monkeypatch.setattr(docstrings, "EXTRACTION_VERSION", docstrings.EXTRACTION_VERSION + 1)
    assert tokenize_corpus(corpus, tokenizer, cache, 0.0)[0].directory != before.directory


def only_locks(directory):
    return all(path.suffix == ".lock" for path in directory.iterdir())


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt("stopped"), KeyboardInterrupt, "stopped"),
        (InputError("a.txt: not UTF-8"), InputError, "a.txt: not UTF-8"),
        (OSError(errno.ENOSPC, "full"), InputError, "token files in .*: the disk is full"),
        (OSError(errno.EIO, "broken"), OSError, "broken"),
    ],
)
def test_failure_leaves_no_files(tokenizer, tmp_path, monkeypatch, error, raised, message):
    def fail(self, documents):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module._SplitWriter, "add", fail)
        with pytest.raises(raised, match=message):
            tokenize_corpus(Texts(TEXTS), tokenizer, tmp_path)
    assert only_locks(tmp_path)
    train, _ = tokenize_corpus(Texts(TEXTS), tokenizer, tmp_path)
    assert len(train.document_ends) > 100


def test_unwritable_folder_raises_with_its_name(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"token files in .*file: not a directory"):
        tokenize_corpus(Texts(TEXTS), tokenizer, tmp_path / "file")


def start(directory, delay):
    (directory / "a.txt").exists() or (directory / "a.txt").write_text("\n\n".join(TEXTS))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.programs.tokenize_slowly", str(directory), str(delay)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_preparation_is_restarted_and_cleaned_up(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, 510)
    killed = start(tmp_path, 60)
    assert killed.stdout.readline() == "reading\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert list(tmp_path.glob(".*.partial"))
    train, _ = tokenize_corpus(FileCorpus([str(tmp_path / "a.txt")]), tokenizer, tmp_path)
    assert len(train.document_ends) > 100
    assert not list(tmp_path.glob(".*.partial"))


def test_concurrent_preparation_waits_for_the_first(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, 510)
    first = start(tmp_path, 3)
    assert first.stdout.readline() == "reading\n"
    second = start(tmp_path, 3)
    (one, one_said), (two, two_said) = first.communicate(), second.communicate()
    assert (first.returncode, second.returncode) == (0, 0), one_said + two_said
    assert "200 documents" in one_said
    assert "waiting" in two_said
    assert "reusing" in two_said
    assert one == two


def test_truncated_and_missing_files_raise(tokenizer, tmp_path):
    train, _ = tokenize_corpus(Texts(TEXTS), tokenizer, tmp_path)
    tokens = train.directory / "tokens.bin"
    os.truncate(tokens, 100)
    with pytest.raises(InputError, match=r"train/tokens\.bin: 100 bytes, its manifest says \d+"):
        tokenize_corpus(Texts(TEXTS), tokenizer, tmp_path)
    tokens.unlink()
    with pytest.raises(InputError, match=r"tokens\.bin"):
        TokenFiles.open(train.directory)
    for content in ("{", "[]", '{"files": {}}', '{"files": {"tokens": {}}}'):
        (train.directory / "manifest.json").write_text(content)
        with pytest.raises(InputError, match=r"not a directory of token files"):
            TokenFiles.open(train.directory)
    with pytest.raises(InputError, match=r"nowhere: not a directory of token files"):
        TokenFiles.open(tmp_path / "nowhere")


def test_empty_split_raises_unless_allowed(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"the validation split is empty: none of .* 1 document"):
        tokenize_corpus(Texts(TEXTS[:1]), tokenizer, tmp_path, 0.001)
    with pytest.raises(InputError, match=r"the train split is empty"):
        tokenize_corpus(Texts(TEXTS), tokenizer, tmp_path, 1.0)
    assert only_locks(tmp_path)
    _, validation = tokenize_corpus(Texts(TEXTS), tokenizer, tmp_path, 0.0)
    assert len(validation.tokens) == len(validation.document_ends) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """3 MB and then 23 MB: the second may take a little more for pools and caches, not 20 MB."""
    paragraph = "Understanding representations notwithstanding " * 400
    save_tokenizer(train_tokenizer([paragraph], 400), tmp_path, 510)
    for name, count in (("small", 165), ("large", 1265)):
        numbered = (f"{i} {paragraph}\n\n" for i in range(count))
        (tmp_path / f"{name}.txt").write_text("".join(numbered))
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.tokenize_and_measure", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 10, done.stdout

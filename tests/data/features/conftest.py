"""A small tokenizer, and the same one as transformers loads it."""

import pytest

from prelnroberta.data.tokenizer import save_tokenizer, train_tokenizer
from tests.helpers.programs import corpus_file


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(corpus_file().read_text().split("\n\n"), 600)


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, folder, 512)
    (folder / "config.json").write_text('{"model_type": "roberta-prelayernorm"}')
    return folder


@pytest.fixture(scope="session")
def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)

"""Features of texts and pairs, against transformers on random texts."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from prelnroberta.config import IGNORE_INDEX, MULTI_LABEL, REGRESSION
from prelnroberta.data.features.sequence_classification import text_features
from prelnroberta.data.features.token_classification import token_features
from prelnroberta.data.readers.classification import TextExample
from prelnroberta.data.readers.conll import Sentence
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.data.tokenizer import PAD_ID
from prelnroberta.errors import InputError
from tests.helpers.random_texts import assert_same_ids, random_text


@pytest.mark.oracle
@pytest.mark.parametrize("max_length", [4, 9, 16, 40, 512])
def test_texts_and_pairs_match_transformers(tokenizer, theirs, max_length):
    rng = np.random.default_rng(max_length)
    firsts, seconds = ([random_text(rng, 14) for _ in range(400)] for _ in range(2))
    for pairs in (None, seconds):
        places = [f"f:{i}" for i in range(400)]
        examples = [
            TextExample(*e) for e in zip(places, firsts, pairs or [None] * 400, strict=True)
        ]
        features = text_features(examples, tokenizer, max_length)
        assert_same_ids(
            features.input_ids,
            theirs(firsts, pairs, truncation=True, max_length=max_length)["input_ids"],
        )
        full = [len(ids) for ids in theirs(firsts, pairs)["input_ids"]]
        assert features.num_truncated == sum(length > max_length for length in full)
        assert features.labels is None and "labels" not in features.batch(np.array([0]), 512)


def test_padding_and_truncation_of_given_tokenizer_are_ignored_and_kept(tokenizer):
    before = tokenizer.encode("one").ids
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(5)
    other.enable_padding(pad_id=PAD_ID, pad_token="<pad>", length=9)
    examples = [TextExample("f:1", "one two three four five"), TextExample("f:2", "a", "b c d")]
    found = text_features(examples, other, 512).input_ids
    assert_same_ids(
        found, [ids.tolist() for ids in text_features(examples, tokenizer, 512).input_ids]
    )
    words = [Sentence("f:1", ["one"] * 9, None)]
    assert_same_ids(
        token_features(words, other, 64).input_ids,
        [ids.tolist() for ids in token_features(words, tokenizer, 64).input_ids],
    )
    assert other.truncation["max_length"] == 5 and other.padding["length"] == 9
    assert tokenizer.encode("one").ids == before, "no space before the first word"


@pytest.mark.oracle
def test_pad_token_spelled_in_text_is_attended(tokenizer, theirs):
    features = text_features(
        [TextExample("f:1", "a <pad> b"), TextExample("f:2", "a")], tokenizer, 16
    )
    batch = features.batch(np.array([0, 1, -1]), 16)
    expected = theirs(["a <pad> b", "a", ""], padding="max_length", max_length=16)
    assert PAD_ID in features.input_ids[0]
    np.testing.assert_array_equal(batch["attention_mask"][:2], expected["attention_mask"][:2])
    np.testing.assert_array_equal(batch["input_ids"][:2], expected["input_ids"][:2])
    assert not batch["attention_mask"][2].any()


def test_label_arrays_of_every_problem_type(tokenizer):
    def batch(problem_type, labels, values, indices=(1, -1, 0)):
        examples = [TextExample(f"f:{i}", "a b", None, value) for i, value in enumerate(values)]
        features = text_features(examples, tokenizer, 16, problem_type, labels)
        return features.batch(np.array(indices), 8)

    single = batch("single_label_classification", ["no", "yes"], ["yes", "no"])
    assert single["labels"].tolist() == [0, IGNORE_INDEX, 1] and single["labels"].dtype == np.int32
    assert single["weights"].tolist() == [1, 0, 1]
    assert single["input_ids"].shape == (3, 8) and (single["input_ids"][1] == PAD_ID).all()
    np.testing.assert_array_equal(single["attention_mask"], single["input_ids"] != PAD_ID)
    several = batch(MULTI_LABEL, ["x", "y", "z"], [["z", "x"], "y, z"])
    assert several["labels"].tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 1]]
    assert several["labels"].dtype == np.float32
    numbers = batch(REGRESSION, (), ["2.5", -1])
    assert numbers["labels"].tolist() == [-1, 0, 2.5] and numbers["labels"].dtype == np.float32


def test_unknown_labels_raise_or_are_counted(tokenizer):
    values = ["yes", "maybe", "no", "perhaps"]
    examples = [TextExample(f"f.csv:{i}", "a", None, v) for i, v in enumerate(values)]
    with pytest.raises(
        InputError, match=r"2 of 4 rows are bad: f.csv:1: label 'maybe' is not among"
    ):
        text_features(examples, tokenizer, 8, labels=["yes", "no"])
    bad = RowErrors(skip=True)
    features = text_features(examples, tokenizer, 8, labels=["yes", "no"], row_errors=bad)
    assert [e.location for e in features.examples] == ["f.csv:0", "f.csv:2"] and len(
        bad.problems
    ) == 2
    assert len(features.input_ids) == len(features.labels) == 2
    for label in ("high", "nan", None, True):
        with pytest.raises(InputError, match="expected a number as label"):
            text_features(
                [TextExample("f:1", "a", None, 1.0), TextExample("f:2", "a", None, label)],
                tokenizer,
                8,
                REGRESSION,
            )
    with pytest.raises(InputError, match="max_length=3: expected 4 or more"):
        text_features([TextExample("f:1", "a")], tokenizer, 3)
    with pytest.raises(InputError, match="no examples left"):
        text_features([], tokenizer, 8)
    with pytest.raises(InputError, match="label 'q' is not among"):
        text_features([TextExample("f:1", "a", None, ["x", "q"])], tokenizer, 8, MULTI_LABEL, ["x"])

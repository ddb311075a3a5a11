"""Features of tagged words, against transformers on random sentences."""

import numpy as np
import pytest

from prelnroberta.config import IGNORE_INDEX
from prelnroberta.data.features.token_classification import decode_entities, token_features
from prelnroberta.data.readers.conll import Sentence
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.errors import InputError
from tests.helpers.random_texts import TAGS, WORDS, assert_same_ids, random_sentences


@pytest.mark.oracle
@pytest.mark.parametrize("max_length, stride", [(512, None), (12, 0), (16, 5), (9, 6)])
def test_words_match_transformers(tokenizer, folder, max_length, stride):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
    given = list(random_sentences(np.random.default_rng(1), 500, 12))
    features = token_features(given, tokenizer, max_length, TAGS, doc_stride=stride)
    expected = theirs(
        [sentence.words for sentence in given],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        stride=stride or 0,
        return_overflowing_tokens=True,
    )
    assert_same_ids(features.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(features.example_indices, expected["overflow_to_sample_mapping"])

    asked = [set() for _ in given]
    for row, owner in enumerate(features.example_indices):
        word_ids = expected.word_ids(row)
        wanted = np.full(len(word_ids), IGNORE_INDEX)
        for position, word in features.word_positions[row]:
            assert word_ids[position] == word and word not in asked[owner]
            asked[owner].add(int(word))
            wanted[position] = TAGS.index(given[owner].tags[word])
        np.testing.assert_array_equal(features.labels[row], wanted)
        if max_length == 512:  # the guide's rule: the first piece of each word
            guide = [
                IGNORE_INDEX
                if word is None or (i and word == word_ids[i - 1])
                else TAGS.index(given[owner].tags[word])
                for i, word in enumerate(word_ids)
            ]
            assert features.labels[row].tolist() == guide
    assert asked == [set(range(len(sentence.words))) for sentence in given], "no word is lost"


def test_later_tokens_of_a_word_have_inside_tags(tokenizer):
    given = list(random_sentences(np.random.default_rng(2), 200, 12))
    first = token_features(given, tokenizer, 512, TAGS)
    every = token_features(given, tokenizer, 512, TAGS, label_all_tokens=True)
    for sentence, a, b, asked in zip(
        given, first.labels, every.labels, first.word_positions, strict=True
    ):
        np.testing.assert_array_equal(b[a != IGNORE_INDEX], a[a != IGNORE_INDEX])
        assert b[0] == b[-1] == IGNORE_INDEX and (b[1:-1] != IGNORE_INDEX).all()
        word = -1
        for position in range(1, len(a) - 1):
            word += a[position] != IGNORE_INDEX
            tag = sentence.tags[word]
            if a[position] == IGNORE_INDEX:
                assert TAGS[b[position]] == ("I" + tag[1:] if tag[0] == "B" else tag)
        assert len(asked) == len(sentence.words)
    plain = token_features(
        [Sentence("f:1", ["supercalifragilistic"], ["NOUN"])], tokenizer, 512, ["NOUN"], True
    )
    assert (plain.labels[0][1:-1] == 0).all()


def test_word_is_predicted_in_window_with_most_context(tokenizer):
    words = ["a"] * 30
    features = token_features([Sentence("f:1", words, None)], tokenizer, 12, doc_stride=6)
    assert features.labels is None and len(features.input_ids) > 2
    (answers,) = features.gather_words(
        [np.arange(len(ids))[:, None] * np.ones(2) for ids in features.input_ids]
    )
    assert answers.shape == (30, 2)
    middle = answers[5:-5, 0]
    assert (np.minimum(middle, 11 - middle) >= 3).all(), "not at the edges of a row"


def test_sentence_of_25000_characters_keeps_every_word(tokenizer):
    words = np.random.default_rng(0).choice([w for w in WORDS if w.strip()], 5000).tolist()
    tags = np.random.default_rng(1).choice(TAGS, 5000).tolist()
    features = token_features([Sentence("f:1", words, tags)], tokenizer, 64, TAGS)
    assert max(features.lengths) == 64 and len(" ".join(words)) > 25_000
    (found,) = features.gather_words(features.labels)
    assert [TAGS[i] for i in found] == tags


def test_numeric_tags_map_to_names(tokenizer):
    numbered = [Sentence("f:1", ["a", "b"], ["2", "0"])]
    features = token_features(numbered, tokenizer, 16, TAGS)
    assert features.examples[0].tags == ["I-x", "O"]


def test_unknown_tags_and_invalid_strides_raise(tokenizer):
    given = [Sentence("f:1", ["a"], ["B-x"]), Sentence("f:2", ["a", "b"], ["O", "B-q"])]
    with pytest.raises(InputError, match=r"1 of 2 rows are bad: f:2: word 1: label 'B-q' is not"):
        token_features(given, tokenizer, 16, TAGS)
    bad = RowErrors(skip=True)
    assert (
        len(token_features(given, tokenizer, 16, TAGS, row_errors=bad).examples) == 1
        and bad.problems
    )
    with pytest.raises(InputError, match="doc_stride=14"):
        token_features(given[:1], tokenizer, 16, TAGS, doc_stride=14)


def test_decoded_entities_have_words_and_scores():
    sentence = Sentence("f:1", ["in", "New", "York", "City", "Ann"], None)
    found = decode_entities(
        sentence, ["O", "B-loc", "I-loc", "I-loc", "I-per"], [0.9, 0.5, 0.7, 0.9, 0.4]
    )
    assert [(e.type, e.start, e.end, e.text) for e in found] == [
        ("loc", 1, 4, "New York City"),
        ("per", 4, 5, "Ann"),
    ]
    assert [e.score for e in found] == pytest.approx([0.7, 0.4])
    assert decode_entities(sentence, ["ADP"] * 5, [1.0] * 5) == []

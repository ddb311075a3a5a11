"""Features are those of transformers' own tokenizer and examples, on thousands of random inputs."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from prelnroberta.config import IGNORE_INDEX, MULTI_LABEL, REGRESSION
from prelnroberta.data.batches.buckets import evaluation_batches
from prelnroberta.data.batches.packed import TrainingBatches
from prelnroberta.data.features.language_modeling import Blocks, token_stream
from prelnroberta.data.features.multiple_choice import choice_features, masked_logits
from prelnroberta.data.features.question_answering import predict_answers, question_features
from prelnroberta.data.features.sequence_classification import text_features
from prelnroberta.data.features.token_classification import entities, token_features
from prelnroberta.data.pretraining.loader import Loader
from prelnroberta.data.pretraining.masking import Masking
from prelnroberta.data.readers.classification import TextExample
from prelnroberta.data.readers.conll import Sentence
from prelnroberta.data.readers.row_errors import BadRows
from prelnroberta.data.readers.squad import Answer, Question
from prelnroberta.data.readers.swag import ChoiceExample
from prelnroberta.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, save_tokenizer, train_tokenizer
from prelnroberta.errors import InputError
from tests.helpers.programs import corpus_file

WORDS = ["the", "of", "a", "in", "is", "model", "answer", "window", "question", "Don't", "it's"]
WORDS += ["U.S.", "1,000", "(see)", "e-mail", "—", "café\n日本語", "🙂", "naïve", "\xa0", "ﬁ"]
WORDS += ["supercalifragilistic", "http://x.y/z?a=b", "@user", "#tag", "<mask>", '"quoted"', "..."]
SPACES = [" "] * 12 + ["  ", "\n", "\t ", "\u3000"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus_file().read_text().split("\n\n"), 600)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, folder, 512)
    (folder / "config.json").write_text('{"model_type": "roberta-prelayernorm"}')
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def text(rng, most):
    """Words with odd spaces between them and, sometimes, around them."""
    words = rng.choice(WORDS, int(rng.integers(0, most + 1)))
    parts = [part for word in words for part in (word, rng.choice(SPACES))]
    return "".join([rng.choice(["", "", " "]), *parts[: len(parts) - int(rng.integers(0, 2))]])


def same_ids(found, expected):
    assert [ids.tolist() for ids in found] == expected


# ---------------------------------------------------------------------------------------------
# Sequence classification.


@pytest.mark.parametrize("max_length", [4, 9, 16, 40, 512])
def test_texts_and_pairs_as_transformers(tokenizer, theirs, max_length):
    rng = np.random.default_rng(max_length)
    firsts, seconds = ([text(rng, 14) for _ in range(400)] for _ in range(2))
    for pairs in (None, seconds):
        places = [f"f:{i}" for i in range(400)]
        examples = [
            TextExample(*e) for e in zip(places, firsts, pairs or [None] * 400, strict=True)
        ]
        features = text_features(examples, tokenizer, max_length)
        same_ids(
            features.input_ids,
            theirs(firsts, pairs, truncation=True, max_length=max_length)["input_ids"],
        )
        full = [len(ids) for ids in theirs(firsts, pairs)["input_ids"]]
        assert features.truncated == sum(length > max_length for length in full)
        assert features.labels is None and "labels" not in features.batch(np.array([0]), 512)


def test_what_the_callers_tokenizer_pads_or_cuts_is_not_read_and_stays(tokenizer):
    before = tokenizer.encode("one").ids
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(5)
    other.enable_padding(pad_id=PAD_ID, pad_token="<pad>", length=9)
    examples = [TextExample("f:1", "one two three four five"), TextExample("f:2", "a", "b c d")]
    found = text_features(examples, other, 512).input_ids
    same_ids(found, [ids.tolist() for ids in text_features(examples, tokenizer, 512).input_ids])
    words = [Sentence("f:1", ["one"] * 9, None)]
    same_ids(
        token_features(words, other, 64).input_ids,
        [ids.tolist() for ids in token_features(words, tokenizer, 64).input_ids],
    )
    assert other.truncation["max_length"] == 5 and other.padding["length"] == 9
    assert tokenizer.encode("one").ids == before, "no space before the first word"


def test_a_text_that_spells_pads_out_is_seen(tokenizer, theirs):
    features = text_features(
        [TextExample("f:1", "a <pad> b"), TextExample("f:2", "a")], tokenizer, 16
    )
    batch = features.batch(np.array([0, 1, -1]), 16)
    expected = theirs(["a <pad> b", "a", ""], padding="max_length", max_length=16)
    assert PAD_ID in features.input_ids[0]
    np.testing.assert_array_equal(batch["attention_mask"][:2], expected["attention_mask"][:2])
    np.testing.assert_array_equal(batch["input_ids"][:2], expected["input_ids"][:2])
    assert not batch["attention_mask"][2].any()


def test_labels_of_every_kind(tokenizer):
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


def test_labels_outside_the_map_are_named_and_counted(tokenizer):
    values = ["yes", "maybe", "no", "perhaps"]
    examples = [TextExample(f"f.csv:{i}", "a", None, v) for i, v in enumerate(values)]
    with pytest.raises(
        InputError, match=r"2 of 4 rows are bad: f.csv:1: label 'maybe' is not among"
    ):
        text_features(examples, tokenizer, 8, labels=["yes", "no"])
    bad = BadRows(skip=True)
    features = text_features(examples, tokenizer, 8, labels=["yes", "no"], bad=bad)
    assert [e.place for e in features.examples] == ["f.csv:0", "f.csv:2"] and len(bad.bad) == 2
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


# ---------------------------------------------------------------------------------------------
# Token classification.

TAGS = ("O", "B-x", "I-x", "B-y", "I-y")


def sentences(rng, n, most):
    words = [word for word in WORDS if word.strip()]
    for i in range(n):
        size = int(rng.integers(1, most + 1))
        yield Sentence(f"f:{i}", rng.choice(words, size).tolist(), rng.choice(TAGS, size).tolist())


@pytest.mark.parametrize("max_length, stride", [(512, None), (12, 0), (16, 5), (9, 6)])
def test_words_as_transformers(tokenizer, folder, max_length, stride):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
    given = list(sentences(np.random.default_rng(1), 500, 12))
    features = token_features(given, tokenizer, max_length, TAGS, doc_stride=stride)
    expected = theirs(
        [sentence.words for sentence in given],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        stride=stride or 0,
        return_overflowing_tokens=True,
    )
    same_ids(features.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(features.owners, expected["overflow_to_sample_mapping"])

    asked = [set() for _ in given]
    for row, owner in enumerate(features.owners):
        word_ids = expected.word_ids(row)
        wanted = np.full(len(word_ids), IGNORE_INDEX)
        for position, word in features.asked[row]:
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
    given = list(sentences(np.random.default_rng(2), 200, 12))
    first = token_features(given, tokenizer, 512, TAGS)
    every = token_features(given, tokenizer, 512, TAGS, label_all_tokens=True)
    for sentence, a, b, asked in zip(given, first.labels, every.labels, first.asked, strict=True):
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


def test_each_word_is_answered_where_it_has_most_context(tokenizer):
    words = ["a"] * 30
    features = token_features([Sentence("f:1", words, None)], tokenizer, 12, doc_stride=6)
    assert features.labels is None and len(features.input_ids) > 2
    (answers,) = features.by_word(
        [np.arange(len(ids))[:, None] * np.ones(2) for ids in features.input_ids]
    )
    assert answers.shape == (30, 2)
    middle = answers[5:-5, 0]
    assert (np.minimum(middle, 11 - middle) >= 3).all(), "not at the edges of a row"


def test_a_sentence_of_25000_characters_loses_no_word(tokenizer):
    words = np.random.default_rng(0).choice([w for w in WORDS if w.strip()], 5000).tolist()
    tags = np.random.default_rng(1).choice(TAGS, 5000).tolist()
    features = token_features([Sentence("f:1", words, tags)], tokenizer, 64, TAGS)
    assert max(features.lengths) == 64 and len(" ".join(words)) > 25_000
    (found,) = features.by_word(features.labels)
    assert [TAGS[i] for i in found] == tags


def test_tags_by_number_get_their_names(tokenizer):
    numbered = [Sentence("f:1", ["a", "b"], ["2", "0"])]
    features = token_features(numbered, tokenizer, 16, TAGS)
    assert features.examples[0].tags == ["I-x", "O"]


def test_unknown_tags_and_impossible_strides(tokenizer):
    given = [Sentence("f:1", ["a"], ["B-x"]), Sentence("f:2", ["a", "b"], ["O", "B-q"])]
    with pytest.raises(InputError, match=r"1 of 2 rows are bad: f:2: word 1: label 'B-q' is not"):
        token_features(given, tokenizer, 16, TAGS)
    bad = BadRows(skip=True)
    assert len(token_features(given, tokenizer, 16, TAGS, bad=bad).examples) == 1 and bad.bad
    with pytest.raises(InputError, match="doc_stride=14"):
        token_features(given[:1], tokenizer, 16, TAGS, doc_stride=14)


def test_entities_have_their_words_and_scores():
    sentence = Sentence("f:1", ["in", "New", "York", "City", "Ann"], None)
    found = entities(sentence, ["O", "B-loc", "I-loc", "I-loc", "I-per"], [0.9, 0.5, 0.7, 0.9, 0.4])
    assert [(e.type, e.start, e.end, e.text) for e in found] == [
        ("loc", 1, 4, "New York City"),
        ("per", 4, 5, "Ann"),
    ]
    assert [e.score for e in found] == pytest.approx([0.7, 0.4])
    assert entities(sentence, ["ADP"] * 5, [1.0] * 5) == []


# ---------------------------------------------------------------------------------------------
# Question answering.


def questions(rng, n, most):
    """Answers are any stretch of the context: whole words or parts, at its ends, or none."""
    for i in range(n):
        context = text(rng, most)
        answers = []
        if context.strip() and rng.random() < 0.85:
            start = int(rng.integers(0, len(context)))
            end = min(len(context), start + int(rng.integers(1, 25)))
            edge = rng.random()
            start, end = (0, end) if edge < 0.1 else (start, len(context) if edge > 0.9 else end)
            answers = [Answer(context[start:end], start)]
        yield Question(f"f:{i}", f"q{i}", text(rng, 3) + "?", context, answers)


def reference_positions(given, offsets, sequence_ids):
    """run_qa.py's rule, walking from both ends of the context's tokens.

    With one repair. Where the answer begins in the row's last token of context, its walk goes on
    over `</s>` and pads, whose offsets are (0, 0), and marks the last of them as the start.
    """
    if not given.answers or 1 not in sequence_ids:
        return 0, 0
    start = given.answers[0].start
    end = start + len(given.answers[0].text)
    left = sequence_ids.index(1)
    right = last = len(sequence_ids) - 1 - sequence_ids[::-1].index(1)
    if offsets[left][0] > start or offsets[right][1] < end:
        return 0, 0
    while left < len(offsets) and offsets[left][0] <= start:
        left += 1
    while offsets[right][1] >= end:
        right -= 1
    if left == len(offsets):
        assert offsets[last][0] <= start
        left = last + 1
    return left - 1, right + 1


@pytest.mark.parametrize("max_length, stride", [(384, 128), (48, 10), (40, 0), (36, 7)])
def test_questions_as_transformers(tokenizer, theirs, max_length, stride):
    rng = np.random.default_rng(max_length)
    bad = BadRows(skip=True)
    features = question_features(
        list(questions(rng, 600, 30)), tokenizer, max_length, stride, bad=bad
    )
    given = features.examples
    assert len(given) + len(bad.bad) == 600 and len(given) > 450
    expected = theirs(
        [question.question.lstrip() for question in given],
        [question.context for question in given],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    same_ids(features.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(features.owners, expected["overflow_to_sample_mapping"])
    inside = 0
    for row, owner in enumerate(features.owners):
        sequence_ids = expected.sequence_ids(row)
        offsets = expected["offset_mapping"][row]
        context = [offset for offset, s in zip(offsets, sequence_ids, strict=True) if s == 1]
        assert features.offsets[row].tolist() == [list(offset) for offset in context]
        if context:
            assert features.context_starts[row] == sequence_ids.index(1)
        wanted = reference_positions(given[owner], offsets, sequence_ids)
        assert tuple(features.positions[row]) == wanted
        inside += wanted != (0, 0)
    assert inside > 200


def test_an_answer_cut_by_windows_is_whole_in_one_or_in_none(tokenizer):
    """25,000 characters; windows share 20 tokens, and the answers are shorter or longer."""
    rng = np.random.default_rng(0)
    words = rng.choice(["model", "answer", "window", "of", "the"], 5000)
    context = " ".join(words)[:25_000]
    given = []
    for i in range(300):
        start = int(rng.integers(0, 24_000))
        length = int(rng.integers(1, 40)) if i % 2 else 900
        given.append(
            Question(
                "f", str(i), "Where?", context, [Answer(context[start : start + length], start)]
            )
        )
    features = question_features(given, tokenizer, 128, 20)
    positions = features.positions.reshape(300, -1, 2)
    found = (positions[:, :, 0] > 0).sum(axis=1)
    assert (found[1::2] >= 1).all() and (found[::2] == 0).all()
    # What a row marks is the answer, up to the tokens' own edges.
    for row in np.flatnonzero(features.positions[:, 0])[::7]:
        answer = given[features.owners[row]].answers[0]
        first, last = features.positions[row] - features.context_starts[row]
        start, end = features.offsets[row][first, 0], features.offsets[row][last, 1]
        assert start <= answer.start and end >= answer.start + len(answer.text)
        assert answer.text in context[start:end] and end - start < len(answer.text) + 30
    # Every token of the context stands in some row.
    covered = np.zeros(len(context), bool)
    for row in np.flatnonzero(features.owners == 0):
        covered[features.offsets[row][0, 0] : features.offsets[row][-1, 1]] = True
    assert covered.all()


def test_question_batches_and_questions_that_are_too_long(tokenizer):
    given = [
        Question("f:1", "a", "Who?", "The cat sat.", [Answer("cat", 4)]),
        Question("f:2", "b", "Who?", "The cat sat.", []),
        Question("f:3", "c", "Who " * 60, "The cat sat.", []),
    ]
    with pytest.raises(InputError, match=r"1 of 3 rows are bad: f:3: the question has \d+ tokens"):
        question_features(given, tokenizer, 64, 16)
    bad = BadRows(skip=True)
    features = question_features(given, tokenizer, 64, 16, bad=bad)
    batch = features.batch(np.array([0, 1, -1]), 48)
    assert batch["start_positions"][0] > 0 and batch["start_positions"][1] == 0
    assert batch["end_positions"].tolist()[2] == IGNORE_INDEX and batch["weights"].tolist() == [1, 1, 0]
    assert batch["start_positions"].dtype == batch["end_positions"].dtype == np.int32
    unknown = [question._replace(answers=None) for question in given[:2]]
    assert "start_positions" not in question_features(unknown, tokenizer).batch(np.array([0]), 64)


def reference_answers(features, logits, n_best_size, longest, version_2, threshold):
    """utils_qa.postprocess_qa_predictions, in other words."""
    for number, question in enumerate(features.examples):
        candidates, null = [], None
        for row in np.flatnonzero(features.owners == number):
            length = len(features.input_ids[row])
            start_logits, end_logits = logits[row][:length].T
            first = features.context_starts[row]
            offsets = {first + i: tuple(o) for i, o in enumerate(features.offsets[row].tolist())}
            score = start_logits[0] + end_logits[0]
            null = score if null is None else min(null, score)
            for s in np.argsort(start_logits)[-1 : -n_best_size - 1 : -1]:
                for e in np.argsort(end_logits)[-1 : -n_best_size - 1 : -1]:
                    if s in offsets and e in offsets and s <= e < s + longest:
                        span = offsets[s][0], offsets[e][1]
                        candidates.append((start_logits[s] + end_logits[e], span))
        if version_2:
            candidates.append((null, (0, 0)))
        candidates = sorted(candidates, key=lambda c: c[0], reverse=True)[:n_best_size]
        if version_2 and all(span != (0, 0) for _, span in candidates):
            candidates.append((null, (0, 0)))
        texts = [question.context[a:b] for _, (a, b) in candidates]
        if not any(texts):
            yield "", texts
            continue
        if not version_2:
            yield texts[0], texts
            continue
        best = next(i for i, answer in enumerate(texts) if answer)
        empty = null - candidates[best][0] > threshold
        yield "" if empty else texts[best], texts


@pytest.mark.parametrize("version_2, threshold", [(False, 0.0), (True, 0.0), (True, -2.5)])
def test_answers_as_transformers(tokenizer, version_2, threshold):
    rng = np.random.default_rng(3)
    given = [q for q in questions(rng, 400, 25) if q.context.strip()]
    features = question_features(given, tokenizer, 48, 4, bad=BadRows(skip=True))
    # Rows are as long as their batch, pads and all.
    logits = [3 * rng.standard_normal((48, 2)) for _ in features.input_ids]
    settings = (5, 6, version_2, threshold)
    found = predict_answers(features, logits, *settings)
    assert [p.id for p in found] == [question.id for question in features.examples]
    empty = 0
    expected = reference_answers(features, logits, *settings)
    for prediction, (answer, texts) in zip(found, expected, strict=True):
        assert prediction.text == answer
        assert [candidate.text for candidate in prediction.candidates] == texts
        if texts:
            total = sum(candidate.probability for candidate in prediction.candidates)
            assert total == pytest.approx(1)
        empty += not answer
    if version_2:
        assert 20 < empty < len(found) - 20


# ---------------------------------------------------------------------------------------------
# Multiple choice.


def test_choices_as_transformers(tokenizer, theirs):
    rng = np.random.default_rng(4)
    given = [
        ChoiceExample(
            f"f:{i}",
            text(rng, 8),
            rng.choice(["", "He"]),
            [text(rng, 6) for _ in range(int(rng.integers(2, 6)))],
            1,
        )
        for i in range(300)
    ]
    features = choice_features(given, tokenizer, 40)
    firsts = [e.context for e in given for _ in e.choices]
    seconds = [f"{e.prefix} {c}" if e.prefix else c for e in given for c in e.choices]
    expected = iter(theirs(firsts, seconds, truncation=True, max_length=40)["input_ids"])
    for rows, example in zip(features.input_ids, given, strict=True):
        same_ids(rows, [next(expected) for _ in example.choices])
    assert features.choices == 5 and features.truncated > 0

    batch = features.batch(np.array([0, -1, 7]), 40)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 5, 40)
    sizes = batch["choice_mask"].sum(axis=1).tolist()
    assert sizes == [len(given[0].choices), 0, len(given[7].choices)]
    assert batch["labels"].tolist() == [1, IGNORE_INDEX, 1] and batch["labels"].dtype == np.int32
    for i, index in ((0, 0), (2, 7)):
        for c, ids in enumerate(features.input_ids[index]):
            np.testing.assert_array_equal(batch["input_ids"][i, c, : len(ids)], ids)
            assert (batch["input_ids"][i, c, len(ids) :] == PAD_ID).all()
    assert (batch["attention_mask"][~batch["choice_mask"]] == 0).all()


def test_absent_choices_are_never_chosen_and_fillers_stay_finite():
    import jax
    import jax.numpy as jnp

    from prelnroberta.model.losses import label_scores

    mask = np.array([[True, True, False], [True] * 3, [False] * 3])
    logits = np.array([[-5.0, -4.0, 9.0], [1.0, 2.0, 0.0], [3.0, 1.0, 2.0]], np.float32)
    masked = masked_logits(logits, mask)
    assert masked.argmax(axis=1)[:2].tolist() == [1, 1]

    def loss(x):
        return label_scores(masked_logits(x, jnp.asarray(mask)), jnp.array([1, 0, IGNORE_INDEX])).loss

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    two = label_scores(jnp.asarray(logits[:1, :2]), jnp.array([1])).loss
    three = label_scores(jnp.asarray(logits[1:2]), jnp.array([0])).loss
    assert float(value) == pytest.approx(float(two + three))
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[~mask] == 0).all()


# ---------------------------------------------------------------------------------------------
# Language models.


def test_blocks_as_transformers_group_texts(tokenizer, theirs):
    rng = np.random.default_rng(5)
    documents = [text(rng, 40) for _ in range(120)]
    documents = [document for document in documents if document.strip()]
    stream = token_stream([*documents, "", " \n"], tokenizer)
    flat = [i for ids in theirs(documents)["input_ids"] for i in ids]
    assert stream.tolist() == flat
    blocks = Blocks(stream, 32)
    expected = [flat[i : i + 32] for i in range(0, len(flat), 32)]
    assert len(blocks) == len(expected)
    batch = blocks.batch(np.arange(len(blocks)), 32)
    for row, ids in zip(range(len(blocks)), expected, strict=True):
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        # Labels are the ids, unshifted; none asks a first token of what stands before it in a row.
        assert batch["labels"][row, : len(ids)].tolist() == [IGNORE_INDEX, *ids[1:]]
        assert (batch["labels"][row, len(ids) :] == IGNORE_INDEX).all()
    np.testing.assert_array_equal(batch["attention_mask"], batch["input_ids"] != PAD_ID)


@pytest.mark.parametrize("overlap", [1, 2, 7, 15])
def test_overlapping_blocks_ask_for_every_token_once(overlap):
    for size in range(2, 70):
        stream = np.arange(4, 4 + size, dtype=np.int32)
        blocks = Blocks(stream, 16, overlap)
        indices = np.array([*range(len(blocks)), -1])
        batch = blocks.batch(indices, 16)
        asked = batch["labels"][:, 1:]  # the shift
        assert sorted(asked[asked != IGNORE_INDEX].tolist()) == stream[1:].tolist()
        context = np.flatnonzero((asked != IGNORE_INDEX).any(axis=1))
        assert len(context) == len(blocks), "no row without a question"
        assert (batch["labels"][-1] == IGNORE_INDEX).all() and batch["weights"][-1] == 0
        for row in range(1, len(blocks)):
            first = np.flatnonzero(asked[row] != IGNORE_INDEX)[0] + 1
            assert first == overlap, "at least that much context"


def test_blocks_are_rows_for_the_masking_loader(tokenizer):
    stream = token_stream(["one two three " * 30, "four " * 11], tokenizer)
    blocks = Blocks(stream, 24)
    loader = Loader(blocks, Masking(tokenizer.get_vocab_size(), 0.3, "bernoulli"), 4, seed=0)
    batch = loader.batch(3)
    real = batch["segment_ids"] > 0
    np.testing.assert_array_equal(batch["position_ids"] > PAD_ID, real)
    rows = np.arange(4)[:, None]
    scored = batch["masked_weights"] > 0
    assert scored.any() and (batch["masked_labels"][scored] > EOS_ID).all(), "no special is asked"
    restored = batch["input_ids"].copy()
    restored[np.broadcast_to(rows, scored.shape)[scored], batch["masked_positions"][scored]] = (
        batch["masked_labels"][scored]
    )
    wanted = {blocks[i].input_ids.tobytes() for i in range(len(blocks))}
    assert all(row.tobytes() in wanted for row in restored)
    assert 0.9 < blocks.fill <= 1 and stream[0] == BOS_ID
    for length, overlap in ((1, 0), (8, 8), (8, -1)):
        with pytest.raises(InputError, match="rows of"):
            Blocks(stream, length, overlap)
    with pytest.raises(InputError, match="no text"):
        token_stream([" ", ""], tokenizer)


def test_every_kind_of_features_goes_through_both_loaders(tokenizer):
    rng = np.random.default_rng(6)
    kinds = {
        "texts": text_features(
            [TextExample(f"{i}", text(rng, 9), None, 1.0) for i in range(23)],
            tokenizer,
            64,
            REGRESSION,
        ),
        "tokens": token_features(list(sentences(rng, 23, 9)), tokenizer, 32, TAGS),
        "questions": question_features(list(questions(rng, 23, 20)), tokenizer, 64, 8),
        "choices": choice_features(
            [ChoiceExample("f", "a", "b", ["c", text(rng, 9)], 0)] * 23, tokenizer, 64
        ),
        "blocks": Blocks(np.arange(4, 99, dtype=np.int32), 16, 1),
    }
    for name, features in kinds.items():
        n = len(features.lengths)
        buckets = (16, 32, 64, 128)
        seen = []
        loader = TrainingBatches(features, 5, 0, steps=-(-n // 5))
        for step in range(loader.steps_per_epoch):
            batch = loader.batch(step)
            seen += loader.indices(step).tolist()
            assert batch["input_ids"].shape == (loader.rows, loader.length)
            assert {a.shape[0] for a in batch.values()} == {loader.rows}
        assert sorted(seen) == list(range(n)), name
        found = [i for indices, _ in evaluation_batches(features, buckets, 256) for i in indices]
        assert sorted(i for i in found if i >= 0) == list(range(n)), name

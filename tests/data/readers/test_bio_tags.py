"""Spans of BIO tags in every scheme."""

import itertools
import re

import numpy as np
import pytest

from prelnroberta.data.readers.bio_tags import (
    SCHEMES,
    Span,
    conlleval_spans,
    detect_scheme,
    seqeval_strict_spans,
    spans_to_tags,
)


def random_tags(rng, letters, length):
    tags = [f"{letter}-{kind}" for letter in letters for kind in ("x", "yz")]
    return ["O" if rng.random() < 0.3 else str(rng.choice(tags)) for _ in range(length)]


# Another way to say what an entity is: a pattern over tags, each written as one character.
CODES = {"O": "."} | {
    f"{letter}-{kind}": code
    for kind, codes in (("x", "bies"), ("yz", "BIES"))
    for letter, code in zip("BIES", codes, strict=True)
}
PATTERNS = {
    ("IOB2", True): r"bi*|BI*",
    ("IOB2", False): r"[bi]i*|[BI]I*",
    ("IOBES", True): r"bi*e|s|BI*E|S",
    ("IOBES", False): r"s|[bi]i*e?|e|S|[BI]I*E?|E",
}


@pytest.mark.parametrize("scheme, strict", PATTERNS)
def test_spans_match_regular_expressions(scheme, strict):
    rng = np.random.default_rng(5)
    for _ in range(1500):
        tags = random_tags(rng, "BI" if scheme == "IOB2" else "BIES", int(rng.integers(0, 12)))
        text = "".join(CODES[tag] for tag in tags)
        expected = [
            Span(*match.span(), "x" if match[0].islower() else "yz")
            for match in re.finditer(PATTERNS[scheme, strict], text)
        ]
        assert (
            seqeval_strict_spans(tags, scheme) if strict else conlleval_spans(tags)
        ) == expected, tags


@pytest.mark.parametrize("scheme", SCHEMES)
def test_spans_round_trip_in_every_scheme(scheme):
    rng = np.random.default_rng(6)
    for _ in range(500):
        length = int(rng.integers(1, 15))
        cuts = np.sort(rng.choice(length + 1, int(rng.integers(0, length + 1)), replace=False))
        entities = [
            Span(int(a), int(b), str(rng.choice(["x", "y"])))
            for a, b in itertools.pairwise(cuts)
            if rng.random() < 0.6
        ]
        tags = spans_to_tags(entities, length, scheme)
        assert conlleval_spans(tags) == entities
        if scheme != "IOB1":  # seqeval's own does not close B-x before B-y
            assert seqeval_strict_spans(tags, scheme) == entities
        elif any(tag[0] == "I" for tag in tags) and spans_to_tags(entities, length) != tags:
            assert detect_scheme([tags]) == "IOB1"


def test_scheme_is_detected():
    assert detect_scheme([["O", "I-x", "B-x"]]) == "IOB1"
    assert detect_scheme([["O", "B-x", "I-x"]]) == "IOB2"
    assert detect_scheme([["O", "B-x", "I-x"], ["I-x"]]) == "IOB2", "an error in IOB2, not IOB1"
    assert detect_scheme([["S-x"], ["O"]]) == "IOBES"
    assert detect_scheme([["U-x", "O", "B-x", "L-x"]]) == "IOBES"
    assert detect_scheme([["NOUN", "O"]]) is None
    assert conlleval_spans(["U-x", "B-x", "I-x", "L-x"]) == [Span(0, 1, "x"), Span(1, 4, "x")]
    assert conlleval_spans(["I-x-y", "I-x-y", "B-z"]) == [Span(0, 2, "x-y"), Span(2, 3, "z")]

"""Entities as tags: from tags to conlleval_spans and back, in the schemes that files are written in.

A tag is `O`, or a letter, a hyphen and the entity's type. Inside this package tags are IOB2; files
may hold

IOB1   I- everywhere, B- only where an entity follows one of its own type;
IOB2   (BIO) B- opens every entity, I- continues it;
IOBES  IOB2, with E- closing entities of several words and S- for those of one. BILOU is the same
       with L- and U-.

Tags can contradict their scheme, and predicted ones do. `conlleval_spans` then reads them as CoNLL's
evaluation does, `seqeval_strict_spans` as seqeval's strict mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

SCHEMES = ("IOB1", "IOB2", "IOBES")

_LETTERS = "OBIESLU"
_IOBES = {"L": "E", "U": "S"}


class Span(NamedTuple):
    """Words start (inclusive) to end (exclusive) are an entity of this type."""

    start: int
    end: int
    type: str


def is_entity_tag(tag: str) -> bool:
    """Whether this is `O`, or a letter of a scheme, a hyphen and a type."""
    return tag == "O" or (len(tag) > 2 and tag[0] in _LETTERS[1:] and tag[1] == "-")


def detect_scheme(sentences: Iterable[Sequence[str]]) -> str | None:
    """The scheme of tags; None if they are no entity tags (parts of speech, say).

    IOB1 and IOB2 share their letters. It is IOB1 if some I- opens an entity and no B- stands where
    IOB1 has none: tags that fit neither are taken for IOB2 with errors.
    """
    letters = set()
    orphans, plain_openings = 0, 0
    for tags in sentences:
        previous = "O"
        for tag in tags:
            if not is_entity_tag(tag):
                return None
            letters.add(tag[0])
            continues = previous != "O" and previous[2:] == tag[2:]
            orphans += tag[0] == "I" and not continues
            plain_openings += tag[0] == "B" and not continues
            previous = tag
    if letters & set("ESLU"):
        return "IOBES"
    return "IOB1" if orphans and not plain_openings else "IOB2"


def conlleval_spans(tags: Sequence[str]) -> list[Span]:
    """The entities of tags of any scheme, however broken, as conlleval counts them.

    An I- or E- that continues nothing opens an entity; a change of type closes one. It is the rule
    of conlleval's startOfChunk and endOfChunk, which seqeval's default mode follows too.
    """
    found = []
    start, previous, previous_type = 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        letter, kind = _IOBES.get(tag[0], tag[0]), tag[2:]
        changes = kind != previous_type
        if previous in "ES" or (previous in "BI" and (letter in "BSO" or changes)):
            found.append(Span(start, i, previous_type))
        if letter in "BS" or (letter in "EI" and (previous in "OES" or changes)):
            start = i
        previous, previous_type = letter, kind
    return found


# Of two neighbouring letters, what seqeval's scheme.py lets open, continue and close an entity,
# each with the condition on the two types: the same (True), different (False), either (None).
_Pairs = dict[tuple[str, str], bool | None]
_INSIDE: dict[str, _Pairs] = {
    "IOB1": {("B", "I"): True, ("I", "I"): True},
    "IOB2": {("B", "I"): True, ("I", "I"): True},
    "IOBES": {(a, b): True for a in "BI" for b in "IE"},
}
_OPENS: dict[str, _Pairs] = {
    "IOB1": {
        ("O", "I"): None,
        ("I", "I"): False,
        ("B", "I"): None,
        ("I", "B"): True,
        ("B", "B"): True,
    },
    "IOB2": {(a, "B"): None for a in "OBI"},
    "IOBES": {(a, b): None for a in "OBIES" for b in "BS"},
}
_CLOSES: dict[str, _Pairs] = {
    "IOB1": {
        ("I", "I"): False,
        ("I", "O"): None,
        ("I", "B"): None,
        ("B", "O"): None,
        ("B", "I"): False,
        ("B", "B"): True,
    },
    "IOB2": {
        ("I", "O"): None,
        ("I", "I"): False,
        ("I", "B"): None,
        ("B", "O"): None,
        ("B", "I"): False,
        ("B", "B"): None,
    },
    "IOBES": {(a, b): None for a in "ES" for b in "OBIES"},
}


def seqeval_strict_spans(tags: Sequence[str], scheme: str = "IOB2") -> list[Span]:
    """The entities that the scheme allows; what breaks it is no entity. As seqeval's strict mode.

    (Its IOB1 does not know an entity opened by B- after O, which the scheme never writes.)
    """
    letters = [_IOBES.get(tag[0], tag[0]) for tag in tags] + ["O"]
    kinds = [tag[2:] for tag in tags] + [""]

    def holds(pairs: _Pairs, i: int) -> bool:
        pair = (letters[i - 1] if i else "O", letters[i])
        same = kinds[i] == (kinds[i - 1] if i else "")
        return pair in pairs and pairs[pair] in (None, same)

    found = []
    i = 0
    while i < len(tags):
        if not holds(_OPENS[scheme], i):
            i += 1
            continue
        start, i = i, i + 1
        while holds(_INSIDE[scheme], i):
            i += 1
        if holds(_CLOSES[scheme], i):
            found.append(Span(start, i, kinds[start]))
    return found


def spans_to_tags(entities: Iterable[Span], length: int, scheme: str = "IOB2") -> list[str]:
    """The tags of `length` words with these entities, which must not overlap."""
    tags = ["O"] * length
    previous = Span(0, 0, "")
    for span in sorted(entities):
        start, end, kind = span
        tags[start:end] = [f"I-{kind}"] * (end - start)
        if scheme == "IOB2" or (scheme == "IOB1" and previous[1:] == (start, kind)):
            tags[start] = f"B-{kind}"
        elif scheme == "IOBES":
            tags[start], tags[end - 1] = f"B-{kind}", f"E-{kind}"
            if end == start + 1:
                tags[start] = f"S-{kind}"
        previous = span
    return tags

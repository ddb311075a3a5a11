"""Entity tags: conversion between tags and spans, in the schemes that files are written in.

A tag is `O`, or a letter, a hyphen and the entity's type. This package uses IOB2; files may use

IOB1   I- everywhere; B- only for an entity that directly follows one of its own type.
IOB2   (BIO) B- opens every entity, I- continues it.
IOBES  IOB2 with E- for the last word of an entity, and S- for an entity of one word. BILOU is the
       same with L- and U-.

Tags may violate their scheme, and predicted ones do. `conlleval_spans` reads them as CoNLL's
evaluation does, `seqeval_strict_spans` as seqeval's strict mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

SCHEMES = ("IOB1", "IOB2", "IOBES")

_LETTERS = "OBIESLU"
_BILOU_TO_IOBES = {"L": "E", "U": "S"}


class Span(NamedTuple):
    """An entity of this type: words `start` to `end` (exclusive)."""

    start: int
    end: int
    type: str


def is_entity_tag(tag: str) -> bool:
    """Whether `tag` is `O`, or a letter of a scheme, a hyphen and a type."""
    return tag == "O" or (len(tag) > 2 and tag[0] in _LETTERS[1:] and tag[1] == "-")


def detect_scheme(sentences: Iterable[Sequence[str]]) -> str | None:
    """The scheme of tags; None if they are not entity tags (for example parts of speech).

    IOB1 and IOB2 have the same letters. The scheme is IOB1 if an I- opens an entity and no B- is
    used where IOB1 would not use it. Tags that fit neither are taken as IOB2 with errors.
    """
    letters = set()
    i_openings, b_openings = 0, 0  # tags that open an entity not next to one of their type
    for tags in sentences:
        previous = "O"
        for tag in tags:
            if not is_entity_tag(tag):
                return None
            letters.add(tag[0])
            continues = previous != "O" and previous[2:] == tag[2:]
            i_openings += tag[0] == "I" and not continues
            b_openings += tag[0] == "B" and not continues
            previous = tag
    if letters & set("ESLU"):
        return "IOBES"
    return "IOB1" if i_openings and not b_openings else "IOB2"


def conlleval_spans(tags: Sequence[str]) -> list[Span]:
    """The entities in tags of any scheme, valid or not, as conlleval counts them.

    An I- or E- that continues nothing opens an entity; a change of type closes one. These are the
    rules of conlleval's startOfChunk and endOfChunk, and of seqeval's default mode.
    """
    found = []
    start, previous, previous_type = 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        letter, entity_type = _BILOU_TO_IOBES.get(tag[0], tag[0]), tag[2:]
        changes = entity_type != previous_type
        if previous in "ES" or (previous in "BI" and (letter in "BSO" or changes)):
            found.append(Span(start, i, previous_type))
        if letter in "BS" or (letter in "EI" and (previous in "OES" or changes)):
            start = i
        previous, previous_type = letter, entity_type
    return found


# The pairs of neighbouring letters with which seqeval's scheme.py opens, continues and closes an
# entity, each with the condition on the two types: same (True), different (False), either (None).
_Pairs = dict[tuple[str, str], bool | None]
_CONTINUES: dict[str, _Pairs] = {
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
    """The entities whose tags are valid in the scheme, as in seqeval's strict mode.

    (In its IOB1, a B- after O, which the scheme never writes, does not open an entity.)
    """
    letters = [_BILOU_TO_IOBES.get(tag[0], tag[0]) for tag in tags] + ["O"]
    types = [tag[2:] for tag in tags] + [""]

    def matches(pairs: _Pairs, i: int) -> bool:
        pair = (letters[i - 1] if i else "O", letters[i])
        same_type = types[i] == (types[i - 1] if i else "")
        return pair in pairs and pairs[pair] in (None, same_type)

    found = []
    i = 0
    while i < len(tags):
        if not matches(_OPENS[scheme], i):
            i += 1
            continue
        start, i = i, i + 1
        while matches(_CONTINUES[scheme], i):
            i += 1
        if matches(_CLOSES[scheme], i):
            found.append(Span(start, i, types[start]))
    return found


def spans_to_tags(entities: Iterable[Span], length: int, scheme: str = "IOB2") -> list[str]:
    """The tags of `length` words with these entities; entities must not overlap."""
    tags = ["O"] * length
    previous = Span(0, 0, "")
    for span in sorted(entities):
        start, end, entity_type = span
        tags[start:end] = [f"I-{entity_type}"] * (end - start)
        if scheme == "IOB2" or (scheme == "IOB1" and previous[1:] == (start, entity_type)):
            tags[start] = f"B-{entity_type}"
        elif scheme == "IOBES":
            tags[start], tags[end - 1] = f"B-{entity_type}", f"E-{entity_type}"
            if end == start + 1:
                tags[start] = f"S-{entity_type}"
        previous = span
    return tags

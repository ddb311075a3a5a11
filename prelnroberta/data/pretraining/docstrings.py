"""Finding the English in a docstring: paragraphs that read as sentences, freed of markup."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

_COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about after all also an and any are as at be been before between but by can do does each
        for from has have if in into is it its may more must no not of on one only or other out over
        same should so some such than that the their them then there these they this to two up use
        used using was we were what when where which while will with would you your
        """,
    )
)
# A text that begins with another common word in lower case lost its beginning, to a formula say.
_OPENERS = frozenset({"a", "all", "an", "any", "each", "if", "one", "the", "two"})
_UNDERLINE = re.compile(r"[^\w\s]{3,}(\s+[^\w\s]{3,})*")
_BULLET = re.compile(r"(?:[-*+•]|\(?\w{1,2}[.)]|\[\w+\])\s+")
# "x : array_like", a numpydoc parameter with its type, or an entry of "See Also".
_NUMPYDOC = re.compile(r"[*`\w][\w*`.]*(, ?[*`\w.]+)* +:( |$)", re.ASCII)
# "x (int, optional): text", "x: text", "Returns: text", ":param x: text": the text is prose.
_NAME = re.compile(r"(?::\w+[^:]*|[*`\w][\w*`.]*(?: \([^)]*\))?):(?: +|$)", re.ASCII)
_MARKUP = [
    (re.compile(r"\s*\[#?\w+\]_"), ""),  # footnote [1]_
    (re.compile(r":[\w:+.-]+:`~?([^`<]*?)\s*(?:<[^`]*>)?`"), r"\1"),  # :func:`~x.y`, :doc:`x <y>`
    (re.compile(r"`+([^`<]*?)\s*(?:<[^`]*>)?`+_*"), r"\1"),  # ``code``, `code`, `text <url>`_
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](url)
    (re.compile(r"(?<!\w)\*{1,2}(\S[^*]*?)\*{1,2}(?!\w)"), r"\1"),  # *emphasis*, **strong**
]


def prose(docstring: str) -> list[str]:
    """The paragraphs of a docstring that read as English, each on one line, without markup.

    A paragraph ends at a blank line, a change of indentation (which may hang after a bullet or a
    parameter's name), a bullet, a name or an underline. It reads as English if it has 8 words or
    more, begins and ends as a sentence does, is nine tenths letters and spaces, and at least a
    quarter of its words are among the commonest: that keeps out signatures, doctests, tables,
    formulas, code and lists of names.
    """
    paragraphs = (" ".join(" ".join(block).split()) for block in _blocks(docstring))
    # Markup is the slow part: most of what is no prose is known before.
    cleaned = (_without_markup(text) for text in paragraphs if _is_sentence(text))
    return [text for text in cleaned if _reads_as_english(text)]


def _blocks(docstring: str) -> Iterator[list[str]]:
    block, indent, hanging = [], 0, False
    code_indent = None  # of a line ending in "::" or beginning with "..": what is deeper is code
    for line in inspect.cleandoc(docstring).split("\n"):
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        if not text or (code_indent is not None and depth > code_indent):
            yield block
            block = []
            continue
        directive = text.startswith(".. ")
        code_indent = depth if text.endswith("::") or directive else None
        if directive or _UNDERLINE.fullmatch(text) or _NUMPYDOC.match(text):
            block = [] if _UNDERLINE.fullmatch(text) else block  # a title, or a table's row
            yield block
            block = []
            continue
        head = _BULLET.match(text) or _NAME.match(text)
        if head or depth < indent or (depth > indent and not hanging):
            yield block
            block = []
        if not block:
            indent, hanging = depth, bool(head)
            text = text[head.end() :] if head else text
        block.append(text)
    yield block


def _is_sentence(text: str) -> bool:
    return len(text) > 30 and text[-1] in ".!?:" and ">>>" not in text


def _without_markup(text: str) -> str:
    for pattern, replacement in _MARKUP if "`" in text or "*" in text or "[" in text else ():
        text = pattern.sub(replacement, text)
    return " ".join(text.replace("::", ":").split())


def _reads_as_english(text: str) -> bool:
    words = text.split()
    begins = text[:1].isalpha() and words[0] not in _COMMON_WORDS - _OPENERS
    if len(words) < 8 or not begins or "://" in text:
        return False
    plain = sum(map(str.isalpha, text)) + text.count(" ")
    common = sum(word.strip(".,;:!?()'\"").lower() in _COMMON_WORDS for word in words)
    return plain >= 0.9 * len(text) and common >= 0.25 * len(words)

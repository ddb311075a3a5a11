"""The default corpus: English prose from the docstrings of installed packages.

It needs no download. `extract_prose` finds the paragraphs of a docstring that read as sentences and
removes their markup; `DocstringCorpus` applies it to the source files of packages.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import CodeType

from prelnroberta.data.pretraining.corpus import Document

# Part of the corpus manifest, and so of the key under which token files are cached. Raise it with
# every change that can alter a document: the rules of `extract_prose`, which files and strings are
# read, their order, or the keys. Otherwise runs would reuse the tokens of the old rules.
EXTRACTION_VERSION = 1

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
# A text that begins with any other common word in lower case is missing its beginning, for example
# a formula.
_SENTENCE_OPENERS = frozenset({"a", "all", "an", "any", "each", "if", "one", "the", "two"})
_UNDERLINE = re.compile(r"[^\w\s]{3,}(\s+[^\w\s]{3,})*")
_BULLET = re.compile(r"(?:[-*+•]|\(?\w{1,2}[.)]|\[\w+\])\s+")
# "x : array_like", a numpydoc parameter with its type, or an entry of "See Also".
_NUMPYDOC_ENTRY = re.compile(r"[*`\w][\w*`.]*(, ?[*`\w.]+)* +:( |$)", re.ASCII)
# "x (int, optional): text", "x: text", "Returns: text", ":param x: text": the text is prose.
_FIELD_NAME = re.compile(r"(?::\w+[^:]*|[*`\w][\w*`.]*(?: \([^)]*\))?):(?: +|$)", re.ASCII)
_MARKUP = [
    (re.compile(r"\s*\[#?\w+\]_"), ""),  # footnote [1]_
    (re.compile(r":[\w:+.-]+:`~?([^`<]*?)\s*(?:<[^`]*>)?`"), r"\1"),  # :func:`~x.y`, :doc:`x <y>`
    (re.compile(r"`+([^`<]*?)\s*(?:<[^`]*>)?`+_*"), r"\1"),  # ``code``, `code`, `text <url>`_
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](url)
    (re.compile(r"(?<!\w)\*{1,2}(\S[^*]*?)\*{1,2}(?!\w)"), r"\1"),  # *emphasis*, **strong**
]


def extract_prose(docstring: str) -> list[str]:
    """The paragraphs of a docstring that read as English, each on one line, without markup.

    A paragraph ends at a blank line, a change of indentation (except the hanging indent after a
    bullet or a parameter's name), a bullet, a name or an underline. It reads as English if it has
    at least 8 words, begins and ends like a sentence, is nine tenths letters and spaces, and at
    least a quarter of its words are common. This excludes signatures, doctests, tables, formulas,
    code and lists of names.
    """
    paragraphs = (" ".join(" ".join(block).split()) for block in _split_paragraphs(docstring))
    # Removing markup is slow, so most paragraphs that are not prose are dropped before.
    cleaned = (_remove_markup(text) for text in paragraphs if _looks_like_sentence(text))
    return [text for text in cleaned if _reads_as_english(text)]


def _split_paragraphs(docstring: str) -> Iterator[list[str]]:
    """The lines of each paragraph."""
    block: list[str] = []
    indent, hanging = 0, False
    # Indentation of a line that ends in "::" or begins with ".."; deeper lines are code.
    code_indent = None
    for line in inspect.cleandoc(docstring).split("\n"):
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        if not text or (code_indent is not None and depth > code_indent):
            yield block
            block = []
            continue
        directive = text.startswith(".. ")
        code_indent = depth if text.endswith("::") or directive else None
        if directive or _UNDERLINE.fullmatch(text) or _NUMPYDOC_ENTRY.match(text):
            block = [] if _UNDERLINE.fullmatch(text) else block  # a title, or a table's row
            yield block
            block = []
            continue
        head = _BULLET.match(text) or _FIELD_NAME.match(text)
        if head or depth < indent or (depth > indent and not hanging):
            yield block
            block = []
        if not block:
            indent, hanging = depth, bool(head)
            text = text[head.end() :] if head else text
        block.append(text)
    yield block


def _looks_like_sentence(text: str) -> bool:
    return len(text) > 30 and text[-1] in ".!?:" and ">>>" not in text


def _remove_markup(text: str) -> str:
    for pattern, replacement in _MARKUP if "`" in text or "*" in text or "[" in text else ():
        text = pattern.sub(replacement, text)
    return " ".join(text.replace("::", ":").split())


def _reads_as_english(text: str) -> bool:
    words = text.split()
    begins = text[:1].isalpha() and words[0] not in _COMMON_WORDS - _SENTENCE_OPENERS
    if len(words) < 8 or not begins or "://" in text:
        return False
    plain = sum(map(str.isalpha, text)) + text.count(" ")
    common = sum(word.strip(".,;:!?()'\"").lower() in _COMMON_WORDS for word in words)
    return plain >= 0.9 * len(text) and common >= 0.25 * len(words)


# The dependencies of prelnroberta with the most prose.
DEFAULT_PACKAGES = (
    "absl", "etils", "flax", "huggingface_hub", "humanize", "jax", "numpy", "optax",
    "orbax", "rich", "scipy", "tensorboardX",
)  # fmt: skip
STDLIB = "python"
_EXCLUDED_FOLDERS = {
    "test", "tests", "testing", "idle_test", "lib2to3", "site-packages", "dist-packages",
}  # fmt: skip


class DocstringCorpus:
    """The prose in the docstrings of the standard library and of the installed `packages`.

    Sources are compiled, never run. Every string constant of several lines is read, so that
    documentation outside docstrings counts too (numpy's `add_newdoc`, the stdlib's `pydoc_data`).
    A document is the prose of one such string, one paragraph a line; a paragraph that occurs
    repeatedly is kept once in the whole corpus. The key is the module's path, so that training and
    validation never share a module. Packages that are not installed are skipped and listed in the
    manifest.

    Attributes:
        roots: package -> its folders.
        missing: packages that are not installed.
    """

    def __init__(self, packages: Sequence[str] = DEFAULT_PACKAGES):
        self.roots = {STDLIB: [Path(sysconfig.get_path("stdlib"))]}
        self.missing = []
        for package in sorted(set(packages)):
            # find_spec of a top-level name finds the package without importing it.
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                self.missing.append(package)
            else:
                self.roots[package] = [Path(p) for p in sorted(spec.submodule_search_locations)]

    def documents(self) -> Iterator[Document]:
        """One document for each string that has prose; stdlib first, then packages by name."""
        return iter(self._documents)

    @cached_property
    def _documents(self) -> list[Document]:
        """Cached (6 MB): reading takes 10 s, and training the tokenizer reads them as well."""
        return list(self._read())

    def _read(self) -> Iterator[Document]:
        seen = set()
        for string, key in self.multiline_strings():
            new = [p for p in dict.fromkeys(extract_prose(string)) if p not in seen]
            seen.update(new)
            if new:
                yield Document("\n".join(new), key)

    def multiline_strings(self) -> Iterator[Document]:
        """The source of the documents: every string of several lines, including its markup."""
        for package, roots in self.roots.items():
            for root in roots:
                for path in _source_files(root):
                    key = f"{package}/{path.relative_to(root).with_suffix('').as_posix()}"
                    for string in _multiline_strings(path):
                        yield Document(string, key)

    def manifest(self) -> dict:
        """Versions of everything that is read, and of the rules that extract the prose."""
        distributions = importlib.metadata.packages_distributions()
        return {
            "kind": "docstrings",
            "python": platform.python_version(),
            "packages": {
                package: {name: importlib.metadata.version(name) for name in sorted(set(names))}
                for package in self.roots
                if (names := distributions.get(package))
            },
            "missing_packages": self.missing,
            "extraction_version": EXTRACTION_VERSION,
        }


def _source_files(root: Path) -> list[Path]:
    def is_library(path: Path) -> bool:
        inside = path.relative_to(root)
        is_test = path.stem.startswith("test_") or path.stem.endswith("_test")
        return not is_test and _EXCLUDED_FOLDERS.isdisjoint(inside.parts)

    return sorted(path for path in root.rglob("*.py") if is_library(path))


def _multiline_strings(path: Path) -> Iterator[str]:
    """Every string constant of more than one line, in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in other packages
            code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError):  # templates, or for another version of Python
        return
    pending = [code]
    while pending:
        constant = pending.pop()
        if isinstance(constant, str) and "\n" in constant:
            yield constant
        elif isinstance(constant, tuple | frozenset):
            pending += reversed(list(constant))
        elif isinstance(constant, CodeType):
            pending += reversed(constant.co_consts)

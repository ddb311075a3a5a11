"""Finds words in docstrings, help texts and errors that plain technical English has no need of.

python tests/programs/check_words.py

Part of `make lint`. Prints each place and exits with 1 if there is any. WORKSPACE.md, section 12,
has what to write instead.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("prelnroberta", "experiments", "bridges")
# Old or figurative words, and words of which only one meaning is plain.
BANNED = {
    r"mend(s|ed|ing)?": "fix",
    r"who(so)?ever": "who, users, callers",
    r"amid(st)?": "among, between",
    r"tell(s|ing)? of": "report, name",
    r"told": "reported, printed",
    r"(?<!there )(?-i:is none)": "is not one",
    r"for want of": "without",
    r"(stands|stood)": "is, are",
    r"lies": "is, are",
    r"at once": "together, at the same time",
    r"anew": "again",
    r"save for": "except",
    r"by the way": "leave it out",
    r"thereof|whereof|hereby|wherein": "of it, in which",
    r"asked for": "requested",
    r"brings?( along)?": "has, includes, loads",
    r"as yet": "yet",
    r"nought|naught": "nothing, 0",
}
PATTERN = re.compile(
    "|".join(rf"(?P<w{i}>\b(?:{word})\b)" for i, word in enumerate(BANNED)), re.IGNORECASE
)


def strings(path: Path):
    """Line and text of every string constant of a file, f-strings included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def findings(path: Path):
    for line, text in strings(path):
        for match in PATTERN.finditer(text):
            instead = list(BANNED.values())[int(match.lastgroup[1:])]
            at = line + text.count("\n", 0, match.start())
            yield f"{path.relative_to(ROOT)}:{at}: {match.group()!r}, write: {instead}"


def main() -> int:
    found = [
        finding
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for finding in findings(path)
    ]
    print("\n".join(found) or "no banned words")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Makes labelled data for all six tasks from the documentation of the installed packages.

    python -m experiments.example_data --output=runs/data

Each task has a train and a dev file in a common format. The labels come from the documentation
itself:

    sequence_classification/{train,dev}.csv     text,label: the package that a sentence is from
    token_classification/{train,dev}.conll      words marked as code, functions or classes (BIO)
    question_answering/{train,dev}.json         "What happens if x is None?", on prose
    multiple_choice/{train,dev}.csv             the end of a sentence, out of four (SWAG's columns)
    language_modeling/{train,dev}.txt           prose
    language_modeling/pretraining.txt           all prose that is not dev

A fifth of the modules is dev, the same as in `experiments.pretrain --validation_fraction=0.2`.
Examples that also occur in a train module are left out of dev, so a model pretrained in this way
has not seen them.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from experiments.flags.checks import check_new_folder, check_positive
from experiments.flags.launch import launch
from experiments.flags.programs import ExampleDataSettings

if TYPE_CHECKING:
    from prelnroberta.data.pretraining.corpus import Document

VALIDATION_FRACTION = 0.2  # of the modules; hold them out of pretraining, too
PRETRAINING = "language_modeling/pretraining.txt"
PACKAGES = ("python", "numpy", "scipy", "jax", "huggingface_hub", "rich")


def main(settings: ExampleDataSettings) -> int:
    """Writes a training and an evaluation file for each task. Returns the exit code."""
    check_positive(settings, "train_examples", "dev_examples")
    check_new_folder(settings.output)

    from prelnroberta.data.pretraining.docstrings import DocstringCorpus
    from prelnroberta.files import atomic_write

    corpus = DocstringCorpus()
    documents, strings = list(corpus.documents()), list(corpus.multiline_strings())
    max_examples = {"train": settings.train_examples, "dev": settings.dev_examples}
    with atomic_write(settings.output) as partial:
        for name, (find, format_file, from_strings) in FILES.items():
            task, _, suffix = name.partition(".")
            (partial / task).mkdir(parents=True)
            splits = split_documents(strings if from_strings else documents)
            examples = {split: set(find(documents)) for split, documents in splits.items()}
            examples["dev"] -= examples["train"]
            for split in examples:
                sample = sample_by_hash(examples[split], max_examples[split])
                path = partial / task / f"{split}.{suffix}"
                path.write_text(format_file(sample), encoding="utf-8")
                print(f"{task}/{split}.{suffix}: {len(sample):,} examples")
        texts = list(find_paragraphs(split_documents(documents)["train"]))
        (partial / PRETRAINING).write_text(format_paragraphs(texts), encoding="utf-8")
        print(f"{PRETRAINING}: {len(texts):,} documents")
    print(f"written: {settings.output}")
    return 0


def split_documents(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Splits documents into train and dev by module."""
    from prelnroberta.data.pretraining.corpus import in_validation_split

    splits: dict[str, list[Document]] = {"train": [], "dev": []}
    for document in documents:
        splits["dev" if in_validation_split(document.key, VALIDATION_FRACTION) else "train"].append(
            document
        )
    return splits


def sample_by_hash(examples: Iterable, max_examples: int) -> list:
    """At most `max_examples` different examples, in the order of their hashes."""

    def digest(example: Any) -> str:
        return hashlib.sha256(repr(example).encode()).hexdigest()

    return sorted(set(examples), key=digest)[:max_examples]


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def split_sentences(text: str) -> list[str]:
    """The complete sentences of a line, of 30 to 250 characters."""
    parts = _SENTENCE_END.split(text)
    return [s for s in parts if 30 <= len(s) <= 250 and s[0].isupper() and s[-1] == "."]


def format_csv(rows: Iterable[tuple], *columns: str) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return file.getvalue()


def find_packages(documents: list[Document]) -> Iterator[tuple[str, str]]:
    """Yields (sentence, package)."""
    for document in documents:
        package = document.key.partition("/")[0]
        if package in PACKAGES:
            for line in document.text.split("\n"):
                yield from ((sentence, package) for sentence in split_sentences(line))


def format_packages(examples: list[tuple]) -> str:
    return format_csv(examples, "text", "label")


_MARKUP = re.compile(r":(?P<role>func|meth|class):`~?(?P<role_text>[\w.]+)`|``(?P<code>[\w.]+)``")
_KINDS = {"func": "function", "meth": "function", "class": "class", None: "code"}
_WORD = re.compile(r"\w+(?:[.']\w+)*|[^\w\s]")


def find_markup(strings: list[Document]) -> Iterator[tuple[tuple[str, str], ...]]:
    """Yields the words of a sentence, each with its label."""
    for string in strings:
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(string.text)):
            if ">>>" in paragraph:
                continue
            for text in filter(_MARKUP.search, split_sentences(" ".join(paragraph.split()))):
                words = _labelled_words(text)
                if not any(word in "`*_" for word, _ in words):
                    yield tuple(words)


def _labelled_words(text: str) -> list[tuple[str, str]]:
    words, end = [], 0
    for match in [*_MARKUP.finditer(text), None]:
        plain = text[end : match.start() if match else len(text)]
        words += [(word, "O") for word in _WORD.findall(plain)]
        if match:
            end = match.end()
            name = match["role_text"] or match["code"]
            words.append((name.rpartition(".")[2] or name, f"B-{_KINDS[match['role']]}"))
    return words


def format_markup(examples: list[tuple]) -> str:
    lines = ("\n".join(f"{word}\t{label}" for word, label in words) for words in examples)
    return "\n\n".join(lines) + "\n"


_CONDITION = re.compile(r"((?:If|When) [^,;:()]{4,40}), (?:then )?(.{10,150})\.")
_MAX_CONTEXT = 180  # characters: with the question, 90 % fit into a row of 64 tokens


def find_conditions(documents: list[Document]) -> Iterator[tuple[str, str, str, int]]:
    """Yields (context, question, answer, start of the answer): what follows from a condition.

    The context has the sentence with the condition and others of its docstring, so that the
    answer cannot be found without reading the condition.
    """
    for document in documents:
        texts = [text for line in document.text.split("\n") for text in _SENTENCE_END.split(line)]
        for index, text in enumerate(texts):
            match = _CONDITION.fullmatch(text)
            if not match or match[2].startswith(("and ", "or ", "but ")):  # the condition goes on
                continue
            first, end = _context_window(texts, index)
            context = " ".join(texts[first:end])
            condition = match[1][0].lower() + match[1][1:]
            # A docstring may say "If True" of two parameters: the question has two answers then.
            if end - first > 1 and context.lower().count(f"{condition.lower()},") == 1:
                start = len(" ".join([*texts[first:index], ""])) + match.start(2)
                yield context, f"What happens {condition}?", match[2], start


def _context_window(texts: list[str], index: int) -> tuple[int, int]:
    """(first, end) of the sentences around `index` that fit into a context."""
    first, end = index, index + 1
    while end < len(texts) and len(" ".join(texts[first : end + 1])) <= _MAX_CONTEXT:
        end += 1
    while first > 0 and len(" ".join(texts[first - 1 : end])) <= _MAX_CONTEXT:
        first -= 1
    return first, end


def format_conditions(examples: list[tuple]) -> str:
    """JSON as of SQuAD 1.1."""
    by_context = defaultdict(list)
    for context, question, answer, start in examples:
        by_context[context].append(
            {
                "id": hashlib.sha256(f"{question}\n{context}".encode()).hexdigest()[:16],
                "question": question,
                "answers": [{"text": answer, "answer_start": start}],
            }
        )
    entries = [
        {"title": "", "paragraphs": [{"context": context, "qas": questions}]}
        for context, questions in by_context.items()
    ]
    return json.dumps({"version": "1.1", "data": entries}, indent=1) + "\n"


def find_endings(documents: list[Document]) -> Iterable[tuple[str, str]]:
    """(second half of a sentence, first half); every second half occurs once."""
    halves = {}
    for document in documents:
        for line in document.text.split("\n"):
            for sentence in split_sentences(line):
                words = sentence.split()
                if 8 <= len(words) <= 16:
                    middle = len(words) // 2
                    halves[" ".join(words[middle:])] = " ".join(words[:middle])
    return halves.items()


def format_endings(examples: list[tuple]) -> str:
    """CSV with SWAG's columns.

    Each ending is correct once and wrong three times, so that it cannot be judged without its
    beginning. The wrong endings are of other sentences; a hash decides the correct one's column.
    """
    rows = []
    for number, (ending, beginning) in enumerate(examples):
        others = [examples[(number + offset) % len(examples)][0] for offset in (1, 2, 3)]
        label = int(hashlib.sha256(beginning.encode()).hexdigest(), 16) % 4
        rows.append(("", beginning, *others[:label], ending, *others[label:], label))
    return format_csv(rows, "sent1", "sent2", "ending0", "ending1", "ending2", "ending3", "label")


def find_paragraphs(documents: list[Document]) -> Iterator[str]:
    return (document.text for document in documents)


def format_paragraphs(examples: list[str]) -> str:
    return "\n\n".join(examples) + "\n"


# File of a task -> functions that find and format its examples, and whether they take the raw
# strings, with markup, instead of the documents.
FILES = {
    "sequence_classification.csv": (find_packages, format_packages, False),
    "token_classification.conll": (find_markup, format_markup, True),
    "question_answering.json": (find_conditions, format_conditions, False),
    "multiple_choice.csv": (find_endings, format_endings, False),
    "language_modeling.txt": (find_paragraphs, format_paragraphs, False),
}


if __name__ == "__main__":
    launch(main, ExampleDataSettings)

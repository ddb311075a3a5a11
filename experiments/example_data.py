"""Makes labelled data for all six tasks from the documentation that every installation brings.

    python -m experiments.example_data --output=runs/data

One train and one dev file a task, in the formats that people have their own data in. Labels are
what the authors of the documentation wrote, and nobody's guess:

    sequence_classification/{train,dev}.csv     text,label: which package a sentence comes from
    token_classification/{train,dev}.conll      the words set as code, functions or classes (BIO)
    question_answering/{train,dev}.json         "What happens if x is None?", in prose
    multiple_choice/{train,dev}.csv             how a sentence ends, of four (SWAG's columns)
    language_modeling/{train,dev}.txt           prose
    language_modeling/pretraining.txt           all the prose that is not dev's

A fifth of the modules is dev, as in `experiments.pretrain --validation_fraction=0.2`, without what
stands in a train module as well: a model pretrained so has seen nothing of it.
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
from typing import TYPE_CHECKING

from experiments.flags.checks import check_new_folder, check_positive
from experiments.flags.launch import launch
from experiments.flags.programs import ExampleDataSettings

if TYPE_CHECKING:
    from prelnroberta.data.pretraining.corpus import Document

DEV = 0.2  # of the modules; to be held out of pretraining, too
PRETRAINING = "language_modeling/pretraining.txt"
PACKAGES = ("python", "numpy", "scipy", "jax", "huggingface_hub", "rich")


def main(settings: ExampleDataSettings) -> int:
    """Writes a training and an evaluation file for each task. Returns the exit code."""
    check_positive(settings, "train_examples", "dev_examples")
    check_new_folder(settings.output)

    from prelnroberta.data.pretraining.docstrings import DocstringCorpus
    from prelnroberta.files import atomic_write

    corpus = DocstringCorpus()
    documents, strings = list(corpus.documents()), list(corpus.strings())
    most = {"train": settings.train_examples, "dev": settings.dev_examples}
    with atomic_write(settings.output) as partial:
        for name, (find, write, from_strings) in FILES.items():
            task, _, suffix = name.partition(".")
            (partial / task).mkdir(parents=True)
            modules = divided(strings if from_strings else documents)
            found = {split: set(find(inside)) for split, inside in modules.items()}
            found["dev"] -= found["train"]
            for split, examples in found.items():
                kept = chosen(examples, most[split])
                (partial / task / f"{split}.{suffix}").write_text(write(kept), encoding="utf-8")
                print(f"{task}/{split}.{suffix}: {len(kept):,} examples")
        texts = list(paragraphs(divided(documents)["train"]))
        (partial / PRETRAINING).write_text(write_paragraphs(texts), encoding="utf-8")
        print(f"{PRETRAINING}: {len(texts):,} documents")
    print(f"written: {settings.output}")
    return 0


def divided(documents: Iterable[Document]) -> dict[str, list[Document]]:
    from prelnroberta.data.pretraining.corpus import in_validation_split

    splits: dict[str, list[Document]] = {"train": [], "dev": []}
    for document in documents:
        splits["dev" if in_validation_split(document.key, DEV) else "train"].append(document)
    return splits


def chosen(examples: Iterable, most: int) -> list:
    """At most so many different ones, in an order of their hashes: no one's choice."""
    return sorted(set(examples), key=lambda e: hashlib.sha256(repr(e).encode()).hexdigest())[:most]


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def sentences(text: str) -> list[str]:
    """Whole sentences of one line, 30 to 250 characters."""
    found = _SENTENCE_END.split(text)
    return [s for s in found if 30 <= len(s) <= 250 and s[0].isupper() and s[-1] == "."]


def table(rows: Iterable[tuple], *columns: str) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return file.getvalue()


def packages(documents: list[Document]) -> Iterator[tuple[str, str]]:
    """(sentence, package)"""
    for document in documents:
        package = document.key.partition("/")[0]
        if package in PACKAGES:
            for line in document.text.split("\n"):
                yield from ((sentence, package) for sentence in sentences(line))


def write_packages(examples: list[tuple]) -> str:
    return table(examples, "text", "label")


_MARKUP = re.compile(r":(?P<role>func|meth|class):`~?(?P<role_text>[\w.]+)`|``(?P<code>[\w.]+)``")
_KINDS = {"func": "function", "meth": "function", "class": "class", None: "code"}
_WORD = re.compile(r"\w+(?:[.']\w+)*|[^\w\s]")


def markup(strings: list[Document]) -> Iterator[tuple[tuple[str, str], ...]]:
    """A sentence's words, each with its label."""
    for string in strings:
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(string.text)):
            if ">>>" in paragraph:
                continue
            for text in filter(_MARKUP.search, sentences(" ".join(paragraph.split()))):
                words, end = [], 0
                for match in [*_MARKUP.finditer(text), None]:
                    plain = text[end : match.start() if match else len(text)]
                    words += [(word, "O") for word in _WORD.findall(plain)]
                    if match:
                        end = match.end()
                        name = match["role_text"] or match["code"]
                        label = f"B-{_KINDS[match['role']]}"
                        words.append((name.rpartition(".")[2] or name, label))
                if not any(word in "`*_" for word, _ in words):
                    yield tuple(words)


def write_markup(examples: list[tuple]) -> str:
    lines = ("\n".join(f"{word}\t{label}" for word, label in words) for words in examples)
    return "\n\n".join(lines) + "\n"


_CONDITION = re.compile(r"((?:If|When) [^,;:()]{4,40}), (?:then )?(.{10,150})\.")
_CONTEXT = 180  # characters: nine of ten fit a row of 64 tokens, question and all


def conditions(documents: list[Document]) -> Iterator[tuple[str, str, str, int]]:
    """(context, question, answer, where the answer begins): what follows from a condition.

    The context is the sentence that says it among others of its docstring: whoever does not look
    for the condition has several to choose from.
    """
    for document in documents:
        texts = [text for line in document.text.split("\n") for text in _SENTENCE_END.split(line)]
        for place, text in enumerate(texts):
            match = _CONDITION.fullmatch(text)
            if not match or match[2].startswith(("and ", "or ", "but ")):  # the condition goes on
                continue
            first, end = place, place + 1
            while end < len(texts) and len(" ".join(texts[first : end + 1])) <= _CONTEXT:
                end += 1
            while first > 0 and len(" ".join(texts[first - 1 : end])) <= _CONTEXT:
                first -= 1
            context = " ".join(texts[first:end])
            condition = match[1][0].lower() + match[1][1:]
            # "If True" may stand there of two parameters, and has two answers then.
            if end - first > 1 and context.lower().count(f"{condition.lower()},") == 1:
                start = len(" ".join([*texts[first:place], ""])) + match.start(2)
                yield context, f"What happens {condition}?", match[2], start


def write_conditions(examples: list[tuple]) -> str:
    """SQuAD 1.1"""
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


def endings(documents: list[Document]) -> Iterable[tuple[str, str]]:
    """(second half of a sentence, first half); no second half comes twice."""
    halves = {}
    for document in documents:
        for line in document.text.split("\n"):
            for sentence in sentences(line):
                words = sentence.split()
                if 8 <= len(words) <= 16:
                    middle = len(words) // 2
                    halves[" ".join(words[middle:])] = " ".join(words[:middle])
    return halves.items()


def write_endings(examples: list[tuple]) -> str:
    """Each ending is right once and wrong three times: read alone, it tells nothing.

    The wrong ones end other sentences; hashes say which, and the place of the right one.
    """
    rows = []
    for number, (true, beginning) in enumerate(examples):
        others = [examples[(number + step) % len(examples)][0] for step in (1, 2, 3)]
        label = int(hashlib.sha256(beginning.encode()).hexdigest(), 16) % 4
        rows.append(("", beginning, *others[:label], true, *others[label:], label))
    return table(rows, "sent1", "sent2", "ending0", "ending1", "ending2", "ending3", "label")


def paragraphs(documents: list[Document]) -> Iterator[str]:
    return (document.text for document in documents)


def write_paragraphs(examples: list[str]) -> str:
    return "\n\n".join(examples) + "\n"


# File of a task -> how examples are found and written, and whether they need the strings' markup.
FILES = {
    "sequence_classification.csv": (packages, write_packages, False),
    "token_classification.conll": (markup, write_markup, True),
    "question_answering.json": (conditions, write_conditions, False),
    "multiple_choice.csv": (endings, write_endings, False),
    "language_modeling.txt": (paragraphs, write_paragraphs, False),
}


if __name__ == "__main__":
    launch(main, ExampleDataSettings)

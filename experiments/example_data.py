"""Makes labelled data for all six tasks from the documentation that every installation brings.

    python -m experiments.example_data --output=runs/data

One train and one dev file a task, in the formats that people have their own data in. Labels are
what the authors of the documentation wrote, and nobody's guess:

    sequence_classification/{train,dev}.csv     text,label: which package a sentence comes from
    token_classification/{train,dev}.conll      the words set as code, functions or classes (BIO)
    question_answering/{train,dev}.json         "What is the type of x?" in a list of parameters
    multiple_choice/{train,dev}.csv             how a sentence ends, of four (SWAG's columns)
    language_modeling/{train,dev}.txt           prose

Modules are divided as `experiments.pretrain` divides them: dev is text that a model pretrained on
the docstrings has never seen.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from experiments import flags
from experiments.flags import FLAGS

if TYPE_CHECKING:
    from prelnroberta.data.corpus import Document

flags.declare("example_data", "new_folder")

DEV = 0.05  # of the modules: pretraining's --validation_fraction
PACKAGES = ("python", "numpy", "scipy", "jax", "huggingface_hub", "rich")

Split = dict[str, list[str]]  # name of the split -> lines or JSON texts, in the order of the corpus


def main() -> int:
    flags.positive("examples")
    flags.check_new_folder(FLAGS.output)

    from prelnroberta.data.corpus import DocstringCorpus
    from prelnroberta.files import written_whole

    corpus = DocstringCorpus()
    documents, strings = list(corpus.documents()), list(corpus.strings())
    makers = {
        "sequence_classification.csv": (packages, documents),
        "token_classification.conll": (markup, strings),
        "question_answering.json": (parameters, strings),
        "multiple_choice.csv": (endings, documents),
        "language_modeling.txt": (paragraphs, documents),
    }
    with written_whole(FLAGS.output) as partial:
        for name, (make, source) in makers.items():
            task, _, suffix = name.partition(".")
            (partial / task).mkdir(parents=True)
            for split, inside in divided(source).items():
                text, count = make(inside, FLAGS.examples)
                (partial / task / f"{split}.{suffix}").write_text(text, encoding="utf-8")
                print(f"{task}/{split}.{suffix}: {count:,} examples")
    print(f"written: {FLAGS.output}")
    return 0


def divided(documents: Iterable[Document]) -> dict[str, list[Document]]:
    from prelnroberta.data.corpus import is_validation

    splits: dict[str, list[Document]] = {"train": [], "dev": []}
    for document in documents:
        splits["dev" if is_validation(document.key, DEV) else "train"].append(document)
    return splits


def chosen(items: Iterable, most: int) -> list:
    """At most so many different ones, in an order of their hashes: no one's choice."""
    return sorted(set(items), key=lambda item: hashlib.sha256(repr(item).encode()).hexdigest())[
        :most
    ]


def sentences(text: str) -> list[str]:
    """Whole sentences of one line, 30 to 250 characters."""
    found = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
    return [s for s in found if 30 <= len(s) <= 250 and s[0].isupper() and s[-1] == "."]


def table(rows: list[tuple], columns: tuple[str, ...]) -> tuple[str, int]:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return file.getvalue(), len(rows)


def packages(documents: list[Document], most: int) -> tuple[str, int]:
    rows = []
    for document in documents:
        package = document.key.partition("/")[0]
        if package in PACKAGES:
            rows += [(s, package) for line in document.text.split("\n") for s in sentences(line)]
    return table(chosen(rows, most), ("text", "label"))


_MARKUP = re.compile(r":(?P<role>func|meth|class):`~?(?P<role_text>[\w.]+)`|``(?P<code>[\w.]+)``")
_KINDS = {"func": "function", "meth": "function", "class": "class", None: "code"}
_WORD = re.compile(r"\w+(?:[.']\w+)*|[^\w\s]")


def markup(strings: list[Document], most: int) -> tuple[str, int]:
    found = []
    for string in strings:
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(string.text)):
            text = " ".join(paragraph.split())
            if not _MARKUP.search(text) or text[-1:] != "." or ">>>" in text:
                continue
            words, end = [], 0
            for match in [*_MARKUP.finditer(text), None]:
                plain = text[end : match.start() if match else len(text)]
                words += [(word, "O") for word in _WORD.findall(plain)]
                if match:
                    end = match.end()
                    name = match["role_text"] or match["code"]
                    words.append((name.rpartition(".")[2] or name, f"B-{_KINDS[match['role']]}"))
            if 8 <= len(words) <= 60 and not any(word in "`*_:" for word, _ in words):
                found.append(tuple(words))
    kept = chosen(found, most)
    lines = ("\n".join(f"{word}\t{label}" for word, label in words) for words in kept)
    return "\n\n".join(lines) + "\n", len(kept)


_PARAMETER = re.compile(r"^([a-z]\w*) : (\w[^\n]{1,60})$", re.MULTILINE)


def parameters(strings: list[Document], most: int) -> tuple[str, int]:
    """SQuAD 1.1: a paragraph is one docstring's parameters; each of them is asked for."""
    asked = []
    for string in strings:
        text = inspect.cleandoc(string.text)
        matches = list(_PARAMETER.finditer(text))
        if not 3 <= len({match[1] for match in matches}) == len(matches) <= 8:
            continue
        context, answers = "", []
        for match in matches:
            context += f"{match[1]} : "
            answers.append((match[1], match[2], len(context)))
            context += f"{match[2]}\n"
        asked += [(context, name, kind, start) for name, kind, start in answers]
    by_context = defaultdict(list)
    kept = chosen(asked, most)
    for context, name, kind, start in kept:
        by_context[context].append(
            {
                "id": hashlib.sha256(f"{name}\n{context}".encode()).hexdigest()[:16],
                "question": f"What is the type of {name}?",
                "answers": [{"text": kind, "answer_start": start}],
            }
        )
    entries = [
        {"title": "", "paragraphs": [{"context": context, "qas": questions}]}
        for context, questions in by_context.items()
    ]
    return json.dumps({"version": "1.1", "data": entries}, indent=1) + "\n", len(kept)


def endings(documents: list[Document], most: int) -> tuple[str, int]:
    """Each ending is right once and wrong three times: read alone, it tells nothing.

    The wrong ones end other sentences; hashes say which, and the place of the right one.
    """
    halves = {}
    for document in documents:
        for line in document.text.split("\n"):
            for sentence in sentences(line):
                words = sentence.split()
                if 8 <= len(words) <= 16:
                    middle = len(words) // 2
                    halves[" ".join(words[middle:])] = " ".join(words[:middle])
    kept, rows = chosen(halves.items(), most), []
    for number, (true, beginning) in enumerate(kept):
        others = [kept[(number + step) % len(kept)][0] for step in (1, 2, 3)]
        label = int(hashlib.sha256(beginning.encode()).hexdigest(), 16) % 4
        rows.append(("", beginning, *others[:label], true, *others[label:], label))
    return table(rows, ("sent1", "sent2", "ending0", "ending1", "ending2", "ending3", "label"))


def paragraphs(documents: list[Document], most: int) -> tuple[str, int]:
    kept = chosen((document.text for document in documents), most)
    return "\n\n".join(kept) + "\n", len(kept)


if __name__ == "__main__":
    flags.launch(main)

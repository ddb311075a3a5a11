"""Labelled data for tests of the tasks: what `experiments.example_data` makes of a few packages."""

from functools import cache

from support import SCRATCH

from experiments import example_data
from prelnroberta.data.corpus import DocstringCorpus
from prelnroberta.data.tokenizer import train_tokenizer


@cache
def corpus():
    """Documents and raw strings of parts of three packages, and a tokenizer of their text."""
    found = DocstringCorpus(["flax", "rich", "scipy"])
    parts = {"flax": "", "rich": "", "scipy": "linalg"}
    found.roots = {name: [found.roots[name][0] / part] for name, part in parts.items()}
    documents, strings = list(found.documents()), list(found.strings())
    return documents, strings, train_tokenizer((d.text for d in documents), 600)


@cache
def example_file(task, count=300):
    documents, strings, _ = corpus()
    makers = {
        "sequence_classification": (".csv", example_data.packages, documents),
        "token_classification": (".conll", example_data.markup, strings),
        "question_answering": (".json", example_data.parameters, strings),
        "multiple_choice": (".csv", example_data.endings, documents),
        "causal_lm": (".txt", example_data.paragraphs, documents),
        "masked_lm": (".txt", example_data.paragraphs, documents),
    }
    suffix, make, source = makers[task]
    text, _ = make(source, count)
    path = SCRATCH / f"{task}-{count}{suffix}"
    path.write_text(text, encoding="utf-8")
    return path

"""Labelled data for tests of the tasks: what `experiments.example_data` makes of a few packages."""

from functools import cache

from experiments import example_data
from prelnroberta.data.pretraining.docstrings import DocstringCorpus
from prelnroberta.data.tokenizer import train_tokenizer
from tests.helpers.programs import SCRATCH


@cache
def corpus():
    """Documents and raw strings of parts of three packages, and a tokenizer of their text."""
    found = DocstringCorpus(["flax", "rich", "scipy"])
    parts = {"flax": "", "rich": "", "scipy": "linalg"}
    found.roots = {name: [found.roots[name][0] / part] for name, part in parts.items()}
    documents, strings = list(found.documents()), list(found.multiline_strings())
    return documents, strings, train_tokenizer((d.text for d in documents), 600)


@cache
def example_file(task, count=300):
    documents, strings, _ = corpus()
    name = "language_modeling" if task in ("causal_lm", "masked_lm") else task
    [(suffix, (find, write, from_strings))] = [
        (file.removeprefix(name), how)
        for file, how in example_data.FILES.items()
        if file.startswith(name)
    ]
    examples = example_data.sample_by_hash(find(strings if from_strings else documents), count)
    path = SCRATCH / f"{task}-{count}{suffix}"
    path.write_text(write(examples), encoding="utf-8")
    return path

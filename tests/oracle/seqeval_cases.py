"""Writes tests/metrics/seqeval_cases.txt: entities as seqeval 1.2.2 counts them, in every mode.

seqeval is an sdist of 2020 that pip builds only with --use-pep517, so the suite has its answers:
    pip install --use-pep517 --target DIR scikit-learn seqeval
    PYTHONPATH=DIR python tests/oracle/seqeval_cases.py > tests/metrics/seqeval_cases.txt

A line: scheme (or 'default'), true tags, predicted tags, and the precision, recall and F1 of
seqeval's micro and macro averages. Sentences are parted by '/', and 'Bx' stands for B-x.
"""

import random
import warnings

import numpy as np
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support as default_mode
from seqeval.metrics.v1 import precision_recall_fscore_support as strict_mode
from seqeval.scheme import IOB1, IOB2, IOBES

LETTERS = {"IOB1": "BI", "IOB2": "BI", "IOBES": "BIES", "default": "BIES"}
SCHEMES = {"IOB1": IOB1, "IOB2": IOB2, "IOBES": IOBES}


def tag(rng: random.Random, letters: str) -> str:
    return "O" if rng.random() < 0.3 else rng.choice(letters) + rng.choice("xy")


def changed(rng: random.Random, tags: list[str], letters: str) -> list[str]:
    return [tag(rng, letters) if rng.random() < 0.25 else old for old in tags]


def spelled(sentences: list[list[str]]) -> list[list[str]]:
    return [[t if t == "O" else f"{t[0]}-{t[1]}" for t in tags] for tags in sentences]


def main() -> None:
    warnings.simplefilter("ignore")
    rng = random.Random(0)
    for scheme, letters in LETTERS.items():
        for _ in range(120):
            sizes = [rng.randint(1, 9) for _ in range(rng.randint(1, 3))]
            true = [[tag(rng, letters) for _ in range(size)] for size in sizes]
            predicted = [changed(rng, tags, letters) for tags in true]
            numbers = []
            for average in ("micro", "macro"):
                options = {"average": average, "zero_division": 0}
                if scheme == "default":
                    scores = default_mode(spelled(true), spelled(predicted), **options)
                else:
                    options["scheme"] = SCHEMES[scheme]
                    scores = strict_mode(spelled(true), spelled(predicted), **options)
                # The mean over no types at all is nan there.
                numbers += [f"{np.nan_to_num(float(score)):.12g}" for score in scores[:3]]
            texts = ["/".join(" ".join(tags) for tags in side) for side in (true, predicted)]
            print("\t".join([scheme, *texts, *numbers]))


if __name__ == "__main__":
    main()

"""A small fine-tuning run and its files."""

import csv
from functools import cache

import numpy as np

from tests.helpers.programs import SCRATCH, call, finished_run

REVIEW_WORDS = {
    "good": ["fine", "great", "nice", "super"],
    "bad": ["awful", "poor", "sad", "worse"],
}


@cache
def reviews(name, count, seed):
    """A CSV that is easy to learn."""
    rng = np.random.default_rng(seed)
    path = SCRATCH / name / "reviews.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            label = rng.choice(["bad", "good"])
            words = rng.choice(REVIEW_WORDS[label], rng.integers(2, 6))
            writer.writerow([" ".join(words), label])
    return path


def finetune_flags(**changes):
    values = {
        "task": "sequence_classification",
        "init_from": finished_run(),
        "train_file": reviews("train", 120, 1),
        "eval_file": reviews("dev", 40, 2),
        "max_length": 32,
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
        "epochs": 3,
        "eval_every": 9,
        "save_every": 4,
        "log_every": 7,
        "learning_rate": 1e-2,
        "length_buckets": 1,
        "hidden_dropout_prob": 0.1,
        "label_smoothing": 0.1,
        "class_weights": "balanced",
        "layer_decay": 0.9,
        "seed": 4,
    }
    return [f"--{name}={value}" for name, value in (values | changes).items()]


@cache
def finished_finetuning():
    run_dir = SCRATCH / "finetuned"
    done = call("finetune", *finetune_flags(), f"--run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout

"""A tour of a few minutes: pretrains a small model on English text and fills masks with it.

    make demo        (or: python -m experiments.demo --run_dir=runs/demo)

The same command resumes an interrupted run; after a complete one it only fills the masks.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.flags.launch import launch
from experiments.flags.programs import DemoSettings

if TYPE_CHECKING:
    import tokenizers

    from prelnroberta.data.pretraining.corpus import Document

RECIPE = Path(__file__).parent / "recipes" / "demo.flags"
NUM_SENTENCES = 10


def main(settings: DemoSettings) -> int:
    """Pretrains, fills masks, and prints what to do next. Returns the exit code."""
    run_dir = Path(settings.run_dir)
    print(f"pretraining on the English of the installed packages' documentation, in {run_dir}")
    pretrain = [sys.executable, "-m", "experiments.pretrain", f"--flagfile={RECIPE}"]
    process = subprocess.Popen([*pretrain, f"--run_dir={run_dir}"])
    # Ctrl-C also signals the child, which saves a checkpoint: wait for it to exit.
    previous_handler = signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    if code := process.wait():
        return code
    signal.signal(signal.SIGINT, previous_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    from experiments.common.run_report import format_validation, read_records

    records = read_records(run_dir / "metrics.jsonl")
    first, *_, last = [record for record in records if record["kind"] == "validation"]
    print("\nthe curve, first and last evaluation:")
    print(f"  {format_validation(first)}\n  {format_validation(last)}")
    fill_masks(run_dir)
    print_next_steps(run_dir)
    return 0


def fill_masks(run_dir: Path) -> None:
    """Masks a word in each of a few held-out sentences, and prints the guesses."""
    from prelnroberta.data.pretraining.docstrings import DocstringCorpus
    from prelnroberta.data.tokenizer import load_tokenizer
    from prelnroberta.inference.fill_mask import FillMask
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    print("\nlooking for sentences in held-out documentation", flush=True)
    params, config = load_pretrained(run_dir / "model")
    tokenizer = load_tokenizer(run_dir / "model")
    fill = FillMask(params, config, tokenizer)
    manifest = json.loads((run_dir / "corpus.json").read_text())
    fraction = manifest["validation"]["validation_fraction"]
    examples = masked_held_out_sentences(DocstringCorpus().documents(), fraction, tokenizer)
    num_first = num_in_five = 0
    print(f"\n{len(examples)} masks in held-out sentences, five guesses each (* is the true word):")
    for (text, answer), [guesses] in zip(examples, fill(text for text, _ in examples), strict=True):
        words = [guess.text.strip() for guess in guesses]
        num_first += words[0] == answer
        num_in_five += answer in words
        formatted = (
            f"{'*' if word == answer else ''}{word or repr(guess.text)} {guess.probability:.0%}"
            for word, guess in zip(words, guesses, strict=True)
        )
        print(f"\n  {text}   [{answer}]\n    {'   '.join(formatted)}")
    print(
        f"\nthe true word came first in {num_first} of {len(examples)}, among the five in "
        f"{num_in_five}"
    )


def masked_held_out_sentences(
    documents: Iterator[Document], fraction: float, tokenizer: tokenizers.Tokenizer
) -> list[tuple[str, str]]:
    """Pairs of a sentence with a mask and the masked word; both are chosen by hash."""
    from prelnroberta.data.pretraining.corpus import in_validation_split

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    sentences = set()
    for document in documents:
        if in_validation_split(document.key, fraction):
            sentences.update(re.findall(r"(?<![^\n])[A-Z][\w ,'-]{40,90}\.(?=\s|$)", document.text))
    examples = []
    for sentence in sorted(sentences, key=digest):
        words = re.finditer(r"(?<= )[a-z]{3,}\b", sentence)
        single_tokens = [w for w in words if tokenizer.token_to_id(f"Ġ{w.group()}") is not None]
        if single_tokens:
            word = min(single_tokens, key=lambda w: digest(sentence + w.group()))
            # The mask token includes the space before it, as in RoBERTa.
            masked = sentence[: word.start()] + "<mask>" + sentence[word.end() :]
            examples.append((masked, word.group()))
    return examples[:NUM_SENTENCES]


def print_next_steps(run_dir: Path) -> None:
    print(
        f"""
the model is a Hugging Face folder, {run_dir / "model"}:
  transformers.AutoModelForMaskedLM.from_pretrained("{run_dir / "model"}")

what to type next:
  # your own sentence
  python -m experiments.predict --task=fill_mask --model={run_dir} --text="Returns a <mask> of x."
  # your own text (files, folders, globs; .txt .md .jsonl, also .gz)
  python -m experiments.pretrain --flagfile=experiments/recipes/small_cpu.flags \\
      --corpus=PATH --run_dir=runs/mine
  # every flag
  python -m experiments.pretrain --help

(in a new shell, first: source .venv/bin/activate)"""
    )


if __name__ == "__main__":
    launch(main, DemoSettings)

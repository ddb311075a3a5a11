"""The five-minute tour: pretrains a small model on real English and fills masks with it.

    make demo        (or: python -m experiments.demo --run_dir=runs/demo)

Interrupted, it goes on where it stopped; finished, it goes straight to the masks.
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
SENTENCES = 10


def main(settings: DemoSettings) -> int:
    """Pretrains, fills masks, and prints what to do next. Returns the exit code."""
    run_dir = Path(settings.run_dir)
    print(f"pretraining on the English of the installed packages' documentation, in {run_dir}")
    pretrain = [sys.executable, "-m", "experiments.pretrain", f"--flagfile={RECIPE}"]
    process = subprocess.Popen([*pretrain, f"--run_dir={run_dir}"])
    # Whoever presses Ctrl-C reaches the child as well, which saves: it is waited for, not killed.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    if code := process.wait():
        return code
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    from experiments.common.report import format_validation, read_records

    records = read_records(run_dir / "metrics.jsonl")
    first, *_, last = [record for record in records if record["kind"] == "validation"]
    print("\nthe curve, first and last evaluation:")
    print(f"  {format_validation(first)}\n  {format_validation(last)}")
    fill_masks(run_dir)
    print_next_steps(run_dir)
    return 0


def fill_masks(run_dir: Path) -> None:
    """Hides a word in each of some sentences that training never saw, and shows the guesses."""
    from prelnroberta.data.pretraining.docstrings import DocstringCorpus
    from prelnroberta.data.tokenizer import load_tokenizer
    from prelnroberta.inference.fill_mask import FillMask
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    print("\nlooking for sentences in the documentation that was held out", flush=True)
    params, config = load_pretrained(run_dir / "model")
    tokenizer = load_tokenizer(run_dir / "model")
    fill = FillMask(params, config, tokenizer)
    manifest = json.loads((run_dir / "corpus.json").read_text())
    fraction = manifest["validation"]["validation_fraction"]
    riddles = held_out_riddles(DocstringCorpus().documents(), fraction, tokenizer)
    first = among = 0
    print(f"\n{len(riddles)} masks in held-out sentences, five guesses each (* is the true word):")
    for (text, answer), [guesses] in zip(riddles, fill(text for text, _ in riddles), strict=True):
        words = [guess.text.strip() for guess in guesses]
        first += words[0] == answer
        among += answer in words
        shown = (
            f"{'*' if word == answer else ''}{word or repr(guess.text)} {guess.probability:.0%}"
            for word, guess in zip(words, guesses, strict=True)
        )
        print(f"\n  {text}   [{answer}]\n    {'   '.join(shown)}")
    print(f"\nthe true word came first in {first} of {len(riddles)}, among the five in {among}")


def held_out_riddles(
    documents: Iterator[Document], fraction: float, tokenizer: tokenizers.Tokenizer
) -> list[tuple[str, str]]:
    """(sentence with a mask, the hidden word), chosen by hash: by neither hand nor model."""
    from prelnroberta.data.pretraining.corpus import in_validation_split

    def shuffled(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    sentences = set()
    for document in documents:
        if in_validation_split(document.key, fraction):
            sentences.update(re.findall(r"(?<![^\n])[A-Z][\w ,'-]{40,90}\.(?=\s|$)", document.text))
    riddles = []
    for sentence in sorted(sentences, key=shuffled):
        words = re.finditer(r"(?<= )[a-z]{3,}\b", sentence)
        single = [w for w in words if tokenizer.token_to_id(f"Ġ{w.group()}") is not None]
        if single:
            word = min(single, key=lambda w: shuffled(sentence + w.group()))
            # The mask token takes the space before it along, as in RoBERTa.
            masked = sentence[: word.start()] + "<mask>" + sentence[word.end() :]
            riddles.append((masked, word.group()))
    return riddles[:SENTENCES]


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

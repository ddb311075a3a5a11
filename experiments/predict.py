"""Predicts with a trained model, on text from a flag, a file or standard input.

python -m experiments.predict --task=fill_mask --model=runs/a --text="Returns a <mask> of ints."
cat lines.txt | python -m experiments.predict --task=fill_mask --model=DIR --format=json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from experiments import flags
from experiments.flags import FLAGS
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    from prelnroberta.fill_mask import Guess

flags.declare("predict", "compute")


def main() -> int:
    flags.positive("top_k", "batch_size")
    directory = flags.model_folder(FLAGS.model)

    from prelnroberta.data.tokenizer import load_tokenizer
    from prelnroberta.fill_mask import FillMask
    from prelnroberta.huggingface import load_pretrained

    params, config = load_pretrained(directory)
    fill = FillMask(params, config, load_tokenizer(directory), flags.execution())
    asked: list[str] = []

    def remembered() -> Iterator[str]:
        for text in texts():
            asked.append(text)
            yield text

    show = show_json if FLAGS.format == "json" else show_text
    # Whoever types waits for each answer.
    batch_size = 1 if reads_keyboard() else FLAGS.batch_size
    for masks in fill(remembered(), FLAGS.top_k, batch_size):
        show(asked.pop(0), masks)
    return 0


def reads_keyboard() -> bool:
    return not FLAGS.text and FLAGS.file is None and sys.stdin.isatty()


def texts() -> Iterator[str]:
    """--text, --file, or standard input; one text a line, empty lines left out."""
    if FLAGS.text:
        yield from FLAGS.text
        return
    if FLAGS.file is None:
        if reads_keyboard():
            print("reading from the keyboard, a text a line; end with Ctrl-D", file=sys.stderr)
        lines, name = sys.stdin.buffer, "standard input"
    else:
        name = FLAGS.file
        try:
            lines = open(name, "rb")  # noqa: SIM115 - closed below, with standard input's likes
        except OSError as error:
            raise InputError(f"--file={name}: {error.strerror}") from None
    offset, empty = 0, True
    with lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{name}: not UTF-8 at byte {offset + error.start} (line {number}); convert it "
                    "to UTF-8"
                ) from None
            offset += len(line)
            if text:
                empty = False
                yield text
    if empty:
        raise InputError(f"{name} holds no text, expected a text with <mask> a line")


def show_text(text: str, masks: list[list[Guess]]) -> None:
    print(text)
    for number, guesses in enumerate(masks, 1):
        if len(masks) > 1:
            print(f"  mask {number}")
        for guess in guesses:
            print(f"  {guess.probability:7.1%}  {guess.text.strip() or repr(guess.text)}")
    sys.stdout.flush()


def show_json(text: str, masks: list[list[Guess]]) -> None:
    guesses = [[dataclasses.asdict(guess) for guess in mask] for mask in masks]
    print(json.dumps({"text": text, "masks": guesses}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    flags.launch(main)

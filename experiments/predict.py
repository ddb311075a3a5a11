"""Predicts with a trained model, for texts from a flag, a file or standard input.

    python -m experiments.predict --task=fill_mask --model=runs/a --text="Returns a <mask> of ints."
    python -m experiments.predict --model=runs/reviews --file=new.csv > answers.jsonl
    python -m experiments.predict --model=runs/qa --text="Who wrote it?" --pair="It is by Ada."
    python -m experiments.predict --task=embed --model=runs/a --file=texts.txt --output=vectors.npz
    python -m experiments.predict --task=generate --model=runs/clm --text="The function"
    python -m experiments.predict --task=attention --model=runs/a --text="A b." --output=maps

Without --task, the task is the one that the model was trained for. Predictions are JSON lines in the
order of the input. They are written as they are made, so memory does not grow with the input.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import flags
from experiments.common.text_input import opened, reads_keyboard, texts
from experiments.flags import FLAGS
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

if TYPE_CHECKING:
    from experiments.tasks import Prediction
    from prelnroberta.inference.fill_mask import Guess

_CHUNK = 1024  # examples in memory at the same time


def main(settings: PredictSettings) -> int:
    """Runs the task or use. Returns the exit code."""
    check_positive(settings, "top_k", "batch_size", "max_new_tokens", "num_beams")
    folder = find_model_folder(settings.model)
    task = settings.task or trained_for(folder)
    if task == "embed":
        from experiments.common.embeddings import embed

        return embed(settings, folder)
    if task == "attention":
        from experiments.common.attention_maps import draw_attention_maps

        return draw_attention_maps(settings, folder)
    if task in ("fill_mask", "masked_lm"):
        return fill_masks(settings, folder)
    if task in ("generate", "causal_lm"):
        return write_lines(continuations(settings, folder), settings.output)
    return predict_examples(settings, folder)


def trained_for(folder: Path) -> str:
    """The task in a model's task.json."""
    path = folder / "task.json"
    if not path.exists():
        raise InputError(
            f"--task is missing, expected one of {', '.join((*TASK_NAMES, *USES))}: {folder} has "
            "no task.json that says what it was trained for"
        )
    return read_task_json(path)["task"]


class SkippedTexts:
    """Texts without a prediction. Each is reported with its place; the end counts them all."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def add(self, place: str, problem: str) -> None:
        self.places.append(place)
        print(f"{place}: {problem}", file=sys.stderr)

    def raise_if_any(self, total: int) -> None:
        if self.places:
            shown = "; ".join(self.places[:5]) + ("; .." if len(self.places) > 5 else "")
            raise InputError(f"{len(self.places):,} of {total:,} got no answer: {shown}")


def write_lines(predictions: Iterable[Prediction], output: str | None) -> int:
    """Writes JSON lines to the file `output`, or as they come to standard output."""
    with ExitStack() as stack:
        file = sys.stdout
        if output:
            partial = stack.enter_context(atomic_write(output))
            file = stack.enter_context(partial.open("w", encoding="utf-8"))
        for prediction in predictions:
            file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
            file.flush()
    return 0


# ---------------------------------------------------------------------------------------------
# Tasks.


def answer_examples(folder: Path) -> int:
    """The answers of a fine-tuned model, chunk by chunk."""
    from experiments.common.evaluator import Evaluator, batches_by_length
    from experiments.tasks import TASKS
    from prelnroberta.data.readers.row_errors import RowErrors
    from prelnroberta.data.tokenizer import load_tokenizer
    from prelnroberta.distributed.sharding import Layout, Parallelism
    from prelnroberta.model.heads import MODULES
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    settings = flags.task_settings(RobertaPreLayerNormConfig.from_json(folder), folder)
    task, bad = TASKS[settings.task](settings), RowErrors(skip=True)
    if FLAGS.text:
        examples = iter(task.examples_from_text(FLAGS.text, FLAGS.pair, FLAGS.choice))
        bad.seen(len(FLAGS.text))
    elif FLAGS.file:
        opened()[0].close()
        examples = task.stream_examples(FLAGS.file, bad, None)
    else:
        kind = FLAGS.stdin_format
        if kind is None:
            plain = task.model == "sequence_classification" and settings.pair_column is None
            kind = "txt" if plain else "jsonl"
        examples = task.stream_examples(f"stdin.{kind}", bad, opened()[0])
    tokenizer = load_tokenizer(folder)
    params, config = load_pretrained(folder, task.model)
    layout = Layout(Parallelism(), config, task.model)

    def answers() -> Iterator[Prediction]:
        evaluator = Evaluator(task, MODULES[task.model](config, flags.execution()), layout)
        weights = evaluator.place_params(params)
        while chunk := list(itertools.islice(examples, 1 if reads_keyboard() else _CHUNK)):
            features = task.features(chunk, tokenizer, bad, training=False)
            batches = batches_by_length(features, settings.max_length)
            rows, _ = evaluator(weights, features, batches)
            yield from task.predictions(features, rows)

    with layout.use_mesh():
        write_lines(answers())
    if bad.bad and not FLAGS.skip_bad_rows:
        raise InputError(f"without an answer: {bad.summary}")
    return 0


def continuations(folder: Path) -> Iterator[Prediction]:
    """What a causal language model writes after each text."""
    import jax
    import numpy as np

    from prelnroberta.data.tokenizer import EOS_ID, load_tokenizer
    from prelnroberta.pretrained.flax_models import FlaxRobertaPreLayerNormForCausalLM

    model = FlaxRobertaPreLayerNormForCausalLM.from_pretrained(folder, dtype=FLAGS.dtype)
    tokenizer = load_tokenizer(folder)
    settings: dict[str, Any] = {"max_new_tokens": FLAGS.max_new_tokens}
    settings |= {"num_beams": FLAGS.num_beams, "do_sample": FLAGS.do_sample}
    if FLAGS.do_sample:
        settings |= {"temperature": FLAGS.temperature, "top_p": FLAGS.top_p}
        settings |= {"top_k": FLAGS.top_k} if FLAGS["top_k"].present else {}
    key = jax.random.key(FLAGS.seed)
    lines = texts()
    batch_size = 1 if reads_keyboard() else FLAGS.batch_size
    for number in itertools.count():
        chunk = list(itertools.islice(lines, batch_size))
        if not chunk:
            return
        prompts = [tokenizer.encode(line.text).ids[:-1] for line in chunk]  # no </s>: it goes on
        for line, prompt in zip(chunk, prompts, strict=True):
            longest = len(prompt) + FLAGS.max_new_tokens
            model.config.check_length(longest, f"{line.place}: a prompt and its continuation")
        # Lengths double, so that a handful of shapes is compiled; pads stand before the prompt.
        L = 1 << (max(map(len, prompts)) - 1).bit_length()
        ids = np.full((batch_size, L), model.config.pad_token_id, np.int32)
        ids[:, -1] = prompts[0][0]
        for row, prompt in zip(ids, prompts, strict=False):
            row[L - len(prompt) :] = prompt
        drawn = jax.random.fold_in(key, number) if FLAGS.do_sample else None
        found = np.asarray(model.generate(ids, prng_key=drawn, **settings).sequences)[:, L:]
        for line, new in zip(chunk, found, strict=False):
            ended = np.flatnonzero(new == EOS_ID)
            new = new[: ended[0]] if len(ended) else new
            yield {
                "text": line.text,
                "continuation": tokenizer.decode(new.tolist()),
                "ended": bool(len(ended)),
            }


# ---------------------------------------------------------------------------------------------
# Masks.


def fill_masks(folder: Path) -> int:
    from prelnroberta.data.tokenizer import load_tokenizer
    from prelnroberta.inference.fill_mask import FillMask
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    params, config = load_pretrained(folder)
    fill = FillMask(params, config, load_tokenizer(folder), flags.execution())
    asked: list[str] = []
    skipped, total = SkippedTexts(), itertools.count()

    def fillable() -> Iterator[str]:
        for line in texts():
            next(total)
            if problem := fill.problem(line.text):
                skipped.add(line.place, problem)
            else:
                asked.append(line.text)
                yield line.text

    def filled() -> Iterator[tuple[str, list[list[Guess]]]]:
        # Whoever types waits for each answer.
        batch_size = 1 if reads_keyboard() else FLAGS.batch_size
        for masks in fill(fillable(), FLAGS.top_k, batch_size):
            yield asked.pop(0), masks

    if FLAGS.format == "json" or FLAGS.output:
        write_lines(as_json(text, masks) for text, masks in filled())
    else:
        for text, masks in filled():
            show(text, masks)
    skipped.raise_if_any(next(total))
    return 0


def show(text: str, masks: list[list[Guess]]) -> None:
    print(text)
    for number, guesses in enumerate(masks, 1):
        if len(masks) > 1:
            print(f"  mask {number}")
        for guess in guesses:
            print(f"  {guess.probability:7.1%}  {guess.text.strip() or repr(guess.text)}")
    sys.stdout.flush()


def as_json(text: str, masks: list[list[Guess]]) -> dict[str, Any]:
    return {
        "text": text,
        "masks": [[dataclasses.asdict(guess) for guess in mask] for mask in masks],
    }


if __name__ == "__main__":
    flags.launch(main)

"""Predicts with a trained model, on what a flag, a file or standard input brings.

    python -m experiments.predict --task=fill_mask --model=runs/a --text="Returns a <mask> of ints."
    python -m experiments.predict --model=runs/reviews --file=new.csv > answers.jsonl
    python -m experiments.predict --model=runs/qa --text="Who wrote it?" --pair="It is by Ada."
    python -m experiments.predict --task=embed --model=runs/a --file=texts.txt --output=vectors.npz
    python -m experiments.predict --task=generate --model=runs/clm --text="The function"
    python -m experiments.predict --task=attention --model=runs/a --text="A b." --output=maps

Without --task it is the one that the model was made for. Answers are JSON lines, in the order of
the input; they come as they are made, so any amount of input takes the same memory.
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
from prelnroberta.files import written_whole

if TYPE_CHECKING:
    from experiments.tasks import Prediction
    from prelnroberta.inference.fill_mask import Guess

flags.declare("predict", "task_or_use", "compute")

_CHUNK = 1024  # examples read and answered at a time


def main() -> int:
    flags.positive("top_k", "batch_size", "max_new_tokens", "num_beams")
    folder = flags.model_folder(FLAGS.model)
    task = FLAGS.task or made_for(folder)
    if task in ("embed", "attention"):
        from experiments.common import embeddings

        return embeddings.embed(folder) if task == "embed" else embeddings.draw_attention(folder)
    if task in ("fill_mask", "masked_lm"):
        return fill_masks(folder)
    if task in ("generate", "causal_lm"):
        return write_lines(continuations(folder))
    return answer_examples(folder)


def made_for(folder: Path) -> str:
    """What a model's task.json says."""
    kept = folder / "task.json"
    if not kept.exists():
        raise InputError(
            f"--task is missing, expected one of {', '.join((*flags.TASKS, *flags.USES))}: {folder}"
            " does not say what it was made for"
        )
    return json.loads(kept.read_text(encoding="utf-8"))["task"]


class Problems:
    """Texts that get no answer. Each is told of where it stands, and all are counted at the end."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def add(self, place: str, problem: str) -> None:
        self.places.append(place)
        print(f"{place}: {problem}", file=sys.stderr)

    def settle(self, total: int) -> None:
        if self.places:
            shown = "; ".join(self.places[:5]) + ("; .." if len(self.places) > 5 else "")
            raise InputError(f"{len(self.places):,} of {total:,} got no answer: {shown}")


def write_lines(answers: Iterable[Prediction]) -> int:
    """JSON lines, to --output or as they come to standard output."""
    with ExitStack() as stack:
        file = sys.stdout
        if FLAGS.output:
            partial = stack.enter_context(written_whole(FLAGS.output))
            file = stack.enter_context(partial.open("w", encoding="utf-8"))
        for answer in answers:
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            file.flush()
    return 0


# ---------------------------------------------------------------------------------------------
# Tasks.


def answer_examples(folder: Path) -> int:
    """The answers of a fine-tuned model, chunk by chunk."""
    from experiments.common.evaluator import Evaluator, batches_by_length
    from experiments.tasks import TASKS
    from prelnroberta.data.readers.row_errors import BadRows
    from prelnroberta.data.tokenizer import load_tokenizer
    from prelnroberta.distributed.sharding import Layout, Parallelism
    from prelnroberta.model.heads import MODULES
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    settings = flags.task_settings(RobertaPreLayerNormConfig.from_json(folder), folder)
    task, bad = TASKS[settings.task](settings), BadRows(skip=True)
    if FLAGS.text:
        examples = iter(task.examples_from_text(FLAGS.text, FLAGS.pair, FLAGS.choice))
        bad.seen(len(FLAGS.text))
    elif FLAGS.file:
        opened()[0].close()
        examples = task.stream(FLAGS.file, bad, None)
    else:
        kind = FLAGS.stdin_format
        if kind is None:
            plain = task.model == "sequence_classification" and settings.pair_column is None
            kind = "txt" if plain else "jsonl"
        examples = task.stream(f"stdin.{kind}", bad, opened()[0])
    tokenizer = load_tokenizer(folder)
    params, config = load_pretrained(folder, task.model)
    layout = Layout(Parallelism(), config, task.model)

    def answers() -> Iterator[Prediction]:
        evaluator = Evaluator(task, MODULES[task.model](config, flags.execution()), layout)
        weights = evaluator.weights(params)
        while chunk := list(itertools.islice(examples, 1 if reads_keyboard() else _CHUNK)):
            features = task.features(chunk, tokenizer, bad, training=False)
            batches = batches_by_length(features, settings.max_length)
            rows, _ = evaluator(weights, features, batches)
            yield from task.answers(features, rows)

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
    problems, total = Problems(), itertools.count()

    def fillable() -> Iterator[str]:
        for line in texts():
            next(total)
            if problem := fill.problem(line.text):
                problems.add(line.place, problem)
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
    problems.settle(next(total))
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

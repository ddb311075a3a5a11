"""Predicts with a trained model, for texts from a flag, a file or standard input.

    python -m experiments.predict --task=fill_mask --model=runs/a --text="Returns a <mask> of ints."
    python -m experiments.predict --model=runs/reviews --file=new.csv > answers.jsonl
    python -m experiments.predict --model=runs/qa --text="Who wrote it?" --pair="It is by Ada."
    python -m experiments.predict --task=embed --model=runs/a --file=texts.txt --output=vectors.npz
    python -m experiments.predict --task=generate --model=runs/clm --text="The function"
    python -m experiments.predict --task=attention --model=runs/a --text="A b." --output=maps

Without --task, the task is the one that the model was trained for. Predictions are JSON lines in
the order of the input. They are written as they are made, so memory does not grow with the input.
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

from experiments.common.find_model import find_model_folder
from experiments.common.text_input import TextInput
from experiments.flags.checks import check_positive
from experiments.flags.groups.task import read_task_json
from experiments.flags.launch import launch
from experiments.flags.programs import USES, PredictSettings
from experiments.tasks.task_names import TASK_NAMES
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

if TYPE_CHECKING:
    from experiments.tasks import Prediction, Task
    from prelnroberta.data.readers.row_errors import RowErrors
    from prelnroberta.inference.fill_mask import MaskPrediction

_CHUNK = 1024  # examples in memory at the same time


def main(settings: PredictSettings) -> int:
    """Runs the task or use. Returns the exit code."""
    check_positive(settings, "top_k", "batch_size", "max_new_tokens", "num_beams")
    folder = find_model_folder(settings.model)
    task = settings.task or trained_for(folder)
    if task == "embed":
        from experiments.common.text_embeddings import embed

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
# Tasks


def predict_examples(settings: PredictSettings, folder: Path) -> int:
    """The predictions of a fine-tuned model, chunk by chunk."""
    from experiments.common.evaluator import Evaluator, batches_by_length
    from experiments.tasks import TASKS
    from prelnroberta.data.readers.row_errors import RowErrors
    from prelnroberta.data.tokenizer import load_tokenizer
    from prelnroberta.distributed.sharding import Layout, Parallelism
    from prelnroberta.model.heads import MODULES
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    task_settings = settings.task_settings(RobertaPreLayerNormConfig.from_json(folder), folder)
    task, errors = TASKS[task_settings.task](task_settings), RowErrors(skip=True)
    examples = read_examples(settings, task, errors)
    chunk_size = 1 if text_input(settings).is_keyboard else _CHUNK
    tokenizer = load_tokenizer(folder)
    params, config = load_pretrained(folder, task.model)
    layout = Layout(Parallelism(), config, task.model)

    def predictions() -> Iterator[Prediction]:
        evaluator = Evaluator(task, MODULES[task.model](config, settings.execution()), layout)
        placed = evaluator.place_params(params)
        while chunk := list(itertools.islice(examples, chunk_size)):
            features = task.features(chunk, tokenizer, errors)
            rows, _ = evaluator(
                placed, features, batches_by_length(features, task_settings.max_length)
            )
            yield from task.predictions(features, rows)

    with layout.use_mesh():
        write_lines(predictions(), settings.output)
    if errors.problems and not settings.skip_bad_rows:
        raise InputError(f"without a prediction: {errors.summary}")
    return 0


def text_input(settings: PredictSettings) -> TextInput:
    return TextInput(settings.text, settings.file)


def read_examples(settings: PredictSettings, task: Task, errors: RowErrors) -> Iterator:
    """The examples of --text, --file or standard input, read as they are needed."""
    if settings.text:
        errors.count_rows(len(settings.text))
        return iter(task.examples_from_text(settings.text, settings.pair, settings.choice))
    source = text_input(settings)
    if settings.file:
        source.open()[0].close()  # refuses a file that cannot be read, before the model is loaded
        return task.stream_examples(settings.file, errors, None)
    kind = settings.stdin_format
    if kind is None:
        one_text = task.model == "sequence_classification" and task.settings.pair_column is None
        kind = "txt" if one_text else "jsonl"
    return task.stream_examples(f"stdin.{kind}", errors, source.open()[0])


# ---------------------------------------------------------------------------------------------
# Text generation


def continuations(settings: PredictSettings, folder: Path) -> Iterator[Prediction]:
    """What a causal language model generates after each text."""
    import jax
    import numpy as np

    from prelnroberta.data.tokenizer import EOS_ID, load_tokenizer
    from prelnroberta.pretrained.flax_models import FlaxRobertaPreLayerNormForCausalLM

    model = FlaxRobertaPreLayerNormForCausalLM.from_pretrained(folder, dtype=settings.dtype)
    tokenizer = load_tokenizer(folder)
    rng = jax.random.key(settings.seed)
    source = text_input(settings)
    lines = source.lines()
    batch_size = 1 if source.is_keyboard else settings.batch_size
    for number in itertools.count():
        chunk = list(itertools.islice(lines, batch_size))
        if not chunk:
            return
        prompts = [tokenizer.encode(line.text).ids[:-1] for line in chunk]  # without </s>
        for line, prompt in zip(chunk, prompts, strict=True):
            length = len(prompt) + settings.max_new_tokens
            model.config.check_length(length, f"{line.place}: a prompt and its continuation")
        ids = left_padded(prompts, batch_size, model.config.pad_token_id)
        sample_rng = jax.random.fold_in(rng, number) if settings.do_sample else None
        generated = model.generate(ids, prng_key=sample_rng, **generation_arguments(settings))
        sequences = np.asarray(generated.sequences)[:, ids.shape[1] :]
        for line, new in zip(chunk, sequences, strict=False):
            ends = np.flatnonzero(new == EOS_ID)
            new = new[: ends[0]] if len(ends) else new
            yield {
                "text": line.text,
                "continuation": tokenizer.decode(new.tolist()),
                "ended": bool(len(ends)),
            }


def left_padded(prompts: list[list[int]], batch_size: int, pad_id: int) -> Any:
    """[batch_size, L] int32 ids. L is a power of two, so that few shapes are compiled; missing rows
    hold one token."""
    import numpy as np

    L = 1 << (max(map(len, prompts)) - 1).bit_length()
    ids = np.full((batch_size, L), pad_id, np.int32)
    ids[:, -1] = prompts[0][0]
    for row, prompt in zip(ids, prompts, strict=False):
        row[L - len(prompt) :] = prompt
    return ids


def generation_arguments(settings: PredictSettings) -> dict[str, Any]:
    """The arguments of `generate` that the flags set."""
    arguments: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "num_beams": settings.num_beams,
        "do_sample": settings.do_sample,
    }
    if settings.do_sample:
        arguments |= {"temperature": settings.temperature, "top_p": settings.top_p}
        arguments |= {} if settings.top_k is None else {"top_k": settings.top_k}
    return arguments


# ---------------------------------------------------------------------------------------------
# Masks

DEFAULT_GUESSES = 5


def fill_masks(settings: PredictSettings, folder: Path) -> int:
    """The likeliest tokens for each `<mask>` of each text."""
    from prelnroberta.data.tokenizer import load_tokenizer
    from prelnroberta.inference.fill_mask import FillMask
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    params, config = load_pretrained(folder)
    fill = FillMask(params, config, load_tokenizer(folder), settings.execution())
    source = text_input(settings)
    waiting: list[str] = []
    skipped, total = SkippedTexts(), itertools.count()

    def fillable() -> Iterator[str]:
        for line in source.lines():
            next(total)
            if problem := fill.find_problem(line.text):
                skipped.add(line.place, problem)
            else:
                waiting.append(line.text)
                yield line.text

    def filled() -> Iterator[tuple[str, list[list[MaskPrediction]]]]:
        # At the keyboard, each text is answered before the next is read.
        batch_size = 1 if source.is_keyboard else settings.batch_size
        top_k = DEFAULT_GUESSES if settings.top_k is None else settings.top_k
        for masks in fill(fillable(), top_k, batch_size):
            yield waiting.pop(0), masks

    if settings.format == "json" or settings.output:
        write_lines((as_json(text, masks) for text, masks in filled()), settings.output)
    else:
        for text, masks in filled():
            print_guesses(text, masks)
    skipped.raise_if_any(next(total))
    return 0


def print_guesses(text: str, masks: list[list[MaskPrediction]]) -> None:
    """Prints the text, and the guesses for each mask with their probabilities."""
    print(text)
    for number, guesses in enumerate(masks, 1):
        if len(masks) > 1:
            print(f"  mask {number}")
        for guess in guesses:
            print(f"  {guess.probability:7.1%}  {guess.text.strip() or repr(guess.text)}")
    sys.stdout.flush()


def as_json(text: str, masks: list[list[MaskPrediction]]) -> dict[str, Any]:
    return {
        "text": text,
        "masks": [[dataclasses.asdict(guess) for guess in mask] for mask in masks],
    }


if __name__ == "__main__":
    launch(main, PredictSettings)

"""Evaluates a model on a file of labelled examples.

    python -m experiments.evaluate --model=runs/reviews --file=test.csv --bootstrap=1000

The task.json that `experiments.finetune` saved with the model says how the file is read; flags
override it. Other models require --task. With --output: predictions.jsonl, classes.txt,
confusion.png and results.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.find_model import find_model_folder
from experiments.flags.checks import check_new_folder, check_positive
from experiments.flags.launch import launch
from experiments.flags.programs import EvaluateSettings
from prelnroberta.config import RobertaPreLayerNormConfig

if TYPE_CHECKING:
    from experiments.tasks import Task
    from prelnroberta.data.features.base import Features


def main(settings: EvaluateSettings) -> int:
    """File -> features -> model outputs -> metrics. Returns the exit code."""
    check_positive(settings, "length_buckets", "eval_positions")
    if settings.output is not None:
        check_new_folder(settings.output)
    settings.start_hosts()
    folder = find_model_folder(settings.model)

    from experiments.common.evaluator import Evaluator, write_results
    from experiments.tasks import TASKS
    from prelnroberta.data.batches.buckets import bucket_lengths, bucketed_eval_batches
    from prelnroberta.distributed import multihost
    from prelnroberta.model.heads import MODULES
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    task_settings = settings.task_settings(RobertaPreLayerNormConfig.from_json(folder), folder)
    task = TASKS[task_settings.task](task_settings)
    features = read_features(settings, task, folder)
    params, config = load_pretrained(folder, task.model)
    layout = settings.layout(config, task.model, settings.eval_positions)
    buckets = bucket_lengths(features.lengths, settings.length_buckets)
    with layout.use_mesh():
        evaluator = Evaluator(task, MODULES[task.model](config, settings.execution()), layout)
        batches = bucketed_eval_batches(
            features, buckets, settings.eval_positions, layout.num_batch_shards
        )
        rows, scores = evaluator(evaluator.place_params(params), features, batches)
    if multihost.is_primary_host():
        more = {"model": str(folder), "file": settings.file, "loss": float(scores.mean)}
        output = Path(settings.output) if settings.output else None
        results = write_results(output, task, features, rows, settings.bootstrap, **more)
        print(format_results(task, results))
    return 0


def read_features(settings: EvaluateSettings, task: Task, folder: Path) -> Features:
    """--file as features; prints what is left out or truncated."""
    from experiments.tasks import truncation_message
    from prelnroberta.data.readers.row_errors import RowErrors
    from prelnroberta.data.tokenizer import load_tokenizer

    errors = RowErrors(settings.skip_bad_rows)
    examples = task.read_examples(settings.file, True, errors)
    features = task.features(examples, load_tokenizer(folder), errors)
    errors.raise_if_any()
    if errors.problems:
        print(f"left out: {errors.summary}")
    if message := truncation_message(features, task.settings.max_length):
        print(message)
    return features


def format_results(task: Task, results: dict[str, Any]) -> str:
    """Loss and metrics, a line each, with confidence intervals if there are any."""
    lines = [f"{task.model}, {results['examples']:,} examples, loss {results['loss']:.4f}"]
    for name, value in results["metrics"].items():
        low, high = results.get("intervals", {}).get(name, (None, None))
        interval = "" if low is None else f"  95 %: {low:.4f} to {high:.4f}"
        lines.append(f"  {name:20} {value:10.4f}{interval}")
    return "\n".join(lines)


if __name__ == "__main__":
    launch(main, EvaluateSettings)

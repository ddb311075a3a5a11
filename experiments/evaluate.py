"""Measures a model on a file whose answers are known.

    python -m experiments.evaluate --model=runs/reviews --file=test.csv --bootstrap=1000

What `experiments.finetune` kept beside the model (task.json) says how the file is read; flags
replace it. For models from elsewhere give --task. With --output: predictions.jsonl, classes.txt,
confusion.png and results.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import flags
from experiments.flags import FLAGS

if TYPE_CHECKING:
    from experiments.tasks import Task

flags.declare("evaluate", "task", "compute", "scale")


def main() -> int:
    flags.positive("length_buckets", "eval_positions")
    if FLAGS.output is not None:
        flags.check_new_folder(FLAGS.output)
    flags.start_hosts()
    folder = flags.model_folder(FLAGS.model)

    from experiments.common.evaluator import Evaluator, write_results
    from experiments.tasks import TASKS, truncation_message
    from prelnroberta.config import RobertaPreLayerNormConfig
    from prelnroberta.data.batches.buckets import bucket_lengths, evaluation_batches
    from prelnroberta.data.readers.row_errors import BadRows
    from prelnroberta.data.tokenizer import load_tokenizer
    from prelnroberta.distributed import multihost
    from prelnroberta.model.heads import MODULES
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    settings = flags.task_settings(RobertaPreLayerNormConfig.from_json(folder), folder)
    task, bad = TASKS[settings.task](settings), BadRows(FLAGS.skip_bad_rows)
    features = task.features(
        task.read(FLAGS.file, True, bad), load_tokenizer(folder), bad, training=False
    )
    bad.settle()
    if bad.bad:
        print(f"left out: {bad.summary}")
    if told := truncation_message(features, settings.max_length):
        print(told)
    params, config = load_pretrained(folder, task.model)
    layout = flags.layout(config, task.model, FLAGS.eval_positions, 1)
    buckets = bucket_lengths(features.lengths, FLAGS.length_buckets)
    with layout.use_mesh():
        evaluator = Evaluator(task, MODULES[task.model](config, flags.execution()), layout)
        positions, ways = FLAGS.eval_positions, layout.num_batch_shards
        batches = evaluation_batches(features, buckets, positions, ways)
        rows, scores = evaluator(evaluator.weights(params), features, batches)
    if multihost.is_primary_host():
        more = {"model": str(folder), "file": FLAGS.file, "loss": float(scores.mean)}
        output = Path(FLAGS.output) if FLAGS.output else None
        print(in_words(task, write_results(output, task, features, rows, FLAGS.bootstrap, **more)))
    return 0


def in_words(task: Task, results: dict[str, Any]) -> str:
    lines = [f"{task.model}, {results['examples']:,} examples, loss {results['loss']:.4f}"]
    for name, value in results["metrics"].items():
        low, high = results.get("intervals", {}).get(name, (None, None))
        interval = "" if low is None else f"  95 %: {low:.4f} to {high:.4f}"
        lines.append(f"  {name:20} {value:10.4f}{interval}")
    return "\n".join(lines)


if __name__ == "__main__":
    flags.launch(main)

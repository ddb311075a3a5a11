"""Fine-tunes a model for one of six tasks, on the user's own files.

    python -m experiments.finetune --task=sequence_classification --init_from=runs/demo \
        --train_file=train.csv --eval_file=dev.csv --run_dir=runs/reviews

The same command again goes on where the run stopped, bit for bit. A run directory holds:

    flags.txt        the run's flags, a flagfile      predictions.jsonl  of the best model on
    data.json        what the files were                                 --eval_file, a line each
    metrics.jsonl    every report; events/, loss.png  classes.txt, confusion.png
    checkpoints/     the latest and the best          model/             the best, a Hugging Face
    results.json     the best model's metrics                            folder, and task.json

With --seeds or --sweep there is such a folder for each combination, and `table.txt`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import flags
from experiments.common import sweep
from experiments.flags import FLAGS
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.files import written_whole

if TYPE_CHECKING:
    import optax
    import tokenizers

    from experiments.tasks import Task
    from prelnroberta.data.features.base import Features
    from prelnroberta.distributed.sharding import Layout
    from prelnroberta.model.losses import LossSettings
    from prelnroberta.params import Tree
    from prelnroberta.training.optimizer import OptimizerConfig
    from prelnroberta.training.train_step import TrainState

flags.declare("run", "task", "model", "optimization", "compute", "scale", "finetuning")


def main() -> int:
    from prelnroberta.distributed import multihost

    run_dir = Path(FLAGS.run_dir)
    flags.start_hosts()
    points = sweep.points(FLAGS.seeds, FLAGS.sweep)
    if not points:
        return finetune(run_dir)
    for point in points:
        with sweep.flags_of(point, run_dir):
            print(f"{sweep.name(point)}, in {FLAGS.run_dir}", flush=True)
            if code := finetune(Path(FLAGS.run_dir)):
                return code
    if multihost.is_primary_host():
        print(sweep.write_table(run_dir, points))
    return 0


def finetune(run_dir: Path) -> int:
    """One run: flags -> data -> model -> steps -> the best model and its report."""
    from prelnroberta.data.tokenizer import load_tokenizer
    from prelnroberta.distributed import multihost

    with multihost.primary_host_first(f"claim {run_dir}"):
        check_settings(run_dir)
        if (run_dir / "results.json").exists():  # the last file that a run writes
            print(f"{run_dir} is complete\n{described(run_dir)}")
            return 0
        tokenizer = load_tokenizer(flags.given_tokenizer())
        data = read_data(tokenizer)
        config, params = initial_model(data.task, tokenizer)
        plan = make_plan(data, config)
        layout = flags.layout(config, data.task.model, FLAGS.batch_size, FLAGS.accumulate)
        claim(run_dir, data)
    with layout.use_mesh():
        state = first_state(layout, params, plan)
        del params  # the state has its own: a second copy would last as long as the run
        return run(run_dir, tokenizer, config, layout, state, data, plan)


def check_settings(run_dir: Path) -> None:
    """Refuses whatever flags alone can get wrong, before any work."""
    if FLAGS.task is None:
        raise InputError("--task is missing, expected one of " + ", ".join(flags.TASKS))
    flags.positive("log_every", "keep_checkpoints", "length_buckets", "eval_positions")
    flags.positive(*(n for n in ("eval_every", "save_every") if FLAGS[n].value is not None))
    flags.check_batches()
    if FLAGS.epochs <= 0:
        raise InputError(f"--epochs={FLAGS.epochs}, expected more than 0")
    for name in ("label_smoothing", "warmup_ratio"):
        if not 0 <= FLAGS[name].value < 1:
            raise InputError(f"--{name}={FLAGS[name].value}, expected a share in [0, 1)")
    if FLAGS.patience < 0:
        raise InputError(f"--patience={FLAGS.patience}, expected 0 (never stop early) or more")
    if FLAGS.init_from is None and (FLAGS.tokenizer is None or FLAGS.scratch):
        raise InputError(
            "give --init_from, a model folder or a run; or, to begin from scratch, --tokenizer "
            "and --preset"
        )
    flags.optimization(steps=1, warmup_steps=0)
    flags.profile_steps()
    for name in ("train_file", "eval_file"):
        if not Path(FLAGS[name].value).expanduser().is_file():
            raise InputError(f"--{name}={FLAGS[name].value}: no such file")
    flags.check_run(run_dir)


@dataclasses.dataclass(frozen=True)
class Data:
    """Both files as features; lengths that evaluation pads to; `sha256` of the files, by flag."""

    task: Task
    train: Features
    dev: Features
    buckets: tuple[int, ...]
    sha256: dict[str, str]


def read_data(tokenizer: tokenizers.Tokenizer) -> Data:
    from experiments.tasks import TASKS, cut
    from prelnroberta.data.batches.buckets import bucket_lengths
    from prelnroberta.data.readers.row_errors import BadRows

    config = flags.config(tokenizer.get_vocab_size())
    settings = flags.task_settings(config)
    flags.check_attention(config, settings.max_length)
    task = TASKS[settings.task](settings)
    bad = [BadRows(FLAGS.skip_bad_rows), BadRows(FLAGS.skip_bad_rows)]
    paths = {name: Path(FLAGS[name].value).expanduser() for name in ("train_file", "eval_file")}
    examples = [task.read(path, True, b) for path, b in zip(paths.values(), bad, strict=True)]
    task = TASKS[settings.task](task.settled(examples[0]))
    train, dev = (
        task.features(e, tokenizer, b, training)
        for e, b, training in zip(examples, bad, (True, False), strict=True)
    )
    for b in bad:
        b.settle()
        if b.bad:
            print(f"left out: {b.summary}")
    for flag, features in zip(paths, (train, dev), strict=True):
        if told := cut(features, settings.max_length):
            print(f"--{flag}: {told}")
    digests = {flag: hashlib.sha256(p.read_bytes()).hexdigest() for flag, p in paths.items()}
    return Data(task, train, dev, bucket_lengths(dev.lengths, FLAGS.length_buckets), digests)


def initial_model(
    task: Task, tokenizer: tokenizers.Tokenizer
) -> tuple[RobertaPreLayerNormConfig, Tree]:
    """The config and the values to begin with: given ones, and new ones for what is not given."""
    import jax
    import numpy as np

    from prelnroberta import params as parameters
    from prelnroberta.pretrained import hf_checkpoint

    size = tokenizer.get_vocab_size()
    given = flags.config(size)
    if given.vocab_size != size:
        raise InputError(
            f"the tokenizer has {size} tokens, the weights of {FLAGS.init_from} are for "
            f"{given.vocab_size}: give the --tokenizer that they were trained with"
        )
    config = task.configure(given)

    def new() -> Tree:
        return jax.tree.map(
            np.asarray, parameters.init(config, jax.random.key(FLAGS.seed), task.model)
        )

    if FLAGS.init_from is None or FLAGS.scratch:
        return config, new()
    tensors, source = hf_checkpoint.read_weights(flags.model_folder(FLAGS.init_from))
    params, swapped = hf_checkpoint.read_tensors(
        tensors, config, task.model, source, new, ignore_mismatched_sizes=True
    )
    if str(swapped):
        print(f"{source}: {swapped}")
    return config, params


def claim(run_dir: Path, data: Data) -> None:
    """Writes what makes a folder a run. From then on its files are those it began with."""
    record = run_dir / "data.json"
    if record.exists():
        if json.loads(record.read_text(encoding="utf-8")) != data.sha256:
            raise InputError(
                f"--train_file or --eval_file has changed since {run_dir} began ({record}): give "
                "the same files to resume it, or another --run_dir"
            )
        return
    with written_whole(run_dir / "flags.txt") as partial:
        partial.write_text(flags.settings_text(), encoding="utf-8")
    with written_whole(record) as partial:
        partial.write_text(json.dumps(data.sha256, indent=2) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the model is to learn; `epoch` is in steps."""

    epoch: int
    settings: OptimizerConfig
    optimizer: optax.GradientTransformation
    losses: LossSettings


def make_plan(data: Data, config: RobertaPreLayerNormConfig) -> Plan:
    """Counts from the data what flags leave open."""
    from prelnroberta.training import optimizer as optimizers

    epoch = math.ceil(len(data.train.lengths) / FLAGS.batch_size)
    steps = FLAGS.steps or math.ceil(FLAGS.epochs * epoch)
    warmup = FLAGS.warmup_steps
    if warmup is None:
        warmup = math.ceil(FLAGS.warmup_ratio * steps)
    settings = flags.optimization(steps=steps, warmup_steps=warmup)
    optimizer = optimizers.make_optimizer(settings, config, data.task.model)
    return Plan(epoch, settings, optimizer, loss_settings(data))


def loss_settings(data: Data) -> LossSettings:
    """--label_smoothing, --class_weights"""
    from prelnroberta.model.losses import LossSettings

    names, given = data.task.settings.labels, FLAGS.class_weights
    weights = None
    if given and not (names and data.task.metric != "f1_micro"):
        raise InputError("--class_weights: this task has no classes, one of which is right")
    if given == ["balanced"]:
        counts = data.task.label_counts(data.train)
        weights = tuple((counts.sum() / (len(counts) * counts.clip(1))).tolist())
    elif given:
        try:
            weights = tuple(map(float, given))
        except ValueError:
            weights = ()
        if len(weights) != len(names) or min(weights) < 0:
            raise InputError(
                f"--class_weights={','.join(given)}, expected 'balanced' or {len(names)} numbers, "
                f"for {', '.join(names)}"
            )
    return LossSettings(class_weights=weights, label_smoothing=FLAGS.label_smoothing)


def first_state(layout: Layout, params: Tree, plan: Plan) -> TrainState:
    """The state before the first step, where its parts lie."""
    from prelnroberta.training.train_step import TrainState

    return layout.init_sharded(lambda given: TrainState.create(given, plan.optimizer), layout.device_put(params))


def run(
    run_dir: Path,
    tokenizer: tokenizers.Tokenizer,
    config: RobertaPreLayerNormConfig,
    layout: Layout,
    state: TrainState,
    data: Data,
    plan: Plan,
) -> int:
    """State -> steps -> the best state -> model and report."""
    import jax

    from experiments.common.evaluator import Judge, write_results
    from experiments.common.loop import Cadence, compiled, resume, train
    from experiments.common.plots import draw_curves
    from experiments.common.report import NoReport, Report, duration, read_records
    from prelnroberta import params as parameters
    from prelnroberta.data.batches.buckets import evaluation_batches
    from prelnroberta.data.tokenizer import save_tokenizer
    from prelnroberta.distributed import multihost
    from prelnroberta.model.heads import MODULES
    from prelnroberta.model.losses import Scores
    from prelnroberta.pretrained.hf_checkpoint import save_pretrained
    from prelnroberta.training.checkpoint import CheckpointManager
    from prelnroberta.training.optimizer import learning_rate_schedule
    from prelnroberta.training.train_step import compile_train_step, make_train_step

    begin = time.monotonic()
    task, losses, steps, optimizer = data.task, plan.losses, plan.settings.steps, plan.optimizer
    module = MODULES[task.model](config, flags.execution())
    ways = layout.num_batch_shards
    loader = task.batches(
        data.train, FLAGS.batch_size, FLAGS.seed, steps, multiple=ways * FLAGS.accumulate
    )
    judge = Judge(task, module, layout, losses)

    def score(params: Tree, batch: dict, dropout_keys: jax.Array | None) -> Scores:
        return task.loss(config, task.logits(module, params, batch, dropout_keys), batch, losses)

    checkpoints = CheckpointManager(run_dir / "checkpoints", FLAGS.keep_checkpoints)
    if checkpoints.latest_step() is not None:
        state = resume(checkpoints, state, FLAGS.set_damaged_aside)
        print(f"resuming {run_dir} at step {int(state.step):,} of {steps:,}, bit for bit")
    start = int(state.step)
    print(
        f"{parameters.parameter_count(config, task.model):,} parameters, "
        f"{len(data.train.lengths):,} rows to train on, {len(data.dev.lengths):,} to evaluate, "
        f"{loader.describe()}; {steps:,} steps, {plan.epoch:,} an epoch",
        flush=True,
    )

    trivial = task.trivial(data.train, data.dev)

    def worth(metrics: dict[str, float]) -> float:
        """By which the best is chosen: of equal merit, the one with the lower loss."""
        return task.merit(metrics) - 1e-6 * metrics["loss"]

    worths = {
        record["step"]: worth(record)
        for record in read_records(run_dir / "metrics.jsonl")
        if record["kind"] == "validation" and record["step"] <= start
    }
    report = NoReport()

    def judged(state: TrainState) -> tuple[list, Scores]:
        batches = evaluation_batches(data.dev, data.buckets, FLAGS.eval_positions, ways)
        return judge(state.params, data.dev, batches)

    def validate(state: TrainState) -> dict[str, float]:
        rows, scores = judged(state)
        metrics = {"loss": float(scores.mean), **task.measure(data.dev, rows).metrics}
        worths[int(state.step)] = worth(metrics)
        return metrics

    def enough() -> bool:
        """Whether the last --patience evaluations brought nothing better."""
        values = list(worths.values())
        best = values.index(max(values)) if values else 0
        return 0 < FLAGS.patience < len(values) - best

    stopped = None
    tokens = float(data.train.sizes.mean()) * FLAGS.batch_size
    try:
        if start < steps and not enough():
            rows = layout.local_batch_rows(loader.rows)
            step = compile_train_step(make_train_step(score, optimizer, FLAGS.seed, FLAGS.accumulate), layout)
            first = layout.shard_batch(loader.batch(start, rows))
            step, compile_seconds = compiled(step, state, first)
            if (
                multihost.is_primary_host()
            ):  # only now: it tells what is left by the time since it was made
                report = Report(run_dir, steps, start, description(task, trivial))
            with loader.prefetch(start, rows=rows) as batches:
                state, stopped = train(
                    state,
                    step,
                    map(layout.shard_batch, batches),
                    cadence=Cadence(
                        steps=steps,
                        log_every=FLAGS.log_every,
                        eval_every=FLAGS.eval_every or plan.epoch,
                        save_every=FLAGS.save_every or FLAGS.eval_every or plan.epoch,
                    ),
                    report=report,
                    checkpoints=checkpoints,
                    validate=validate,
                    learning_rate=learning_rate_schedule(plan.settings),
                    tokens_per_step=tokens,
                    objective=lambda metrics: -worth(metrics),
                    enough=enough,
                    compile_seconds=compile_seconds,
                    failed_save=FLAGS.failed_save,
                    profile_steps=flags.profile_steps(),
                )
        if stopped is None:
            best = max((s for s in checkpoints.all_steps() if s in worths), key=worths.get)
            state, _ = checkpoints.restore(state, best)
    finally:
        report.close()
        checkpoints.close()
    if stopped is not None:
        print(
            f"{stopped.name}: saved step {int(state.step):,} of {steps:,} in {run_dir}; the same "
            "command goes on from there"
        )
        return 128 + stopped

    rows, _ = judged(state)
    params = layout.gather_to_host(state.params)
    if multihost.is_primary_host():
        save_tokenizer(tokenizer, run_dir / "model", config.max_length)
        flags.save_task_settings(task.settings, run_dir / "model")
        save_pretrained(run_dir / "model", params, config, task.model)
        draw_curves(run_dir, task.metric, trivial)
        more = {"metric": task.metric, "trivial": trivial, "best_step": best, "steps": steps}
        write_results(run_dir, task, data.dev, rows, **more)
        print(f"finished in {duration(time.monotonic() - begin)}\n{described(run_dir)}")
    multihost.barrier(f"end {run_dir}")
    return 0


def description(task: Task, trivial: float) -> Callable[[dict[str, Any]], str]:
    def describe(record: dict[str, Any]) -> str:
        others = (
            f"  {name} {value:.4g}"
            for name, value in record.items()
            if name not in ("kind", "step", "loss", task.metric)
        )
        return (
            f"step {record['step']:,}  validation loss {record['loss']:.3f}  {task.metric} "
            f"{record[task.metric]:.4g} (trivial: {trivial:.4g}){''.join(others)}"
        )

    return describe


def described(run_dir: Path) -> str:
    """A finished run in words, and what to do with it."""
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    metric = results["metric"]
    return (
        f"best: step {results['best_step']:,} of {results['steps']:,}, {metric} "
        f"{results['metrics'][metric]:.4g} (trivial: {results['trivial']:.4g})\n"
        f"model: {run_dir / 'model'}\n"
        f"  python -m experiments.predict --model={run_dir} --file=..."
    )


if __name__ == "__main__":
    flags.launch(main)

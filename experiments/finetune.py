"""Fine-tunes a model for one of six tasks, on the user's own files.

    python -m experiments.finetune --task=sequence_classification --init_from=runs/demo \
        --train_file=train.csv --eval_file=dev.csv --run_dir=runs/reviews

The same command again resumes the run, bit for bit. A run directory holds:

    flags.txt        the flags of the run             predictions.jsonl  of the best model on
    data.json        digests of the files                                --eval_file, a line each
    metrics.jsonl    every report; events/, loss.png  classes.txt, confusion.png
    checkpoints/     the latest and the best          model/             the best, a Hugging Face
    results.json     the metrics of the best model                       folder, and task.json

With --seeds or --sweep there is such a folder for each combination, and `table.txt`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common import sweep
from experiments.common.find_model import find_model_folder
from experiments.common.run_dir import check_run_dir, init_run_dir, read_record
from experiments.flags.checks import check_positive
from experiments.flags.launch import launch
from experiments.flags.programs import FinetuneSettings
from experiments.tasks.task_names import TASK_NAMES
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

if TYPE_CHECKING:
    import jax
    import optax
    import tokenizers

    from experiments.common.evaluator import Evaluator
    from experiments.common.training_run import TrainingRun
    from experiments.tasks.base import Task
    from experiments.tasks.task_settings import TaskSettings
    from prelnroberta.data.features.base import Features
    from prelnroberta.distributed.sharding import Layout
    from prelnroberta.model.losses import LossSettings, Scores
    from prelnroberta.params import Tree
    from prelnroberta.training.optimizer import OptimizerConfig
    from prelnroberta.training.train_step import TrainState

RECORD = "data.json"


def main(settings: FinetuneSettings) -> int:
    """One run, or one for each combination of --seeds and --sweep. Returns the exit code."""
    from prelnroberta.distributed import multihost

    settings.start_hosts()
    points = sweep.points(settings)
    if not points:
        return finetune(settings)
    for point in points:
        swept = sweep.settings_at(settings, point)
        print(f"{sweep.name(point)}, in {swept.run_dir}", flush=True)
        if code := finetune(swept):
            return code
    if multihost.is_primary_host():
        print(sweep.write_table(settings.run_path, points))
    return 0


def finetune(settings: FinetuneSettings) -> int:
    """One run: data -> model -> steps -> the best model and its report."""
    from prelnroberta.data.tokenizer import load_tokenizer
    from prelnroberta.distributed import multihost

    run_dir = settings.run_path
    with multihost.primary_host_first(f"init_run_dir {run_dir}"):
        check_settings(settings)
        if (run_dir / "results.json").exists():  # the last file that a run writes
            print(f"{run_dir} is complete\n{usage_message(run_dir)}")
            return 0
        tokenizer = load_tokenizer(settings.tokenizer_path())
        data = read_data(settings, tokenizer)
        config, params = initial_model(settings, data.task, tokenizer)
        plan = make_plan(settings, data, config)
        layout = settings.layout(
            config,
            data.task.model,
            settings.batch_size,
            settings.gradient_accumulation_steps,
        )
        init_finetuning_run(settings, data)
    with layout.use_mesh():
        state = initial_state(layout, params, plan)
        del params  # the state has its own copy; this one would last as long as the run
        return run(settings, tokenizer, config, layout, state, data, plan)


# ---------------------------------------------------------------------------------------------
# Settings


def check_settings(settings: FinetuneSettings) -> None:
    """Refuses what is wrong with the flags alone, before any work."""
    if settings.task is None:
        raise InputError("--task is missing, expected one of " + ", ".join(TASK_NAMES))
    settings.check_run()
    check_positive(settings, "length_buckets", "eval_positions")
    settings.check_microbatches(settings.batch_size)
    if settings.epochs <= 0:
        raise InputError(f"--epochs={settings.epochs}, expected more than 0")
    for name in ("label_smoothing", "warmup_ratio"):
        if not 0 <= getattr(settings, name) < 1:
            raise InputError(f"--{name}={getattr(settings, name)}, expected a share in [0, 1)")
    if settings.patience < 0:
        raise InputError(f"--patience={settings.patience}, expected 0 (never stop early) or more")
    if settings.init_from is None and (settings.tokenizer is None or settings.from_scratch):
        raise InputError(
            "give --init_from, a model folder or a run; or, to train from scratch, --tokenizer "
            "and --preset"
        )
    settings.optimizer_config(steps=1, warmup_steps=0)
    settings.check_profile_steps()
    for name in ("train_file", "eval_file"):
        if not Path(getattr(settings, name)).expanduser().is_file():
            raise InputError(f"--{name}={getattr(settings, name)}: no such file")
    check_run_dir(settings)


# ---------------------------------------------------------------------------------------------
# Data


@dataclasses.dataclass(frozen=True)
class Data:
    """Both files as features.

    Attributes:
        buckets: lengths that evaluation pads to.
        sha256: digests of the files, by the flag that names them.
    """

    task: Task
    train: Features
    dev: Features
    buckets: tuple[int, ...]
    sha256: dict[str, str]


def read_data(settings: FinetuneSettings, tokenizer: tokenizers.Tokenizer) -> Data:
    """--train_file and --eval_file as features; prints what is left out or truncated."""
    from experiments.tasks import TASKS, truncation_message
    from prelnroberta.data.batches.buckets import bucket_lengths
    from prelnroberta.data.readers.row_errors import RowErrors

    config = settings.model_config(tokenizer.get_vocab_size())
    task_settings: TaskSettings = settings.task_settings(config)
    settings.check_attention(config, task_settings.max_length)
    task = TASKS[task_settings.task](task_settings)
    errors = [RowErrors(settings.skip_bad_rows), RowErrors(settings.skip_bad_rows)]
    paths = {
        name: Path(getattr(settings, name)).expanduser() for name in ("train_file", "eval_file")
    }
    examples = [
        task.read_examples(path, True, e) for path, e in zip(paths.values(), errors, strict=True)
    ]
    task = TASKS[task_settings.task](task.infer_settings(examples[0]))
    train, dev = (
        task.features(found, tokenizer, e) for found, e in zip(examples, errors, strict=True)
    )
    for e in errors:
        e.raise_if_any()
        if e.problems:
            print(f"left out: {e.summary}")
    for flag, features in zip(paths, (train, dev), strict=True):
        if message := truncation_message(features, task_settings.max_length):
            print(f"--{flag}: {message}")
    digests = {flag: hashlib.sha256(p.read_bytes()).hexdigest() for flag, p in paths.items()}
    return Data(task, train, dev, bucket_lengths(dev.lengths, settings.length_buckets), digests)


def init_finetuning_run(settings: FinetuneSettings, data: Data) -> None:
    """Makes the folder a run, or refuses files that are not those that the run began with."""
    began = read_record(settings.run_path, RECORD)
    if began is None:
        init_run_dir(settings, RECORD, data.sha256)
    elif began != data.sha256:
        raise InputError(
            f"--train_file or --eval_file has changed since {settings.run_path} began "
            f"({settings.run_path / RECORD}): give the same files to resume it, or another "
            "--run_dir"
        )


# ---------------------------------------------------------------------------------------------
# Model and plan


def initial_model(
    settings: FinetuneSettings, task: Task, tokenizer: tokenizers.Tokenizer
) -> tuple[RobertaPreLayerNormConfig, Tree]:
    """The config and the initial values: those of --init_from, and new ones for what it lacks."""
    import jax
    import numpy as np

    from prelnroberta import params as parameters
    from prelnroberta.pretrained import hf_checkpoint

    size = tokenizer.get_vocab_size()
    given = settings.model_config(size)
    if given.vocab_size != size:
        raise InputError(
            f"the tokenizer has {size} tokens, the weights of {settings.init_from} are for "
            f"{given.vocab_size}: give the --tokenizer that they were trained with"
        )
    config = task.model_config(given)

    def new() -> Tree:
        return jax.tree.map(
            np.asarray, parameters.init(config, jax.random.key(settings.seed), task.model)
        )

    if settings.init_from is None or settings.from_scratch:
        return config, new()
    tensors, source = hf_checkpoint.read_weights(find_model_folder(settings.init_from))
    params, loading_info = hf_checkpoint.load_state_dict(
        tensors, config, task.model, source, new, ignore_mismatched_sizes=True
    )
    if str(loading_info):
        print(f"{source}: {loading_info}")
    return config, params


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the model is trained.

    Attributes:
        epoch_steps: steps of a pass over the training examples.
    """

    epoch_steps: int
    optimizer_config: OptimizerConfig
    optimizer: optax.GradientTransformation
    loss_settings: LossSettings


def make_plan(settings: FinetuneSettings, data: Data, config: RobertaPreLayerNormConfig) -> Plan:
    """Computes from the data what the flags leave open: steps and warm-up."""
    from prelnroberta.training import optimizer as optimizers

    epoch_steps = math.ceil(len(data.train.lengths) / settings.batch_size)
    steps = settings.steps or math.ceil(settings.epochs * epoch_steps)
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = math.ceil(settings.warmup_ratio * steps)
    optimizer_config = settings.optimizer_config(steps=steps, warmup_steps=warmup)
    optimizer = optimizers.make_optimizer(optimizer_config, config, data.task.model)
    return Plan(epoch_steps, optimizer_config, optimizer, make_loss_settings(settings, data))


def make_loss_settings(settings: FinetuneSettings, data: Data) -> LossSettings:
    """--label_smoothing and --class_weights"""
    from prelnroberta.model.losses import LossSettings

    names, given = data.task.settings.labels, settings.class_weights
    weights: tuple[float, ...] | None = None
    if given and not (names and data.task.metric != "f1_micro"):
        raise InputError("--class_weights: this task does not assign one class to each example")
    if given == ("balanced",):
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
    return LossSettings(class_weights=weights, label_smoothing=settings.label_smoothing)


def initial_state(layout: Layout, params: Tree, plan: Plan) -> TrainState:
    """The sharded state before the first step."""
    from prelnroberta.training.train_step import TrainState

    return layout.init_sharded(
        lambda given: TrainState.create(given, plan.optimizer), layout.device_put(params)
    )


# ---------------------------------------------------------------------------------------------
# Training


class ModelSelection:
    """The scores of the evaluations so far, by step; the highest is the best model."""

    def __init__(self, task: Task, patience: int, records: Sequence[dict[str, Any]]):
        self._task, self._patience = task, patience
        self._scores = {record["step"]: self.score(record) for record in records}

    def score(self, metrics: dict[str, float]) -> float:
        """Among equal selection scores, the lower loss is better."""
        return self._task.selection_score(metrics) - 1e-6 * metrics["loss"]

    def add(self, step: int, metrics: dict[str, float]) -> None:
        self._scores[step] = self.score(metrics)

    def should_stop_early(self) -> bool:
        """Whether the last --patience evaluations were not better than the best before them."""
        scores = list(self._scores.values())
        best = scores.index(max(scores)) if scores else 0
        return 0 < self._patience < len(scores) - best

    def best_step(self, steps: Sequence[int]) -> int:
        """The best of those of these steps that were evaluated."""
        return max((step for step in steps if step in self._scores), key=self._scores.__getitem__)


def run(
    settings: FinetuneSettings,
    tokenizer: tokenizers.Tokenizer,
    config: RobertaPreLayerNormConfig,
    layout: Layout,
    state: TrainState,
    data: Data,
    plan: Plan,
) -> int:
    """State -> steps -> the best state -> model and report."""
    from experiments.common.evaluator import Evaluator
    from experiments.common.run_report import format_duration, read_records
    from experiments.common.training_run import TrainingRun
    from prelnroberta.distributed import multihost
    from prelnroberta.model.heads import MODULES

    begin = time.monotonic()
    task, losses, steps = data.task, plan.loss_settings, plan.optimizer_config.steps
    module = MODULES[task.model](config, settings.execution())
    evaluator = Evaluator(task, module, layout, losses)
    baseline = task.baseline_score(data.train, data.dev)

    def score(params: Tree, batch: dict, dropout_rngs: jax.Array | None) -> Scores:
        return task.loss(config, task.logits(module, params, batch, dropout_rngs), batch, losses)

    eval_every = settings.eval_every or plan.epoch_steps
    with TrainingRun(
        settings=settings,
        layout=layout,
        optimizer_config=plan.optimizer_config,
        optimizer=plan.optimizer,
        score=score,
        loader=task.training_batches(
            data.train,
            settings.batch_size,
            settings.seed,
            steps,
            multiple=layout.num_batch_shards * settings.gradient_accumulation_steps,
        ),
        tokens_per_step=float(data.train.total_lengths.mean()) * settings.batch_size,
        eval_every=eval_every,
        save_every=settings.save_every or eval_every,
        format_validation=validation_formatter(task, baseline),
    ) as training:
        state = training.resume(state)
        start = int(state.step)
        records = read_records(settings.run_path / "metrics.jsonl")
        evaluations = [r for r in records if r["kind"] == "validation" and r["step"] <= start]
        selection = ModelSelection(task, settings.patience, evaluations)
        print_run_size(config, data, plan, training)
        stopped = None
        if start < steps and not selection.should_stop_early():
            state, stopped = train(training, state, selection, evaluator, data, settings)
        if stopped is not None:
            return training.exit_code(stopped, state)
        best_step = selection.best_step(training.checkpoints.all_steps())
        state, _ = training.checkpoints.restore(state, best_step)

    rows, _ = evaluate(evaluator, state, data, settings, layout)
    params = layout.gather_to_host(state.params)
    if multihost.is_primary_host():
        export_model(settings, tokenizer, config, params, task)
        results = {"baseline": baseline, "best_step": best_step, "steps": steps}
        write_report(settings, data, rows, results)
        duration = format_duration(time.monotonic() - begin)
        print(f"finished in {duration}\n{usage_message(settings.run_path)}")
    multihost.barrier(f"end {settings.run_path}")
    return 0


def print_run_size(
    config: RobertaPreLayerNormConfig, data: Data, plan: Plan, training: TrainingRun
) -> None:
    """Prints the size of the model and the data, and the number of steps."""
    from prelnroberta import params as parameters

    print(
        f"{parameters.parameter_count(config, data.task.model):,} parameters, "
        f"{len(data.train.lengths):,} rows to train on, {len(data.dev.lengths):,} to evaluate, "
        f"{training.loader.describe()}; {plan.optimizer_config.steps:,} steps, "
        f"{plan.epoch_steps:,} an epoch",
        flush=True,
    )


def train(
    training: TrainingRun,
    state: TrainState,
    selection: ModelSelection,
    evaluator: Evaluator,
    data: Data,
    settings: FinetuneSettings,
) -> tuple[TrainState, Any]:
    """Trains to the last step or until the selection stops early; see `TrainingRun.train`."""

    def validate(state: TrainState) -> dict[str, float]:
        rows, scores = evaluate(evaluator, state, data, settings, training.layout)
        metrics = {"loss": float(scores.mean), **data.task.evaluate(data.dev, rows).metrics}
        selection.add(int(state.step), metrics)
        return metrics

    return training.train(
        state,
        validate,
        objective=lambda metrics: -selection.score(metrics),
        should_stop_early=selection.should_stop_early,
    )


def evaluate(
    evaluator: Evaluator,
    state: TrainState,
    data: Data,
    settings: FinetuneSettings,
    layout: Layout,
) -> tuple[list, Scores]:
    """The model outputs for each row of --eval_file, and the summed scores."""
    from prelnroberta.data.batches.buckets import bucketed_eval_batches

    batches = bucketed_eval_batches(
        data.dev, data.buckets, settings.eval_positions, layout.num_batch_shards
    )
    return evaluator(state.params, data.dev, batches)


# ---------------------------------------------------------------------------------------------
# Result


def export_model(
    settings: FinetuneSettings,
    tokenizer: tokenizers.Tokenizer,
    config: RobertaPreLayerNormConfig,
    params: Tree,
    task: Task,
) -> None:
    """Writes the model folder: tokenizer, task.json, weights and config."""
    from prelnroberta.data.tokenizer import save_tokenizer
    from prelnroberta.pretrained.hf_checkpoint import save_pretrained

    folder = settings.run_path / "model"
    save_tokenizer(tokenizer, folder, config.max_length)
    with atomic_write(folder / "task.json") as partial:
        partial.write_text(json.dumps(dataclasses.asdict(task.settings), indent=2) + "\n")
    save_pretrained(folder, params, config, task.model)


def write_report(
    settings: FinetuneSettings, data: Data, rows: list, results: dict[str, Any]
) -> None:
    """Plots the curves, and writes predictions, class scores and results.json."""
    from experiments.common.evaluator import write_results
    from experiments.common.plots import draw_learning_curves

    metric = data.task.metric
    draw_learning_curves(settings.run_path, metric, metric_baseline=results["baseline"])
    write_results(settings.run_path, data.task, data.dev, rows, metric=metric, **results)


def validation_formatter(task: Task, baseline: float) -> Callable[[dict[str, Any]], str]:
    """record -> a line with the loss, the metric and its baseline, and all other metrics."""

    def format_record(record: dict[str, Any]) -> str:
        others = (
            f"  {name} {value:.4g}"
            for name, value in record.items()
            if name not in ("kind", "step", "loss", task.metric)
        )
        return (
            f"step {record['step']:,}  validation loss {record['loss']:.3f}  {task.metric} "
            f"{record[task.metric]:.4g} (baseline: {baseline:.4g}){''.join(others)}"
        )

    return format_record


def usage_message(run_dir: Path) -> str:
    """The result of a finished run, and how to use it."""
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    metric = results["metric"]
    return (
        f"best: step {results['best_step']:,} of {results['steps']:,}, {metric} "
        f"{results['metrics'][metric]:.4g} (baseline: {results['baseline']:.4g})\n"
        f"model: {run_dir / 'model'}\n"
        f"  python -m experiments.predict --model={run_dir} --file=..."
    )


if __name__ == "__main__":
    launch(main, FinetuneSettings)

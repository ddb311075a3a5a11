"""Pretrains a masked language model from raw text.

    python -m experiments.pretrain --flagfile=experiments/recipes/small_cpu.flags --run_dir=runs/a

The same command again goes on where the run stopped, bit for bit: data order, masks, dropout,
optimizer and reports. A run directory holds all that it takes to rerun or use it:

    flags.txt        the run's flags, a flagfile          tokenizer/    Hugging Face's files
    corpus.json      what the text was, with digests      checkpoints/  the latest and the best
    metrics.jsonl    every report; events/, loss.png      model/        the result, a Hugging Face
                                                                        folder with its tokenizer
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import flags
from experiments.flags import FLAGS
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.files import written_whole

if TYPE_CHECKING:
    import tokenizers

    from prelnroberta.data.pretraining.loader import Loader
    from prelnroberta.data.pretraining.packing import Rows
    from prelnroberta.data.pretraining.token_files import TokenFiles
    from prelnroberta.distributed.sharding import Layout
    from prelnroberta.metrics.unigram import UnigramBaseline
    from prelnroberta.params import Tree
    from prelnroberta.training.train_step import ScoreFn, TrainState

flags.declare(
    "run", "corpus", "rows", "masking", "model", "fast_start", "optimization", "compute", "scale"
)


def main() -> int:
    from prelnroberta.distributed import multihost

    run_dir = Path(FLAGS.run_dir)
    flags.start_hosts()
    config = check_settings()
    if FLAGS.rehearse:
        return rehearse(config)
    with multihost.first_before_others("claim"):
        flags.check_run(run_dir)
        if (run_dir / "model" / "config.json").exists():  # the last file that a run writes
            print(f"{run_dir} is complete: {FLAGS.steps:,} steps of {FLAGS.steps:,}")
            print(use(run_dir))
            return 0
        params = given_params()
        tokenizer, config = settle_vocabulary(run_dir, config)
        layout = flags.layout(config, "masked_lm", FLAGS.batch_size, FLAGS.accumulate)
        loader, validation_rows, files = load_rows(tokenizer, config)
        claim(run_dir, tokenizer, config, files)
    with layout.active():
        state = first_state(config, layout, params, files[0])
        del params  # the state has its own: a second copy would last as long as the run
        return run(run_dir, tokenizer, config, layout, state, loader, validation_rows, files[0])


def rehearse(config: RobertaPreLayerNormConfig) -> int:
    """--rehearse"""
    from experiments.common import compile_topology as program
    from prelnroberta.training import optimizer as optimizers

    L, M = FLAGS.sequence_length, flags.masked_slots(config.vocab_size)
    rows = dict.fromkeys(("input_ids", "segment_ids", "position_ids"), ((L,), "int32"))
    rows |= dict.fromkeys(("masked_positions", "masked_labels"), ((M,), "int32"))
    rows |= {"masked_weights": ((M,), "float32")}
    optimizer = optimizers.make(flags.optimization(), config)
    return program.rehearse(config, scoring(config), optimizer, rows, flops_per_row(config))


def flops_per_row(config: RobertaPreLayerNormConfig) -> int:
    """Of a forward pass: the head and the last block work at the masked positions alone."""
    slots = flags.masked_slots(config.vocab_size)
    return config.forward_flops(FLAGS.sequence_length, slots)


def scoring(config: RobertaPreLayerNormConfig) -> ScoreFn:
    """The masked-LM loss as steps and evaluations take it."""
    from prelnroberta.model.heads import MaskedLM, masked_lm_scores

    module = MaskedLM(config, flags.execution(FLAGS.logits_chunk_size))

    def score(params: Tree, batch: dict, dropout_keys: Any) -> Any:
        return masked_lm_scores(module, params, batch, dropout_keys)

    return score


def check_settings() -> RobertaPreLayerNormConfig:
    """Refuses whatever flags alone can get wrong, before any work; returns the architecture."""
    flags.positive("log_every", "eval_every", "eval_rows", "save_every", "keep_checkpoints")
    flags.check_batches()
    if not 0 < FLAGS.validation_fraction < 1:
        raise InputError(
            f"--validation_fraction={FLAGS.validation_fraction}, expected a share inside (0, 1): "
            "evaluation needs held-out text, and training the rest"
        )
    flags.optimization()
    flags.corpus()
    config = flags.config(FLAGS.vocab_size)
    flags.check_masking()
    if FLAGS.sequence_length < 3:
        raise InputError(f"--sequence_length={FLAGS.sequence_length}, expected 3 or more")
    if FLAGS.fast_start and not FLAGS.init_from:
        from prelnroberta.training.fast_start import check_length

        check_length(config, FLAGS.sequence_length)
    config.check_length(FLAGS.sequence_length, f"--sequence_length={FLAGS.sequence_length}: a row")
    flags.check_attention(config, FLAGS.sequence_length)
    flags.profile_steps()
    return config


def given_params() -> Tree | None:
    """The weights of --init_from, read before the long work."""
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    return load_pretrained(flags.model_folder(FLAGS.init_from))[0] if FLAGS.init_from else None


def settle_vocabulary(
    run_dir: Path, config: RobertaPreLayerNormConfig
) -> tuple[tokenizers.Tokenizer, RobertaPreLayerNormConfig]:
    """The run's tokenizer, loaded or trained, and the config that fits it."""
    from prelnroberta.data.pretraining.corpus import is_validation
    from prelnroberta.data.tokenizer import load_tokenizer, train_tokenizer

    source = flags.given_tokenizer()
    if (run_dir / "tokenizer").exists():
        tokenizer = load_tokenizer(run_dir / "tokenizer")
    elif source:
        tokenizer = load_tokenizer(source)
    else:
        print(f"training a tokenizer of {FLAGS.vocab_size:,} tokens", flush=True)
        documents = flags.corpus().documents()
        fraction = FLAGS.validation_fraction
        train = (d.text for d in documents if not is_validation(d.key, fraction))
        tokenizer = train_tokenizer(train, FLAGS.vocab_size)
        if (found := tokenizer.get_vocab_size()) < FLAGS.vocab_size:
            print(f"the text has no more than {found:,} tokens in it", flush=True)
    size = tokenizer.get_vocab_size()
    if FLAGS.init_from and size != config.vocab_size:
        raise InputError(
            f"the tokenizer of {source} has {size} tokens, the weights of {FLAGS.init_from} are "
            f"for {config.vocab_size}: give the --tokenizer that they were trained with"
        )
    return tokenizer, config.replace(vocab_size=size)


def load_rows(
    tokenizer: tokenizers.Tokenizer, config: RobertaPreLayerNormConfig
) -> tuple[Loader, Rows, tuple[TokenFiles, TokenFiles]]:
    """Text -> token files -> rows -> shuffled, masked batches."""
    from prelnroberta.data.pretraining.loader import Loader
    from prelnroberta.data.pretraining.packing import open_rows
    from prelnroberta.data.pretraining.token_files import prepare
    from prelnroberta.data.tokenizer import line_ends, word_starts

    files = prepare(flags.corpus(), tokenizer, FLAGS.cache_dir, FLAGS.validation_fraction)
    ends = line_ends(tokenizer)
    opened = []
    for split in files:
        try:
            opened.append(open_rows(split, FLAGS.sequence_length, FLAGS.packing, ends))
        except InputError as error:
            raise InputError(f"{split.manifest['split']} split: {error}") from None
    rows, validation_rows = opened
    masking = flags.masking(config.vocab_size, word_starts(tokenizer))
    return Loader(rows, masking, FLAGS.batch_size, FLAGS.seed), validation_rows, files


def claim(
    run_dir: Path,
    tokenizer: tokenizers.Tokenizer,
    config: RobertaPreLayerNormConfig,
    files: tuple[TokenFiles, TokenFiles],
) -> None:
    """Writes what makes a folder a run: all of it known to be good by now.

    The flags come first and the corpus last, so that a run killed here is a run already, whose
    next start writes the rest. From then on the text is the one it began with, or is refused.
    """
    from prelnroberta.data.tokenizer import save_tokenizer

    record = run_dir / "corpus.json"
    if record.exists():
        began = json.loads(record.read_text(encoding="utf-8"))["train"]["text"]["sha256"]
        if began != files[0].manifest["text"]["sha256"]:
            raise InputError(
                f"the corpus is no longer the text that {run_dir} began with ({record}): give that "
                "text to resume it, or another --run_dir"
            )
        return
    with written_whole(run_dir / "flags.txt") as partial:
        partial.write_text(flags.settings_text(), encoding="utf-8")
    with written_whole(run_dir / "tokenizer") as partial:
        save_tokenizer(tokenizer, partial, config.max_length)
    manifest = {"train": files[0].manifest, "validation": files[1].manifest}
    with written_whole(record) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def first_state(
    config: RobertaPreLayerNormConfig,
    layout: Layout,
    params: Tree | None,
    train_files: TokenFiles,
) -> TrainState:
    """The state before the first step, where its parts lie: of --init_from, or of new values."""
    import jax

    from prelnroberta import params as parameters
    from prelnroberta.training import optimizer as optimizers
    from prelnroberta.training.fast_start import fast_start
    from prelnroberta.training.train_step import TrainState

    optimizer = optimizers.make(flags.optimization(), config)

    def new_state() -> TrainState:
        new = parameters.init(config, jax.random.key(FLAGS.seed))
        if FLAGS.fast_start:
            new = fast_start(new, config, unigram_baseline(train_files).log_probabilities)
        return TrainState.create(new, optimizer)

    if params is None:
        return layout.born(new_state)
    return layout.born(lambda given: TrainState.create(given, optimizer), layout.put(params))


def run(
    run_dir: Path,
    tokenizer: tokenizers.Tokenizer,
    config: RobertaPreLayerNormConfig,
    layout: Layout,
    state: TrainState,
    loader: Loader,
    validation_rows: Rows,
    train_files: TokenFiles,
) -> int:
    """State -> steps -> report -> model."""
    from experiments.common.loop import Cadence, compiled, resume, train
    from experiments.common.report import NoReport, Report, duration
    from prelnroberta import params as parameters
    from prelnroberta.distributed import multihost
    from prelnroberta.training import optimizer as optimizers
    from prelnroberta.training.checkpoint import Checkpoints
    from prelnroberta.training.optimizer import learning_rate
    from prelnroberta.training.train_step import parallel, train_step

    settings = flags.optimization()
    score = scoring(config)
    optimizer = optimizers.make(settings, config)

    # the run's own checkpoint comes before --init_from and new values
    checkpoints = Checkpoints(run_dir / "checkpoints", FLAGS.keep_checkpoints)
    if checkpoints.latest() is not None:
        state = resume(checkpoints, state, FLAGS.set_damaged_aside)
        print(
            f"resuming {run_dir} at step {int(state.step):,} of {settings.steps:,}, bit for bit: "
            "data order, masks, dropout, optimizer and reports go on as if it had never stopped"
        )
    start = int(state.step)

    begin = time.monotonic()
    print(
        f"{parameters.parameter_count(config):,} parameters, {len(loader.source):,} rows of "
        f"{FLAGS.sequence_length} tokens ({loader.source.fill:.0%} full), "
        f"{settings.steps * loader.batch_size / len(loader.source):.1f} epochs",
        flush=True,
    )
    rows = layout.rows(loader.batch_size)
    step = parallel(train_step(score, optimizer, FLAGS.seed, FLAGS.accumulate), layout)
    first = layout.place(loader.batch(start, rows))
    step, compile_seconds = compiled(step, state, first)
    report = Report(run_dir, settings.steps, start) if multihost.is_first() else NoReport()
    try:
        with loader.prefetch(start, rows=rows) as batches:
            state, stopped = train(
                state,
                step,
                map(layout.place, batches),
                cadence=Cadence(
                    steps=settings.steps,
                    log_every=FLAGS.log_every,
                    eval_every=FLAGS.eval_every,
                    save_every=FLAGS.save_every,
                ),
                report=report,
                checkpoints=checkpoints,
                validate=validation(score, layout, loader, validation_rows, train_files),
                learning_rate=learning_rate(settings),
                flops_per_step=3 * loader.batch_size * flops_per_row(config),
                compile_seconds=compile_seconds,
                failed_save=FLAGS.failed_save,
                profile_steps=flags.profile_steps(),
                tokens_per_step=loader.batch_size * FLAGS.sequence_length * loader.source.fill,
            )
    finally:
        report.close()
        checkpoints.close()
    if stopped is not None:
        print(
            f"{stopped.name}: saved step {int(state.step):,} of {settings.steps:,} in {run_dir}; "
            "the same command goes on from there"
        )
        return 128 + stopped

    params = layout.gathered(state.params)
    if multihost.is_first():
        deliver(run_dir, tokenizer, config, params)
        print(f"finished {settings.steps:,} steps in {duration(time.monotonic() - begin)}")
        print(use(run_dir))
    multihost.barrier("end")
    return 0


def deliver(
    run_dir: Path,
    tokenizer: tokenizers.Tokenizer,
    config: RobertaPreLayerNormConfig,
    params: Tree,
) -> None:
    """Draws the loss picture and writes the model folder: what a finished run leaves."""
    from experiments.common.report import draw_losses
    from prelnroberta.data.tokenizer import save_tokenizer
    from prelnroberta.pretrained.hf_checkpoint import save_pretrained

    picture = (
        draw_losses(
            run_dir,
            f"training, {FLAGS.mask_rate:.0%} masked",
            f"validation, {FLAGS.eval_mask_rate:.0%} masked",
        )
        or "not drawn: install prelnroberta[viz]"
    )
    save_tokenizer(tokenizer, run_dir / "model", config.max_length)
    save_pretrained(run_dir / "model", params, config)
    print(f"loss picture: {picture}")


def use(run_dir: Path) -> str:
    """What to do with a finished run."""
    return (
        f"model: {run_dir / 'model'}\nfill masks with it:\n  python -m experiments.predict "
        f'--task=fill_mask --model={run_dir / "model"} --text="A list of <mask>."'
    )


def unigram_baseline(train_files: TokenFiles) -> UnigramBaseline:
    """Word frequencies of the training text, for all tokens that are ever asked for."""
    from prelnroberta.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID
    from prelnroberta.metrics.unigram import UnigramBaseline

    mask_id = len(train_files.counts) - 1
    return UnigramBaseline(train_files.counts, (BOS_ID, PAD_ID, EOS_ID, UNK_ID, mask_id))


def validation(
    score: ScoreFn, layout: Layout, loader: Loader, rows: Rows, train_files: TokenFiles
) -> Callable[[TrainState], dict[str, float]]:
    """state -> loss, perplexity and accuracy on held-out rows, beside the unigram baseline's."""
    import jax

    from prelnroberta.data.pretraining.loader import evaluation_batches
    from prelnroberta.data.pretraining.packing import spread
    from prelnroberta.distributed import multihost
    from prelnroberta.training.train_step import evaluate

    masking = flags.evaluation_masking(loader.masking)
    rows = spread(rows, FLAGS.eval_rows)
    baseline = unigram_baseline(train_files)
    evaluate_batch = evaluate(score, layout)
    here = layout.rows(loader.batch_size)

    def validate(state: TrainState) -> dict[str, float]:
        ours, unigram = [], []
        for batch in evaluation_batches(rows, masking, loader.batch_size, FLAGS.seed, here):
            ours.append(evaluate_batch(state.params, layout.place(batch)))
            unigram.append(baseline.scores(batch["masked_labels"], batch["masked_weights"]))
        weight, loss, correct = (
            math.fsum(float(getattr(scores, name)) for scores in jax.device_get(ours))
            for name in ("weight", "loss", "correct")
        )
        if not weight:
            raise InputError(
                f"evaluation masks no token of {len(rows)} rows: raise --eval_mask_rate or "
                "--eval_rows"
            )
        unigram_loss, most_frequent = multihost.total(
            [math.fsum(float(s.loss) for s in unigram), sum(int(s.correct) for s in unigram)]
        )
        return {
            "loss": loss / weight,
            "perplexity": math.exp(min(loss / weight, 700.0)),
            "accuracy": correct / weight,
            "unigram_loss": unigram_loss / weight,
            "most_frequent_accuracy": most_frequent / weight,
            "masked_tokens": weight,
        }

    return validate


if __name__ == "__main__":
    flags.launch(main)

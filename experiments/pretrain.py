"""Pretrains a masked language model from raw text.

    python -m experiments.pretrain --flagfile=experiments/recipes/small_cpu.flags --run_dir=runs/a

The same command again resumes the run, bit for bit: data order, masks, dropout, optimizer and
reports. A run directory holds everything that is needed to rerun or use it:

    flags.txt        the flags of the run, a flagfile  tokenizer/    in Hugging Face's format
    corpus.json      what the text was, with digests   checkpoints/  the latest and the best
    metrics.jsonl    every report; events/, loss.png   model/        the result, a Hugging Face
                                                                     folder with its tokenizer
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.find_model import find_model_folder
from experiments.common.run_dir import check_run_dir, init_run_dir, read_record
from experiments.flags.launch import launch
from experiments.flags.programs import PretrainSettings
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

if TYPE_CHECKING:
    import tokenizers

    from prelnroberta.data.pretraining.loader import Loader
    from prelnroberta.data.pretraining.packing import Rows
    from prelnroberta.data.pretraining.token_files import TokenFiles
    from prelnroberta.distributed.sharding import Layout
    from prelnroberta.metrics.unigram_baseline import UnigramBaseline
    from prelnroberta.params import Tree
    from prelnroberta.training.train_step import ScoreFn, TrainState

RECORD = "corpus.json"


def main(settings: PretrainSettings) -> int:
    """Flags -> text -> rows -> state -> steps -> model. Returns the exit code."""
    from prelnroberta.distributed import multihost

    run_dir = settings.run_path
    settings.start_hosts()
    config = check_settings(settings)
    if settings.compile_topology:
        return compile_only(settings, config)
    with multihost.primary_host_first("init_run_dir"):
        check_run_dir(settings)
        if (run_dir / "model" / "config.json").exists():  # the last file that a run writes
            print(f"{run_dir} is complete: {settings.steps:,} steps of {settings.steps:,}")
            print(usage_message(run_dir))
            return 0
        params = given_params(settings)
        tokenizer, config = resolve_tokenizer(settings, config)
        layout = settings.layout(
            config, "masked_lm", settings.batch_size, settings.gradient_accumulation_steps
        )
        loader, validation_rows, files = load_rows(settings, tokenizer, config)
        init_pretraining_run(settings, tokenizer, config, files)
    with layout.use_mesh():
        state = initial_state(settings, config, layout, params, files[0])
        del params  # the state has its own copy; this one would last as long as the run
        return run(settings, tokenizer, config, layout, state, loader, validation_rows, files[0])


# ---------------------------------------------------------------------------------------------
# Settings


def check_settings(settings: PretrainSettings) -> RobertaPreLayerNormConfig:
    """Refuses what is wrong with the flags alone, before any work; returns the architecture."""
    settings.check_run()
    settings.check_microbatches(settings.batch_size)
    settings.optimizer_config()
    settings.check_corpus()
    settings.check_masking()
    config = settings.model_config(settings.vocab_size)
    if settings.fast_start and not settings.init_from:
        from prelnroberta.training.fast_start_init import check_length

        check_length(config, settings.sequence_length)
    settings.check_rows(config)
    platform = "tpu" if settings.compile_topology else None
    settings.check_attention(config, settings.sequence_length, platform)
    settings.check_profile_steps()
    return config


def compile_only(settings: PretrainSettings, config: RobertaPreLayerNormConfig) -> int:
    """--compile_topology"""
    from experiments.common.compile_only import compile_topology
    from prelnroberta.training import optimizer as optimizers

    L = settings.sequence_length
    M = settings.masked_per_row(config.vocab_size, L)
    row = dict.fromkeys(("input_ids", "segment_ids", "position_ids"), ((L,), "int32"))
    row |= dict.fromkeys(("masked_positions", "masked_labels"), ((M,), "int32"))
    row |= {"masked_weights": ((M,), "float32")}
    optimizer = optimizers.make_optimizer(settings.optimizer_config(), config)
    score = make_score(settings, config)
    return compile_topology(
        settings, config, score, optimizer, row, flops_per_row(settings, config)
    )


def flops_per_row(settings: PretrainSettings, config: RobertaPreLayerNormConfig) -> int:
    """FLOPs of a forward pass; the head and the last block compute the masked positions only."""
    L = settings.sequence_length
    return config.forward_flops(L, settings.masked_per_row(config.vocab_size, L))


# ---------------------------------------------------------------------------------------------
# Data


def resolve_tokenizer(
    settings: PretrainSettings, config: RobertaPreLayerNormConfig
) -> tuple[tokenizers.Tokenizer, RobertaPreLayerNormConfig]:
    """The tokenizer of the run, loaded or trained, and the config with its vocabulary size."""
    from prelnroberta.data.tokenizer import load_tokenizer

    source = settings.tokenizer_path()
    if (settings.run_path / "tokenizer").exists():
        tokenizer = load_tokenizer(settings.run_path / "tokenizer")
    elif source:
        tokenizer = load_tokenizer(source)
    else:
        tokenizer = train_new_tokenizer(settings)
    size = tokenizer.get_vocab_size()
    if settings.init_from and size != config.vocab_size:
        raise InputError(
            f"the tokenizer of {source} has {size} tokens, the weights of {settings.init_from} are "
            f"for {config.vocab_size}: give the --tokenizer that they were trained with"
        )
    return tokenizer, config.replace(vocab_size=size)


def train_new_tokenizer(settings: PretrainSettings) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of --vocab_size tokens, trained on the training documents."""
    from prelnroberta.data.pretraining.corpus import in_validation_split
    from prelnroberta.data.tokenizer import train_tokenizer

    print(f"training a tokenizer of {settings.vocab_size:,} tokens", flush=True)
    documents = settings.open_corpus().documents()
    fraction = settings.validation_fraction
    train = (d.text for d in documents if not in_validation_split(d.key, fraction))
    tokenizer = train_tokenizer(train, settings.vocab_size)
    if (found := tokenizer.get_vocab_size()) < settings.vocab_size:
        print(f"the text has only {found:,} tokens", flush=True)
    return tokenizer


def load_rows(
    settings: PretrainSettings,
    tokenizer: tokenizers.Tokenizer,
    config: RobertaPreLayerNormConfig,
) -> tuple[Loader, Rows, tuple[TokenFiles, TokenFiles]]:
    """Text -> token files -> rows -> shuffled, masked batches."""
    from prelnroberta.data.pretraining.loader import Loader
    from prelnroberta.data.pretraining.packing import open_rows
    from prelnroberta.data.pretraining.token_files import tokenize_corpus
    from prelnroberta.data.tokenizer import newline_mask, word_start_mask

    corpus, fraction = settings.open_corpus(), settings.validation_fraction
    files = tokenize_corpus(corpus, tokenizer, settings.cache_dir, fraction)
    ends = newline_mask(tokenizer)
    opened = []
    for split in files:
        try:
            opened.append(open_rows(split, settings.sequence_length, settings.packing, ends))
        except InputError as error:
            raise InputError(f"{split.manifest['split']} split: {error}") from None
    rows, validation_rows = opened
    masking = settings.masking(config.vocab_size, word_start_mask(tokenizer))
    loader = Loader(rows, masking, settings.batch_size, settings.seed)
    return loader, validation_rows, files


def init_pretraining_run(
    settings: PretrainSettings,
    tokenizer: tokenizers.Tokenizer,
    config: RobertaPreLayerNormConfig,
    files: tuple[TokenFiles, TokenFiles],
) -> None:
    """Makes the folder a run, or refuses a text that is not the one that the run began with."""
    from prelnroberta.data.tokenizer import save_tokenizer

    def write_tokenizer() -> None:
        with atomic_write(settings.run_path / "tokenizer") as partial:
            save_tokenizer(tokenizer, partial, config.max_length)

    began = read_record(settings.run_path, RECORD)
    if began is None:
        manifest = {"train": files[0].manifest, "validation": files[1].manifest}
        init_run_dir(settings, RECORD, manifest, write_tokenizer)
    elif began["train"]["text"]["sha256"] != files[0].manifest["text"]["sha256"]:
        raise InputError(
            f"the corpus is no longer the text that {settings.run_path} began with "
            f"({settings.run_path / RECORD}): give that text to resume it, or another --run_dir"
        )


# ---------------------------------------------------------------------------------------------
# Training


def make_score(settings: PretrainSettings, config: RobertaPreLayerNormConfig) -> ScoreFn:
    """The masked-LM loss as training steps and evaluations take it."""
    from prelnroberta.model.heads import MaskedLM
    from prelnroberta.model.losses import masked_lm_scores

    module = MaskedLM(config, settings.execution(settings.logits_chunk_size))

    def score(params: Tree, batch: dict, dropout_rngs: Any) -> Any:
        return masked_lm_scores(module, params, batch, dropout_rngs)

    return score


def given_params(settings: PretrainSettings) -> Tree | None:
    """The weights of --init_from, read before the long work."""
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    if not settings.init_from:
        return None
    return load_pretrained(find_model_folder(settings.init_from))[0]


def initial_state(
    settings: PretrainSettings,
    config: RobertaPreLayerNormConfig,
    layout: Layout,
    params: Tree | None,
    train_files: TokenFiles,
) -> TrainState:
    """The sharded state before the first step, with the weights of --init_from or new ones."""
    import jax

    from prelnroberta import params as parameters
    from prelnroberta.training import optimizer as optimizers
    from prelnroberta.training.fast_start_init import fast_start
    from prelnroberta.training.train_step import TrainState

    optimizer = optimizers.make_optimizer(settings.optimizer_config(), config)

    def new_state() -> TrainState:
        new = parameters.init(config, jax.random.key(settings.seed))
        if settings.fast_start:
            new = fast_start(new, config, unigram_baseline(train_files).log_probabilities)
        return TrainState.create(new, optimizer)

    if params is None:
        return layout.init_sharded(new_state)
    return layout.init_sharded(
        lambda given: TrainState.create(given, optimizer), layout.device_put(params)
    )


def run(
    settings: PretrainSettings,
    tokenizer: tokenizers.Tokenizer,
    config: RobertaPreLayerNormConfig,
    layout: Layout,
    state: TrainState,
    loader: Loader,
    validation_rows: Rows,
    train_files: TokenFiles,
) -> int:
    """State -> steps -> report -> model."""
    from experiments.common.run_report import format_duration
    from experiments.common.training_run import TrainingRun
    from prelnroberta import params as parameters
    from prelnroberta.distributed import multihost
    from prelnroberta.training import optimizer as optimizers

    begin = time.monotonic()
    optimizer_config, score = settings.optimizer_config(), make_score(settings, config)
    with TrainingRun(
        settings=settings,
        layout=layout,
        optimizer_config=optimizer_config,
        optimizer=optimizers.make_optimizer(optimizer_config, config),
        score=score,
        loader=loader,
        tokens_per_step=loader.batch_size * settings.sequence_length * loader.source.fill_ratio,
        flops_per_step=3 * loader.batch_size * flops_per_row(settings, config),
        eval_every=settings.eval_every,
        save_every=settings.save_every,
    ) as training:
        state = training.resume(state)
        print(
            f"{parameters.parameter_count(config):,} parameters, {len(loader.source):,} rows of "
            f"{settings.sequence_length} tokens ({loader.source.fill_ratio:.0%} full), "
            f"{optimizer_config.steps * loader.batch_size / len(loader.source):.1f} epochs",
            flush=True,
        )
        validate = make_validate(settings, score, layout, loader, validation_rows, train_files)
        state, stopped = training.train(state, validate)
    if stopped is not None:
        return training.exit_code(stopped, state)

    params = layout.gather_to_host(state.params)
    if multihost.is_primary_host():
        export_model(settings, tokenizer, config, params)
        duration = format_duration(time.monotonic() - begin)
        print(f"finished {optimizer_config.steps:,} steps in {duration}")
        print(usage_message(settings.run_path))
    multihost.barrier("end")
    return 0


def make_validate(
    settings: PretrainSettings,
    score: ScoreFn,
    layout: Layout,
    loader: Loader,
    rows: Rows,
    train_files: TokenFiles,
) -> Callable[[TrainState], dict[str, float]]:
    """state -> loss, perplexity and accuracy on held-out rows, with the unigram baseline's."""
    import jax

    from prelnroberta.data.pretraining.loader import masked_eval_batches
    from prelnroberta.data.pretraining.packing import subsample_evenly
    from prelnroberta.distributed import multihost
    from prelnroberta.training.train_step import compile_eval_step

    masking = settings.eval_masking(loader.masking)
    rows = subsample_evenly(rows, settings.eval_rows)
    baseline = unigram_baseline(train_files)
    evaluate_batch = compile_eval_step(score, layout)
    local_rows = layout.local_batch_rows(loader.batch_size)

    def validate(state: TrainState) -> dict[str, float]:
        ours, unigram = [], []
        batches = masked_eval_batches(rows, masking, loader.batch_size, settings.seed, local_rows)
        for batch in batches:
            ours.append(evaluate_batch(state.params, layout.shard_batch(batch)))
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
        unigram_loss, most_frequent = multihost.sum_over_hosts(
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


def unigram_baseline(train_files: TokenFiles) -> UnigramBaseline:
    """Token frequencies of the training text, of all tokens that can be masked."""
    from prelnroberta.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID
    from prelnroberta.metrics.unigram_baseline import UnigramBaseline

    mask_id = len(train_files.counts) - 1
    return UnigramBaseline(train_files.counts, (BOS_ID, PAD_ID, EOS_ID, UNK_ID, mask_id))


# ---------------------------------------------------------------------------------------------
# Result


def export_model(
    settings: PretrainSettings,
    tokenizer: tokenizers.Tokenizer,
    config: RobertaPreLayerNormConfig,
    params: Tree,
) -> None:
    """Plots the losses and writes the model folder."""
    from experiments.common.plots import draw_learning_curves
    from prelnroberta.data.tokenizer import save_tokenizer
    from prelnroberta.pretrained.hf_checkpoint import save_pretrained

    picture = (
        draw_learning_curves(
            settings.run_path,
            "accuracy",
            f"training, {settings.mask_rate:.0%} masked",
            f"validation, {settings.eval_mask_rate:.0%} masked",
            loss_baseline="unigram_loss",
            metric_baseline="most_frequent_accuracy",
        )
        or "not drawn: install prelnroberta[viz]"
    )
    folder = settings.run_path / "model"
    save_tokenizer(tokenizer, folder, config.max_length)
    save_pretrained(folder, params, config)
    print(f"loss picture: {picture}")


def usage_message(run_dir: Path) -> str:
    """How to use a finished run."""
    return (
        f"model: {run_dir / 'model'}\nfill masks with it:\n  python -m experiments.predict "
        f'--task=fill_mask --model={run_dir / "model"} --text="A list of <mask>."'
    )


if __name__ == "__main__":
    launch(main, PretrainSettings)

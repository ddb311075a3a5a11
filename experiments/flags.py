"""Every flag of every program, declared once, and what the flags become: typed settings.

A program names the groups it takes (`declare("run", "corpus", ...)`), then `launch(main)`. Flags
are read here and nowhere else; below this file there are dataclasses only.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging

from prelnroberta.config import PRESETS, RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.files import written_whole

if TYPE_CHECKING:
    import numpy as np

    from experiments.tasks import TaskSettings
    from prelnroberta.data.pretraining.corpus import DocstringCorpus, FileCorpus
    from prelnroberta.data.pretraining.masking import Masking
    from prelnroberta.distributed.sharding import Layout, Parallelism
    from prelnroberta.model.encoder import Execution
    from prelnroberta.training.optimizer import Optimization

FLAGS = flags.FLAGS


_CONFIG_INTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_CONFIG_FLOATS = ("initializer_range", "layer_norm_eps")
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def _run() -> None:
    flags.DEFINE_string(
        "run_dir", None, "Where the run lives. The same command again resumes it.", required=True
    )
    flags.DEFINE_integer("seed", 0, "Fixes initial values, data order, masks and dropout.")
    flags.DEFINE_integer("log_every", 10, "Steps between reports of the training loss.")
    flags.DEFINE_integer("eval_every", 500, "Steps between evaluations; each one is saved.")
    flags.DEFINE_integer("save_every", 500, "Steps between checkpoints.")
    flags.DEFINE_integer("keep_checkpoints", 2, "Latest checkpoints kept, besides the best.")
    flags.DEFINE_bool(
        "set_damaged_aside", False, "Go on from the step before a damaged checkpoint, not refuse."
    )
    flags.DEFINE_enum(
        "failed_save",
        "stop",
        ["stop", "continue"],
        "What to do when a checkpoint cannot be written, on a full disk for one.",
    )


def _corpus() -> None:
    flags.DEFINE_list(
        "corpus",
        ["docstrings"],
        "Text to train on: files, folders or globs of .txt, .md and .jsonl, each also as .gz, "
        "comma-separated; or 'docstrings', the prose in the installed Python packages.",
    )
    flags.DEFINE_string("text_field", "text", "The field of .jsonl lines that holds the text.")
    flags.DEFINE_float("validation_fraction", 0.05, "Share of documents held out.")
    flags.DEFINE_string(
        "tokenizer",
        None,
        "A tokenizer.json, or a folder with tokenizer.json, vocab.json + merges.txt, or fairseq's "
        "encoder.json + vocab.bpe + dict.txt, or a run. Trained on the corpus if absent.",
    )
    flags.DEFINE_integer("vocab_size", 8192, "Size of the tokenizer to train.")
    flags.DEFINE_string(
        "cache_dir", "~/.cache/prelnroberta", "Where tokenized text is kept for other runs."
    )


def _rows() -> None:
    flags.DEFINE_integer("sequence_length", 128, "L, tokens in a row, specials included.")
    flags.DEFINE_enum(
        "packing",
        "contiguous",
        ["contiguous", "documents", "sentences"],
        "Rows of contiguous text across documents (fairseq's none), or whole documents or lines "
        "packed so that attention and positions never cross a boundary.",
    )
    flags.DEFINE_integer("batch_size", 32, "B, rows in an optimizer step.")
    flags.DEFINE_integer("eval_rows", 1024, "Validation rows per evaluation, at most.")


def _masking() -> None:
    flags.DEFINE_float("mask_rate", 0.15, "Share of tokens to predict, inside (0, 1).")
    flags.DEFINE_enum(
        "mask_sampling",
        "exact",
        ["exact", "bernoulli"],
        "exact: a fixed count, specials among them (fairseq). bernoulli: each token by itself, "
        "never a special (Hugging Face).",
    )
    flags.DEFINE_enum(
        "mask_unit", "token", ["token", "word", "span"], "What is masked as one piece."
    )
    flags.DEFINE_float("mask_random", 0.1, "Of the chosen, the share replaced by random tokens.")
    flags.DEFINE_float("mask_same", 0.1, "Of the chosen, the share left as it is.")
    flags.DEFINE_float(
        "eval_mask_rate", 0.15, "Mask rate of evaluations, the same for all runs that compare."
    )
    flags.DEFINE_integer(
        "logits_chunk_size", 0, "Masked positions of a row whose logits stand at once; 0: all."
    )


def _model() -> None:
    flags.DEFINE_string("preset", "small", f"Named architecture: {', '.join(PRESETS)}.")
    flags.DEFINE_string(
        "init_from", None, "A model folder or a run to start from: config, weights, tokenizer."
    )
    for name in _CONFIG_INTS:
        flags.DEFINE_integer(name, None, "Replaces the preset's.")
    for name in _CONFIG_FLOATS:
        flags.DEFINE_float(name, None, "Replaces the preset's.")
    for name in _DROPOUTS:
        flags.DEFINE_float(name, None, "Replaces the preset's, or --init_from's.")


def _fast_start() -> None:
    flags.DEFINE_bool(
        "fast_start",
        False,
        "Start with first-layer heads that look at the neighbours, which ends the plateau at word "
        "frequencies early (prelnroberta/training/fast_start.py).",
    )


def _optimization() -> None:
    flags.DEFINE_integer("steps", 10_000, "Optimizer steps in all.")
    flags.DEFINE_enum(
        "optimizer", "adamw", ["adamw", "lamb"], "lamb: for batches of tens of thousands of rows."
    )
    flags.DEFINE_float("learning_rate", 1e-3, "Peak learning rate.")
    flags.DEFINE_integer("warmup_steps", 500, "Steps of linear warm-up.")
    flags.DEFINE_enum(
        "schedule",
        "linear",
        ["linear", "cosine", "polynomial", "constant"],
        "How the learning rate falls after warm-up.",
    )
    flags.DEFINE_float("end_learning_rate", 0.0, "Where it has fallen to at the last step.")
    flags.DEFINE_float("polynomial_power", 1.0, "Power of the polynomial schedule.")
    flags.DEFINE_float("adam_beta1", 0.9, "Decay of the mean of gradients.")
    flags.DEFINE_float("adam_beta2", 0.98, "Decay of the mean of their squares.")
    flags.DEFINE_float("adam_epsilon", 1e-6, "Added to the root of the latter.")
    flags.DEFINE_float("weight_decay", 0.01, "Decoupled weight decay.")
    flags.DEFINE_bool("decay_biases", False, "Whether biases decay (fairseq: yes).")
    flags.DEFINE_bool("decay_norms", False, "Whether LayerNorms decay (fairseq: yes).")
    flags.DEFINE_float("clip_norm", 0.0, "Largest global gradient norm; 0 does not clip.")
    flags.DEFINE_integer("accumulate", 1, "Parts of a batch computed one after the other.")
    flags.DEFINE_float(
        "layer_decay", 1.0, "Each layer's learning rate over that of the one above it."
    )
    flags.DEFINE_integer("freeze_layers", 0, "Keep the embeddings and so many first layers.")
    flags.DEFINE_multi_string(
        "freeze", [], "Keep parameters whose path matches, as 'embeddings/*'; several times."
    )


def _compute() -> None:
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations.")
    flags.DEFINE_enum(
        "remat", "none", ["none", "dots", "full"], "What the backward pass computes again."
    )
    flags.DEFINE_enum(
        "attention",
        "auto",
        ["auto", "xla", "splash", "cudnn"],
        "How attention is computed: by XLA, a TPU's splash kernel, a GPU's cuDNN; auto: by the "
        "kernel where it serves, which needs --attention_probs_dropout_prob=0.",
    )
    flags.DEFINE_bool("scan_layers", None, "Loop over one compiled layer. Default: not on CPU.")


def _scale() -> None:
    flags.DEFINE_enum(
        "parallelism",
        "jit",
        ["jit", "pmap"],
        "jit: arrays are cut over the mesh below. pmap: every device holds the whole model.",
    )
    flags.DEFINE_integer("mesh_data", -1, "Devices that share rows alone; -1: what is left.")
    flags.DEFINE_integer("mesh_fsdp", 1, "Devices that share rows and the stored state.")
    flags.DEFINE_integer("mesh_tensor", 1, "Devices that share heads, MLP and vocabulary.")
    flags.DEFINE_enum(
        "dcn_axis", "data", ["data", "fsdp"], "The mesh axis that spans TPU slices or GPU hosts."
    )
    flags.DEFINE_bool(
        "multihost", False, "Join the hosts that a TPU pod, SLURM, Kubernetes or Open MPI tells of."
    )
    flags.DEFINE_string("coordinator", None, "address:port of host 0, for hosts started by hand.")
    flags.DEFINE_integer("hosts", None, "How many there are, with --coordinator.")
    flags.DEFINE_integer("host", None, "Which of them this is, from 0, with --coordinator.")
    flags.DEFINE_string(
        "rehearse",
        None,
        "Compile the step for this TPU slice, as v5e:16x16, tell what it would need, and stop.",
    )
    flags.DEFINE_string("compilation_cache_dir", None, "Where compiled programs are kept.")
    flags.DEFINE_list(
        "profile_steps", [], "First and last step to trace, as 10,15, for xprof or Perfetto."
    )
    flags.DEFINE_integer(
        "lost_after_seconds", 100, "A host silent for so long is lost, and ends the others."
    )


def _demo() -> None:
    flags.DEFINE_string("run_dir", "runs/demo", "Where the run lives.")


def _evaluate() -> None:
    flags.DEFINE_string("model", None, "A Hugging Face folder or a finished run.", required=True)
    flags.DEFINE_string("file", None, "Examples with their answers.", required=True)
    flags.DEFINE_string("output", None, "Where to write predictions and metrics: a new folder.")
    flags.DEFINE_integer(
        "bootstrap", 0, "Resamplings for 95 % confidence intervals; 1000 are usual. 0: none."
    )


def _predict() -> None:
    flags.DEFINE_string("model", None, "A Hugging Face folder or a finished run.", required=True)
    flags.DEFINE_multi_string("text", [], "A text; may be given several times.")
    flags.DEFINE_string("pair", None, "With --text: its second text, or a question's context.")
    flags.DEFINE_multi_string("choice", [], "With --text: its continuations; several times.")
    flags.DEFINE_string("file", None, "Texts or examples. Standard input if neither is given.")
    flags.DEFINE_string(
        "stdin_format",
        None,
        "Of standard input: txt, jsonl, csv, tsv or conll. Default: texts, "
        "one a line, where a text is all there is to an example; else jsonl.",
    )
    flags.DEFINE_string("output", None, "A file for the answers, in place of standard output.")
    flags.DEFINE_enum(
        "format", "text", ["text", "json"], "Of filled masks: for eyes, or JSON lines."
    )
    flags.DEFINE_integer("top_k", 5, "Guesses for each mask, or tokens to draw among.")
    flags.DEFINE_integer("batch_size", 32, "Texts computed at once by fill_mask and generate.")
    flags.DEFINE_enum("pooling", "mean", ["mean", "first"], "Of tokens to a vector, in embed.")
    flags.DEFINE_list("layers", ["-1"], "Whose outputs embed takes: 0 (embeddings) to N, or -1.")
    flags.DEFINE_integer("max_new_tokens", 20, "By how much generate continues, at most.")
    flags.DEFINE_integer("num_beams", 1, "Beams of generate; 1: none.")
    flags.DEFINE_bool("do_sample", False, "Draw what generate writes; else take the likeliest.")
    flags.DEFINE_float("temperature", 1.0, "Of the drawing.")
    flags.DEFINE_float("top_p", 1.0, "Draw among the likeliest of this share.")
    flags.DEFINE_integer("seed", 0, "Of the drawing.")


TASKS = (
    "sequence_classification",
    "token_classification",
    "question_answering",
    "multiple_choice",
    "causal_lm",
    "masked_lm",
)


USES = ("fill_mask", "generate", "embed", "attention")  # of any model, beside the tasks


def _task(more: tuple[str, ...] = ()) -> None:
    flags.DEFINE_enum(
        "task", None, [*TASKS, *more], "What to learn or do. Default: what --model was made for."
    )
    flags.DEFINE_integer("max_length", None, "Tokens in a row, at most. Default: the model's most.")
    flags.DEFINE_bool("skip_bad_rows", False, "Go on without rows that cannot be used; count them.")
    flags.DEFINE_integer(
        "length_buckets", 4, "Lengths that evaluation pads to: so many shapes are compiled."
    )
    flags.DEFINE_integer("eval_positions", 8192, "Tokens, with pads, in a batch of an evaluation.")
    flags.DEFINE_string(
        "text_column",
        None,
        "Of the (first) text, a name, or a number from 0. Default: text; sent1 (choices); of words "
        "the first, or tokens in JSON lines.",
    )
    flags.DEFINE_string("pair_column", None, "Of the second text of pairs, or before the choices.")
    flags.DEFINE_list(
        "label_column",
        [],
        "Of the label; several, of 0 and 1, for several labels. Default: label; of words the last, "
        "or ner_tags in JSON lines.",
    )
    flags.DEFINE_list("labels", [], "The classes' names, in order. Default: those in --train_file.")
    flags.DEFINE_enum(
        "problem_type",
        "single_label_classification",
        ["single_label_classification", "multi_label_classification", "regression"],
        "What a text's label is.",
    )
    flags.DEFINE_bool("all_pieces", False, "Label every piece of a word, not the first alone.")
    flags.DEFINE_integer("stride", None, "Tokens that windows of long inputs share.")
    flags.DEFINE_integer("n_best", 20, "Candidates for an answer.")
    flags.DEFINE_integer("max_answer_length", 30, "Tokens of an answer, at most.")
    flags.DEFINE_float("null_threshold", 0.0, "How much likelier no answer must be than the best.")
    flags.DEFINE_float("mask_rate", 0.15, "Share of tokens to predict, in masked_lm.")


def _finetuning() -> None:
    flags.DEFINE_string("train_file", None, "Examples to learn from.", required=True)
    flags.DEFINE_string("eval_file", None, "Examples to choose the best model by.", required=True)
    flags.DEFINE_string("tokenizer", None, "Of a model from scratch; see experiments.pretrain.")
    flags.DEFINE_bool("scratch", False, "Take --init_from's architecture and tokenizer alone.")
    flags.DEFINE_float("classifier_dropout", None, "Replaces the model's.")
    flags.DEFINE_integer("batch_size", 16, "B, examples in an optimizer step.")
    flags.DEFINE_float("epochs", 3.0, "Times through the examples, unless --steps is given.")
    flags.DEFINE_float("warmup_ratio", 0.06, "Share of the steps that warm up, or --warmup_steps.")
    flags.DEFINE_integer(
        "patience", 0, "Stop after so many evaluations without a better one; 0: no."
    )
    flags.DEFINE_float("label_smoothing", 0.0, "Share of each label spread over all classes.")
    flags.DEFINE_list(
        "class_weights", [], "By how much classes count, one number each in order; or 'balanced'."
    )
    flags.DEFINE_list("seeds", [], "Run once for each of these seeds, in folders of their own.")
    flags.DEFINE_multi_string(
        "sweep",
        [],
        "A flag and its values, as learning_rate=1e-4,3e-4: run once for each; with "
        "several sweeps, for each combination.",
    )
    # Counted from the data, where they are not given.
    for name in ("steps", "warmup_steps", "eval_every", "save_every"):
        FLAGS.set_default(name, None)
    FLAGS.set_default("learning_rate", 5e-5)


def _new_folder() -> None:
    flags.DEFINE_string("output", None, "The folder to make: new, or empty.", required=True)


def _example_data() -> None:
    flags.DEFINE_integer("train_examples", 500, "Of each task to learn from, at most.")
    flags.DEFINE_integer("dev_examples", 1000, "Of each task to evaluate on, at most.")


def _convert() -> None:
    flags.DEFINE_string(
        "input",
        None,
        "A checkpoint: fairseq's or DinkyTrain's .pt (also -shardN.pt), a folder or file of "
        "transformers (.safetensors, .bin, .msgpack, .h5), or a run.",
        required=True,
    )
    flags.DEFINE_string("output", None, "The folder to make. It must not exist, or be empty.")
    flags.DEFINE_enum("to", "huggingface", ["huggingface", "fairseq"], "Form of the output.")
    flags.DEFINE_string(
        "head",
        None,
        "What to take along: masked_lm, a classification head by its name, or none. Default: the "
        "LM head, or else the only head there is.",
    )
    flags.DEFINE_enum(
        "dtype",
        "stored",
        ["stored", "float32", "float16", "bfloat16"],
        "Precision of the output's weights; stored: the input's.",
    )
    flags.DEFINE_bool("describe", False, "Tell what the input holds, and write nothing.")


def _parity() -> None:
    flags.DEFINE_string("checkpoint", None, "A model folder or a finished run.", required=True)
    flags.DEFINE_string(
        "against", None, "A copy of it, such as an export, to be proved. Default: --checkpoint."
    )
    flags.DEFINE_multi_enum(
        "framework",
        ["flax", "pytorch", "tensorflow"],
        ["flax", "pytorch", "tensorflow"],
        "Where to run it; may be given several times.",
    )
    flags.DEFINE_multi_enum(
        "dtype", ["float32", "bfloat16"], ["float32", "bfloat16"], "In what; the same."
    )
    flags.DEFINE_multi_string("text", [], "Real text to run. Default: of Python's own reference.")
    flags.DEFINE_integer("sequence_length", 32, "L, tokens in a row, at most.")
    flags.DEFINE_integer("seed", 0, "Of random ids, targets and new heads.")
    flags.DEFINE_string("html", None, "Where to write the table with plots by layer.")


def _export() -> None:
    flags.DEFINE_string("model", None, "A model folder or a finished run.", required=True)
    forms = ["torch", "tensorflow", "onnx", "stablehlo"]
    flags.DEFINE_multi_enum(
        "format",
        forms,
        forms,
        "What to write beside the Hugging Face folder; may be given several times.",
    )


def _benchmark() -> None:
    flags.DEFINE_multi_string("case", [], "Only cases whose name holds this; several times: any.")
    flags.DEFINE_integer("rounds", 5, "How often each contender is timed; short cases: more.")
    flags.DEFINE_bool("compiled", True, "Also compile the step in several ways: memory and time.")
    flags.DEFINE_string("output", "runs/benchmark", "Where results, table and picture go.")


_GROUPS: dict[str, Callable[[], None]] = {
    "run": _run,
    "corpus": _corpus,
    "rows": _rows,
    "masking": _masking,
    "model": _model,
    "fast_start": _fast_start,
    "optimization": _optimization,
    "compute": _compute,
    "scale": _scale,
    "predict": _predict,
    "demo": _demo,
    "task": _task,
    "task_or_use": lambda: _task(USES),
    "evaluate": _evaluate,
    "finetuning": _finetuning,
    "new_folder": _new_folder,
    "example_data": _example_data,
    "convert": _convert,
    "parity": _parity,
    "export": _export,
    "benchmark": _benchmark,
}
# How this start of the program is run; no part of the settings that a run is known by.
_LAUNCH = {
    "multihost",
    "coordinator",
    "hosts",
    "host",
    "lost_after_seconds",
    "rehearse",
    "compilation_cache_dir",
    "profile_steps",
}
# What may change between the parts of a resumed run: it changes no number of it, or, as the mesh,
# their rounding alone.
_FREE = {
    "run_dir",
    "cache_dir",
    "keep_checkpoints",
    "set_damaged_aside",
    "failed_save",
    "parallelism",
    "mesh_data",
    "mesh_fsdp",
    "mesh_tensor",
    "dcn_axis",
    "attention",
}


_declared: set[str] = set()


def declare(*groups: str) -> None:
    """Declares the flags of these groups for the program that is running."""
    for group in groups:
        if group not in _declared:  # by another program, in a process that imports both
            _GROUPS[group]()
            _declared.add(group)
    for flag in _own():
        # --help shows the flags that belong to the program's own file.
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _own() -> list[flags.Flag]:
    return FLAGS.flags_by_module_dict()[__name__]


# What the machine refuses, wherever it happens: not bugs, and nothing a program could check first.
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def launch(main: Callable[[], int | None]) -> None:
    """Parses flags and runs `main`; input errors are one line and exit code 2."""

    def guarded(argv: list[str]) -> int | None:
        if len(argv) > 1:
            print(
                f"error: unexpected argument {argv[1]!r}: flags are --name=value", file=sys.stderr
            )
            return 2
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        sys.unraisablehook = _unraisable
        try:
            return main()
        except InputError as error:
            _refuse(str(error))
        except BrokenPipeError:  # `| head`: whoever reads has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except RuntimeError as error:
            from prelnroberta.distributed import multihost

            if not multihost.is_lost_host(error):
                raise
            print(
                "error: another host of this job is gone: start all of them again with the same "
                "command, and they go on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            multihost.leave(multihost.TRY_AGAIN)
        except OSError as error:
            if error.errno not in _MACHINE_ERRORS:
                raise
            _refuse(f"{error.filename or 'a file could not be written'}: {error.strerror}")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    app.run(guarded)


def _unraisable(error: sys.UnraisableHookArgs) -> None:
    """When a save fails, tensorstore's threads still call back into a loop that orbax has closed:
    a traceback each, beside the one line that says why the save failed."""
    if str(error.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(error)


def _refuse(message: str) -> NoReturn:
    """Says it and leaves at once: on a full disk, libraries that flush at exit have tracebacks."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def positive(*names: str) -> None:
    """Raises InputError for a flag that is below 1."""
    for name in names:
        if FLAGS[name].value < 1:
            raise InputError(f"--{name}={FLAGS[name].value}, expected 1 or more")


def check_batches() -> None:
    """Refuses a --batch_size, --accumulate or --seed that no training could use."""
    positive("batch_size", "accumulate")
    if FLAGS.batch_size % FLAGS.accumulate:
        raise InputError(
            f"--accumulate={FLAGS.accumulate} does not divide --batch_size={FLAGS.batch_size}"
        )
    if not 0 <= FLAGS.seed < 2**63:
        raise InputError(f"--seed={FLAGS.seed}, expected 0 or more, below 2^63")


def check_run(run_dir: Path) -> None:
    """Refuses a folder that is no place for a new run, and holds none of these settings."""
    if (run_dir / "flags.txt").exists():
        check_same_settings(run_dir / "flags.txt")
    else:
        check_room(run_dir)


def given_tokenizer() -> Path | None:
    """--tokenizer, which may be a run; else that of --init_from, if there is one."""
    if FLAGS.tokenizer is None:
        return model_folder(FLAGS.init_from) if FLAGS.init_from else None
    source = Path(FLAGS.tokenizer)
    return source / "tokenizer" if (source / "flags.txt").exists() else source


def check_room(run_dir: Path) -> None:
    """Makes the folder of a new run; raises InputError where none can be."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        empty = not any(run_dir.iterdir())
    except FileExistsError:
        raise InputError(f"--run_dir={run_dir} is a file: give a new or empty folder") from None
    except OSError as error:
        raise InputError(f"--run_dir={run_dir} cannot be made: {error.strerror}") from None
    if not empty:
        raise InputError(f"--run_dir={run_dir} exists and holds no run: give a new or empty folder")
    if not os.access(run_dir, os.W_OK):
        raise InputError(f"--run_dir={run_dir} cannot be written to: give another folder")


def check_new_folder(path: str) -> None:
    """Raises InputError for an --output that would be written over."""
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"--output={folder} exists: name a new or empty folder")


def needs(module: str, extra: str, flag: str) -> None:
    """Raises InputError, before anything is done, for a flag whose library is not installed."""
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{flag} needs {module}: pip install -e '.[{extra}]'")


def corpus() -> DocstringCorpus | FileCorpus:
    """--corpus"""
    from prelnroberta.data.pretraining.corpus import DocstringCorpus, FileCorpus

    if FLAGS.corpus == ["docstrings"]:
        return DocstringCorpus()
    if not FLAGS.corpus:
        raise InputError("--corpus is empty, expected 'docstrings', files, folders or globs")
    return FileCorpus(FLAGS.corpus, FLAGS.text_field)


def masking(vocab_size: int, word_starts: np.ndarray) -> Masking:
    """--mask_*; the split is what is left to `<mask>`."""
    from prelnroberta.data.pretraining.masking import Masking

    if not 0 < FLAGS.mask_rate < 1:
        raise InputError(f"--mask_rate={FLAGS.mask_rate}, expected a share inside (0, 1)")
    shares = FLAGS.mask_random, FLAGS.mask_same
    if not (min(shares) >= 0 and sum(shares) <= 1):
        raise InputError(
            f"--mask_random={shares[0]} and --mask_same={shares[1]}, expected shares of at least 0 "
            "that leave the rest of 1 to <mask>"
        )
    return Masking(
        vocab_size=vocab_size,
        rate=FLAGS.mask_rate,
        sampling=FLAGS.mask_sampling,
        unit=FLAGS.mask_unit,
        mask=1.0 - FLAGS.mask_random - FLAGS.mask_same,
        random=FLAGS.mask_random,
        same=FLAGS.mask_same,
        word_starts=word_starts,
    )


def check_masking() -> None:
    """Refuses --mask_* and --eval_mask_rate that no vocabulary could make right."""
    import numpy as np

    V = 1 << 10
    evaluation_masking(masking(V, np.zeros(V, bool)))


def masked_slots(vocab_size: int) -> int:
    """M, how many positions a row of --sequence_length has room to mask."""
    import numpy as np

    return masking(vocab_size, np.zeros(vocab_size, bool)).slots(FLAGS.sequence_length)


def evaluation_masking(masking: Masking) -> Masking:
    """--eval_mask_rate: the training's masks at that rate, specials never among them, because a
    `<s>` that is known by its place says nothing of the text."""
    try:
        return dataclasses.replace(masking, rate=FLAGS.eval_mask_rate, sampling="bernoulli")
    except InputError as error:
        raise InputError(f"--eval_mask_rate: {error}") from None


def config(vocab_size: int) -> RobertaPreLayerNormConfig:
    """The architecture: --init_from's, or --preset and what replaces its fields."""
    asked = RobertaPreLayerNormConfig.preset(
        FLAGS.preset,
        vocab_size=vocab_size,
        **_given(*_CONFIG_INTS, *_CONFIG_FLOATS, *_DROPOUTS, "classifier_dropout"),
    )
    if not FLAGS.init_from:
        return asked
    folder = model_folder(FLAGS.init_from)
    if idle := _given("preset", "fast_start", *_CONFIG_INTS, *_CONFIG_FLOATS):
        # A recipe brings these along; whoever continues from weights must know that they rest.
        names = ", ".join(f"--{name}" for name in idle)
        print(f"starting from {folder}: its architecture and values, whatever {names} say")
    return RobertaPreLayerNormConfig.from_json(folder).replace(
        **_given(*_DROPOUTS, "classifier_dropout")
    )


def model_folder(path: str) -> Path:
    """A Hugging Face folder, or the one inside a finished run."""
    folder = Path(path)
    for found in (folder, folder / "model"):
        if (found / "config.json").exists():
            return found
    if (folder / "flags.txt").exists():
        raise InputError(f"{folder} is a run without a model yet: finish it first")
    raise InputError(f"{folder}: no config.json there, expected a model folder or a run")


def _given(*names: str) -> dict[str, Any]:
    """name -> value of those of these flags that were set."""
    return {name: FLAGS[name].value for name in names if name in FLAGS and FLAGS[name].present}


def task_settings(config: RobertaPreLayerNormConfig, folder: Path | None = None) -> TaskSettings:
    """--task and how its data is read, for a model of this config.

    What the fine-tuned model in `folder` keeps in task.json stands, but for flags that are given.
    """
    from experiments.tasks import TaskSettings

    kept = folder / "task.json" if folder else None
    values: dict[str, Any] = {}
    if kept and kept.exists():
        values = json.loads(kept.read_text(encoding="utf-8"))
        if FLAGS.task not in (None, values["task"]):
            raise InputError(f"--task={FLAGS.task}: {folder} was made for {values['task']}")
    elif FLAGS.task is None:
        raise InputError(f"--task is missing, expected one of {', '.join(TASKS)}")
    elif folder:
        labels = tuple(config.id2label.values())
        values = {"labels": labels, "problem_type": config.problem_type or _SINGLE}
    fields = [f.name for f in dataclasses.fields(TaskSettings) if f.name in FLAGS]
    values |= {name: FLAGS[name].value for name in fields if FLAGS[name].present}
    values |= {n: _column(v) for n, v in _given("text_column", "pair_column").items()}
    if FLAGS["label_column"].present:
        values["label_columns"] = map(_column, FLAGS.label_column)
    longest = config.max_length
    values = {"max_length": longest, **values}
    if not 8 <= values["max_length"] <= longest:
        raise InputError(f"--max_length={FLAGS.max_length}, expected 8 to {longest}, the model's")
    for name in ("labels", "label_columns"):
        values[name] = tuple(values.get(name, ()))
    return TaskSettings(**values)


_SINGLE = "single_label_classification"


def _column(value: str | None) -> str | int | None:
    return int(value) if value is not None and value.lstrip("-").isdecimal() else value


def save_task_settings(settings: TaskSettings, folder: Path) -> None:
    """`task.json`, which evaluate and predict read."""
    with written_whole(folder / "task.json") as partial:
        partial.write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n")


def optimization(**counted: int) -> Optimization:
    """The optimizer's settings, each under its field's name; `counted` are not read from flags."""
    from prelnroberta.training.optimizer import Optimization

    names = {field.name for field in dataclasses.fields(Optimization)} - counted.keys()
    return Optimization(**{name: FLAGS[name].value for name in names}, **counted)


def execution(logits_chunk_size: int = 0) -> Execution:
    """--dtype, --remat, --attention, --scan_layers"""
    import jax.numpy as jnp

    from prelnroberta.model.encoder import Execution

    return Execution(
        dtype=jnp.dtype(FLAGS.dtype),
        remat=FLAGS.remat,
        attention=FLAGS.attention,
        scan_layers=FLAGS.scan_layers,
        logits_chunk_size=logits_chunk_size,
    )


def check_attention(config: RobertaPreLayerNormConfig, length: int) -> None:
    """Refuses an --attention that could not serve training rows of this length, before any work."""
    if FLAGS.attention in ("auto", "xla"):
        return
    import jax
    import jax.numpy as jnp

    from prelnroberta.model.attention_kernels import refusals

    platform = "tpu" if FLAGS.rehearse else jax.default_backend()
    dtype = jnp.dtype(FLAGS.dtype)
    if reasons := refusals(FLAGS.attention, config, dtype, length, True, platform):
        raise InputError(
            f"--attention={FLAGS.attention} does not serve {', '.join(reasons)}: leave it at auto"
        )


def profile_steps() -> tuple[int, int] | None:
    """--profile_steps"""
    if not FLAGS.profile_steps:
        return None
    try:
        first, last = (int(step) for step in FLAGS.profile_steps)
    except ValueError:
        first, last = 0, 0
    if not 1 <= first <= last:
        raise InputError(
            f"--profile_steps={','.join(FLAGS.profile_steps)}, expected a first and a last step, "
            "as 10,15"
        )
    return first, last


def start_hosts() -> None:
    """--multihost, --coordinator, --hosts, --host: joins the job, if there is one to join. Of
    several hosts the first alone prints. --compilation_cache_dir, too, is set here, before
    anything is compiled."""
    if FLAGS.compilation_cache_dir:
        import jax

        jax.config.update("jax_compilation_cache_dir", FLAGS.compilation_cache_dir)
    by_hand = [FLAGS.coordinator, FLAGS.hosts, FLAGS.host]
    if any(x is not None for x in by_hand) and None in by_hand:
        raise InputError("--coordinator, --hosts and --host belong together: give all three")
    if not FLAGS.multihost and not FLAGS.coordinator:
        return
    positive("lost_after_seconds")
    from prelnroberta.distributed import multihost

    multihost.start(*by_hand, FLAGS.lost_after_seconds)
    if not multihost.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # to the end of the process


def layout(
    config: RobertaPreLayerNormConfig,
    model: str,
    batch_size: int,
    accumulate: int,
    devices: list[Any] | None = None,
) -> Layout:
    """--parallelism and the mesh, on the devices there are or those given, checked against the
    model and batch. Prints what it is."""
    from prelnroberta.distributed.sharding import Layout

    made = Layout(parallelism(), config, model, devices)
    made.check_batch(batch_size, accumulate)
    print("\n".join([made.describe(), *made.notes]), flush=True)
    return made


def parallelism() -> Parallelism:
    """--parallelism, --mesh_*, --dcn_axis"""
    from prelnroberta.distributed.sharding import Parallelism

    return Parallelism(
        strategy=FLAGS.parallelism,
        data=FLAGS.mesh_data,
        fsdp=FLAGS.mesh_fsdp,
        tensor=FLAGS.mesh_tensor,
        dcn_axis=FLAGS.dcn_axis,
    )


def settings_text() -> str:
    """The flags of this program as a flagfile that reruns it."""
    kept = [flag for flag in _own() if flag.name not in _LAUNCH]
    lines = (line for flag in kept for line in flag.serialize().splitlines())
    return "".join(f"{line}\n" for line in lines if line)


def check_same_settings(saved: Path) -> None:
    """Raises InputError naming each flag that differs from the flagfile of an earlier part."""
    before = _parse(saved.read_text(encoding="utf-8"))
    now = _parse(settings_text())
    differing = [
        f"--{name} (there {before.get(name, 'not set')}, here {now.get(name, 'not set')})"
        for name in sorted((before.keys() | now.keys()) - _FREE)
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise InputError(
            f"{saved.parent} holds a run with other flags: {'; '.join(differing)}. Give the same "
            "flags to resume it, or another --run_dir"
        )


def _parse(text: str) -> dict[str, str]:
    """name -> value of what `settings_text` wrote, where a bool is --name or --noname."""
    values = {}
    for line in text.splitlines():
        name, equals, value = line.removeprefix("--").partition("=")
        if not equals:
            value = str(name in FLAGS).lower()
            name = name if name in FLAGS else name.removeprefix("no")
        values[name] = value
    return values

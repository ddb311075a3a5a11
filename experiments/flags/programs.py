"""The settings of each program: the groups of flags that it takes, and flags of its own."""

from __future__ import annotations

import dataclasses

from experiments.flags.field import flag, required
from experiments.flags.groups.batches import BatchSettings
from experiments.flags.groups.compute import ComputeSettings
from experiments.flags.groups.corpus import CorpusSettings
from experiments.flags.groups.devices import DeviceSettings
from experiments.flags.groups.masking import MaskingSettings
from experiments.flags.groups.model import ModelSettings
from experiments.flags.groups.optimizer import OptimizerSettings
from experiments.flags.groups.run import RunSettings
from experiments.flags.groups.task import TaskFlags
from experiments.tasks.task_names import TASK_NAMES

# What predict does with any model, in addition to the tasks.
USES = ("fill_mask", "generate", "embed", "attention")
EXPORT_FORMATS = ("torch", "tensorflow", "onnx", "stablehlo")
FRAMEWORKS = ("flax", "pytorch", "tensorflow")
PARITY_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings(
    RunSettings, ModelSettings, OptimizerSettings, ComputeSettings, DeviceSettings
):
    """Flags that pretrain and finetune share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainingSettings, CorpusSettings, BatchSettings, MaskingSettings):
    """Flags of experiments.pretrain."""

    fast_start: bool = flag(
        False,
        "Start with first-layer heads that attend to neighbouring tokens, which ends the plateau "
        "at the unigram loss early (prelnroberta/training/fast_start_init.py).",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainingSettings, TaskFlags):
    """Flags of experiments.finetune."""

    train_file: str = required("Examples to train on.")
    eval_file: str = required("Examples to select the best model by.")
    from_scratch: bool = flag(
        False, "Use only the architecture and the tokenizer of --init_from, not its weights."
    )
    classifier_dropout: float | None = flag(
        None, "Dropout before the classifier; overrides the preset or --init_from."
    )
    batch_size: int = flag(16, "B, examples in an optimizer step.")
    epochs: float = flag(3.0, "Passes over the training examples; --steps overrides it.")
    steps: int | None = flag(None, "Number of optimizer steps. Default: those of --epochs.")
    eval_every: int | None = flag(None, "Steps between evaluations. Default: an epoch.")
    save_every: int | None = flag(None, "Steps between checkpoints. Default: --eval_every.")
    learning_rate: float = flag(5e-5, "Peak learning rate.")
    warmup_ratio: float = flag(
        0.06, "Share of the steps that are linear warm-up; --warmup_steps overrides it."
    )
    warmup_steps: int | None = flag(None, "Steps of linear warm-up. Default: --warmup_ratio.")
    patience: int = flag(
        0, "Stop after this many evaluations without a better one; 0 never stops early."
    )
    label_smoothing: float = flag(
        0.0, "Share of the target probability that is spread over all classes."
    )
    class_weights: tuple[str, ...] = flag(
        (),
        "Weight of each class in the loss, a number a class in the order of their ids; or "
        "'balanced', which is inverse to their frequencies.",
    )
    seeds: tuple[int, ...] = flag((), "Run once for each of these seeds, each in its own folder.")
    sweep: tuple[str, ...] = flag(
        (),
        "A flag and its values, for example learning_rate=1e-4,3e-4: run once for each. Repeat the "
        "flag to run all combinations.",
        repeated=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings(TaskFlags, ComputeSettings, DeviceSettings):
    """Flags of experiments.evaluate."""

    model: str = required("A Hugging Face folder or a finished run.")
    file: str = required("Examples with labels.")
    output: str | None = flag(None, "New folder for predictions and metrics.")
    bootstrap: int = flag(
        0, "Bootstrap resamples for 95 % confidence intervals, for example 1000; 0: none."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictSettings(TaskFlags, ComputeSettings):
    """Flags of experiments.predict."""

    model: str = required("A Hugging Face folder or a finished run.")
    task: str | None = flag(
        None,
        "The task or use. Default: the task that --model was trained for.",
        choices=(*TASK_NAMES, *USES),
    )
    text: tuple[str, ...] = flag(
        (), "A text to predict for; repeat the flag for several.", repeated=True
    )
    pair: str | None = flag(
        None, "Second text of a pair, or context of a question; requires --text."
    )
    choice: tuple[str, ...] = flag(
        (), "A continuation of --text in multiple choice; repeat the flag.", repeated=True
    )
    file: str | None = flag(
        None, "File of texts or examples. Default: standard input, unless --text is given."
    )
    stdin_format: str | None = flag(
        None,
        "Format of standard input: txt, jsonl, csv, tsv or conll. Default: txt, a text a line, for "
        "tasks whose example is one text; jsonl for the others.",
    )
    output: str | None = flag(None, "File for the predictions. Default: standard output.")
    format: str = flag(
        "text", "Format of filled masks: readable text, or JSON lines.", choices=["text", "json"]
    )
    top_k: int | None = flag(
        None,
        "Guesses for each mask (default: 5), or likeliest tokens to sample from in generate "
        "(default: transformers', 50).",
    )
    batch_size: int = flag(32, "Texts in a batch of fill_mask and generate.")
    pooling: str = flag(
        "mean",
        "How embed makes a vector of a text: the mean over its tokens, or its first token.",
        choices=["mean", "first"],
    )
    layers: tuple[int, ...] = flag(
        (-1,), "Layers whose outputs embed writes: 0 (embeddings) to N, or -1 for the last."
    )
    max_new_tokens: int = flag(20, "Maximum number of tokens that generate adds to a text.")
    num_beams: int = flag(1, "Beams of beam search in generate; 1: no beam search.")
    do_sample: bool = flag(False, "Sample in generate instead of taking the likeliest token.")
    temperature: float = flag(1.0, "Sampling temperature.")
    top_p: float = flag(1.0, "Sample from the likeliest tokens whose probabilities sum to this.")
    seed: int = flag(0, "Seed of sampling.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Flags of experiments.export."""

    model: str = required("A model folder or a finished run.")
    output: str = required("Folder to make: new, or empty.")
    format: tuple[str, ...] = flag(
        EXPORT_FORMATS,
        "Format to write in addition to the Hugging Face folder; repeat the flag for several.",
        choices=EXPORT_FORMATS,
        repeated=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Flags of experiments.convert."""

    input: str = required(
        "A checkpoint of fairseq or DinkyTrain (.pt, also -shardN.pt), a folder or file of "
        "transformers (.safetensors, .bin, .msgpack, .h5), or a run."
    )
    output: str | None = flag(None, "Folder to make: new, or empty.")
    to: str = flag("huggingface", "Format to write.", choices=["huggingface", "fairseq"])
    head: str | None = flag(
        None,
        "Head to convert: masked_lm, the name of a classification head, or none. Default: the LM "
        "head, or else the only head.",
    )
    dtype: str = flag(
        "stored",
        "Precision of the written weights; stored: that of the input.",
        choices=["stored", "float32", "float16", "bfloat16"],
    )
    describe: bool = flag(False, "Print what the input holds, and write nothing.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParitySettings:
    """Flags of experiments.parity."""

    checkpoint: str = required("A model folder or a finished run.")
    against: str | None = flag(
        None, "A copy of the checkpoint to verify, such as an export. Default: --checkpoint."
    )
    framework: tuple[str, ...] = flag(
        FRAMEWORKS,
        "Framework to run; repeat the flag for several.",
        choices=FRAMEWORKS,
        repeated=True,
    )
    dtype: tuple[str, ...] = flag(
        PARITY_DTYPES,
        "Precision to run in; repeat the flag for several.",
        choices=PARITY_DTYPES,
        repeated=True,
    )
    text: tuple[str, ...] = flag(
        (), "Text to run; repeat the flag. Default: text of Python's own reference.", repeated=True
    )
    sequence_length: int = flag(32, "L, maximum number of tokens in a row.")
    seed: int = flag(0, "Seed of random ids, targets and new heads.")
    html: str | None = flag(None, "File for a page with the table and a plot of the layers.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Flags of experiments.demo."""

    run_dir: str = flag("runs/demo", "Directory of the run.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleDataSettings:
    """Flags of experiments.example_data."""

    output: str = required("Folder to make: new, or empty.")
    train_examples: int = flag(500, "Maximum number of training examples of each task.")
    dev_examples: int = flag(1000, "Maximum number of evaluation examples of each task.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Flags of experiments.benchmark."""

    case: tuple[str, ...] = flag(
        (), "Run only cases whose name contains this; repeat the flag for several.", repeated=True
    )
    rounds: int = flag(5, "Times that each contender is timed; short cases get more.")
    compiled: bool = flag(
        True, "Also measure the memory and the compile time of variants of the training step."
    )
    output: str = flag("runs/benchmark", "Folder for results, table and picture.")

"""Proves that a checkpoint is one function in Flax, PyTorch and TensorFlow.

python -m experiments.parity --checkpoint=runs/demo
python -m experiments.parity --checkpoint=DIR --against=COPY --html=parity.html

Exits with 1 if anything is further from the float64 reference than its bound.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, NamedTuple

from experiments.common.find_model import find_model_folder
from experiments.common.plots import pyplot
from experiments.flags.checks import check_installed, check_positive
from experiments.flags.launch import launch
from experiments.flags.programs import ParitySettings
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

if TYPE_CHECKING:
    from bridges.verify.parity import Comparison
    from prelnroberta.config import RobertaPreLayerNormConfig
    from prelnroberta.params import Tree


class Served(NamedTuple):
    """One model that a folder's weights serve: values, config, and which values are new."""

    params: Tree
    config: RobertaPreLayerNormConfig
    model: str
    new: str


def main(settings: ParitySettings) -> int:
    """Runs every model in every framework and precision. Returns the exit code."""
    from bridges.verify.parity import ARRAY_KINDS, compare_frameworks, make_batch

    check_positive(settings, "sequence_length")
    directory = find_model_folder(settings.checkpoint)
    copied = directory if settings.against is None else find_model_folder(settings.against)
    if settings.html is not None:
        check_installed("matplotlib", "viz", "--html")
        if not Path(settings.html).absolute().parent.is_dir():
            raise InputError(f"--html={settings.html}: no such folder to write it in")
    rows = text_rows(settings, directory)
    print(f"{copied} against {directory}\n{NOTE}")
    print(columns(["class", "framework", "dtype", *ARRAY_KINDS]))
    runs: list[list[Comparison]] = []
    copies = all_served(copied, settings.seed) if settings.against else None
    for served in all_served(directory, settings.seed):
        copy = next(copies) if copies else served
        if served.config != copy.config:
            raise InputError(f"{copied}: config.json differs from that of {directory}")
        if served.new:
            print(f"{served.model}: new values for {served.new}")
        batch = make_batch(
            served.config, served.model, settings.sequence_length, settings.seed, rows
        )
        found = list(
            compare_frameworks(*served[:3], batch, settings.framework, settings.dtype, copy.params)
        )
        for who in product(settings.framework, settings.dtype):
            run = [error for error in found if (error.framework, error.dtype) == who]
            print(line(run), flush=True)
            runs.append(run)
    passed = sum(all(error.passed for error in run) for run in runs)
    if settings.html is not None:
        write_html(Path(settings.html), f"{copied} against {directory}", runs)
        print(f"report: {settings.html}")
    print(f"{passed} of {len(runs)} are within their bounds")
    return 0 if passed == len(runs) else 1


def all_served(directory: Path, seed: int) -> Iterator[Served]:
    """Every model on this folder's encoder; heads that it does not have get new values."""
    import jax

    from bridges.verify.parity import PARITY_MODELS
    from prelnroberta import params as parameters
    from prelnroberta.config import RobertaPreLayerNormConfig
    from prelnroberta.pretrained import hf_checkpoint

    tensors, source = hf_checkpoint.read_weights(directory)
    saved = RobertaPreLayerNormConfig.from_json(directory)
    for model in PARITY_MODELS:
        config = saved.replace(is_decoder=True) if model == "causal_lm" else saved

        def initial(config: RobertaPreLayerNormConfig = config, model: str = model) -> Tree:
            return parameters.init(config, jax.random.key(seed), model)

        params, loading_info = hf_checkpoint.load_state_dict(
            tensors, config, model, source, initial
        )
        yield Served(params, config, model, ", ".join(loading_info.missing_keys))


def text_rows(settings: ParitySettings, directory: Path) -> list[list[int]]:
    """Real text in the folder's tokenizer, ids cut to --sequence_length; none without one."""
    from prelnroberta.data.tokenizer import load_tokenizer

    if not (directory / "tokenizer.json").exists() and not (directory / "vocab.json").exists():
        print(f"{directory} has no tokenizer: random ids only")
        return []
    tokenizer = load_tokenizer(directory)
    texts = list(settings.text) or [
        " ".join(topics[name].split()) for name in ("lambda", "with", "yield")
    ]
    L = settings.sequence_length
    # Of different lengths, so that some are padded.
    return [tokenizer.encode(text).ids[: L - 3 * n] for n, text in enumerate(texts)]


# ---------------------------------------------------------------------------------------------
# What is shown

NOTE = "rms and largest error against the same function in float64, relative to its own size"


def cells(run: list[Comparison]) -> list[str]:
    """Who ran, and the worst error of each kind."""
    from bridges.verify.parity import ARRAY_KINDS, worst

    found = [worst(run, kind) for kind in ARRAY_KINDS]
    return [
        *(run[0].model, run[0].framework, run[0].dtype),
        *("-" if error is None else f"{error.rms:.1e} {error.max_abs:.1e}" for error in found),
    ]


def verdict(run: list[Comparison]) -> str:
    """ok, or where it begins to differ."""
    from bridges.verify.parity import diagnose

    return diagnose(run) or "ok"


def line(run: list[Comparison]) -> str:
    return f"{columns(cells(run))}  {verdict(run)}"


def columns(texts: list[str]) -> str:
    widths = (23, 10, 8, 15, 15, 15, 15)
    return "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True))


def write_html(path: Path, title: str, runs: list[list[Comparison]]) -> None:
    """Writes the table, and a plot of the error of every hidden state of every run."""
    from bridges.verify.parity import ARRAY_KINDS

    header = _table_row("th", ["class", "framework", "dtype", *ARRAY_KINDS, ""])
    rows = "".join(_table_row("td", [*cells(run), verdict(run)]) for run in runs)
    page = (
        f"<!doctype html><meta charset='utf-8'><title>Parity</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>\n<p>{NOTE}</p>\n"
        f"<table>{header}{rows}</table>\n{layer_plots(runs)}\n"
    )
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")


def _table_row(tag: str, texts: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>\n"


_STYLE = (
    "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}"
)


def layer_plots(runs: list[list[Comparison]]) -> str:
    """Draws rms errors by hidden state as SVG: a panel for each class, a line for each run."""
    plt = pyplot()
    models = list(dict.fromkeys(run[0].model for run in runs))
    figure, axes = plt.subplots(
        -(-len(models) // 2), 2, figsize=(11, 3 * -(-len(models) // 2)), squeeze=False
    )
    for axis, model in zip(axes.flat, models, strict=False):
        for run in (run for run in runs if run[0].model == model):
            states = [error.rms for error in run if error.kind == "hidden state"]
            label = f"{run[0].framework} {run[0].dtype}"
            axis.plot(states, marker=".", label=label)
        axis.set(yscale="log", title=model, xlabel="hidden state", ylabel="rms error / rms")
    for axis in list(axes.flat)[len(models) :]:
        axis.remove()
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    plt.close(figure)
    return svg.getvalue()[svg.getvalue().index("<svg") :]


if __name__ == "__main__":
    launch(main, ParitySettings)

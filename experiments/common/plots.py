"""Plots: learning curves, a confusion matrix, attention maps.

PNGs need matplotlib; without it the functions return None. The HTML needs only a browser.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.run_report import read_records
from prelnroberta.files import atomic_write


def pyplot() -> Any | None:
    """matplotlib.pyplot with a backend that needs no screen; None if not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(plt: Any, figure: Any, path: Path) -> Path:
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
    return path


def draw_learning_curves(
    run_dir: Path,
    metric: str,
    train_label: str = "training",
    validation_label: str = "validation",
    loss_baseline: str | None = None,
    metric_baseline: str | float | None = None,
) -> Path | None:
    """Draws `loss.png` from the run's records: both losses, and `metric` of the validation set.

    Args:
        metric, loss_baseline: fields of the validation records.
        metric_baseline: a field, or a constant.
    """
    if (plt := pyplot()) is None:
        return None
    records = read_records(run_dir / "metrics.jsonl")
    train, validation = (
        [r for r in records if r["kind"] == kind] for kind in ("train", "validation")
    )

    def plot(axes: Any, records: list[dict], field: str, style: str, label: str) -> None:
        steps, values = [r["step"] for r in records], [r[field] for r in records]
        axes.plot(steps, values, style, markersize=3, label=label)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    plot(left, train, "loss", "-", train_label)
    plot(left, validation, "loss", "o-", validation_label)
    plot(right, validation, metric, "o-", validation_label)
    for axes, baseline in ((left, loss_baseline), (right, metric_baseline)):
        if isinstance(baseline, str):
            plot(axes, validation, baseline, "k--", baseline.replace("_", " "))
        elif baseline is not None:
            axes.axhline(baseline, linestyle="--", color="k", label="baseline")
    left.set(xlabel="step", ylabel="loss", title="Loss")
    right.set(xlabel="step", ylabel=metric, title=metric)
    if metric == "accuracy":  # a share: an axis from 0 does not exaggerate it
        right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return _save(plt, figure, run_dir / "loss.png")


def draw_confusion(path: Path, matrix: np.ndarray, names: Sequence[str]) -> Path | None:
    """Draws counts [C, C], true class by row; the colour is the share of the row."""
    if (plt := pyplot()) is None:
        return None
    C = len(names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.55 * min(C, 40)
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", xticks=range(C), yticks=range(C))
    axes.set_xticklabels(names, rotation=90)
    axes.set_yticklabels(names)
    for i, j in np.ndindex(C, C) if C <= 20 else ():
        colour = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", color=colour, fontsize=8)
    return _save(plt, figure, path)


def draw_attention(path: Path, tokens: Sequence[str], attention: np.ndarray) -> Path | None:
    """Draws attention probabilities [N, H, L, L], a map for each layer (row) and head (column)."""
    if (plt := pyplot()) is None:
        return None
    N, H, L, _ = attention.shape
    cell = 1.2 + 0.07 * L
    figure, grid = plt.subplots(
        N, H, figsize=(cell * H + 1, cell * N), squeeze=False, layout="constrained"
    )
    for n, h in np.ndindex(N, H):
        axes = grid[n, h]
        axes.imshow(attention[n, h], cmap="Blues", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        if n == 0:
            axes.set_title(f"head {h}", fontsize=7)
        if h == 0:
            axes.set_yticks(range(L), tokens, fontsize=5)
            axes.set_ylabel(f"layer {n}", fontsize=7)
        if n == N - 1:
            axes.set_xticks(range(L), tokens, fontsize=5, rotation=90)
    return _save(plt, figure, path)


def write_attention_html(path: Path, tokens: Sequence[str], attention: np.ndarray) -> Path:
    """Writes a self-contained page that shows what each token attends to, by layer and head.

    Args:
        tokens: L texts.
        attention: probabilities [N, H, L, L], of query by key.
    """
    # Colours show no more than three digits, which make the page a third of the size.
    values = np.rint(1000 * np.asarray(attention, np.float64)).astype(int).tolist()
    data = json.dumps({"tokens": list(tokens), "attention": values})
    # A "<" of a token must not end or open a tag.
    data = data.replace("<", "\\u003c")
    template = Path(__file__).with_name("attention.html").read_text(encoding="utf-8")
    with atomic_write(path) as partial:
        partial.write_text(template.replace("__DATA__", data), encoding="utf-8")
    return path

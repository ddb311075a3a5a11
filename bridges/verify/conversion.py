"""A conversion held to its input: both sides are run, from disk, on real tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import prelnroberta
from bridges.formats.checkpoint import Checkpoint
from bridges.formats.detect import open_checkpoint
from prelnroberta import params as parameters
from prelnroberta.errors import InputError
from prelnroberta.pretrained import hf_checkpoint

if TYPE_CHECKING:
    import tokenizers

TEXTS = (
    "The committee has not yet said when it will publish the results of its first inquiry.",
    "Rain is expected in the north, and later everywhere.",
    "No.",
)
# Where the weights are those of the input. What rounding to another precision may cost, its
# owner decides.
MOST_FLOAT64, MOST_FLOAT32 = 1e-6, 1e-4


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far an output is from its input, on tokens that are no padding.

    Attributes:
        weights: the largest difference of two weights.
        float64: the output's file against the input's, each in float64 by its own names.
        float32: the Flax model as users run it, against the same.
        tokens: how many were compared.

    The latter two are root mean squares of the difference over that of the expected values.
    """

    weights: float
    float64: float
    float32: float
    tokens: int


def compare(
    source: Checkpoint,
    tree: parameters.Tree,
    directory: Path,
    tokenizer: tokenizers.Tokenizer | None,
    exact: bool,
    head: str | None = None,
) -> Agreement:
    """Runs what was read and what was written.

    Args:
        tree: the source's.
        directory: of the output.
        exact: whether the output keeps the input's precision, so that nothing may differ.
        head: which head of the output is meant; None: as `open_checkpoint` has it.

    Raises:
        InputError: they are not the same function: the input is not what it seemed.
    """
    config, model = source.config, source.model
    ids = batch(config, tokenizer, model)
    real = ids != config.pad_token_id
    by_token = model not in ("sequence_classification", "multiple_choice", "base")
    where = real if by_token else np.ones(len(ids), bool)

    written = open_checkpoint(directory, head)
    back = written.tree()
    expected = source.original(model, ids)[where]
    agreement = Agreement(
        weights=_largest_difference(tree, back),
        float64=_relative(written.original(model, ids)[where], expected),
        float32=_relative(_flax(written, back, model, ids, real)[where], expected),
        tokens=int(real.sum()),
    )
    bounds = {"float64": MOST_FLOAT64, "float32": MOST_FLOAT32}
    over = [name for name, most in bounds.items() if not getattr(agreement, name) <= most]
    if exact and over:
        raise InputError(
            f"{source.source}: the result is another function (relative error in float64 "
            f"{agreement.float64:.1e}, in float32 {agreement.float32:.1e}): nothing was written; "
            "please report this file"
        )
    return agreement


def batch(config: Any, tokenizer: tokenizers.Tokenizer | None, model: str) -> np.ndarray:
    """ids [B, L]: a full row, one padded on the right, and where each token counts, the left."""
    L = min(24, config.max_length)
    if tokenizer is not None:
        rows = [np.array(tokenizer.encode(text).ids)[:L] for text in TEXTS]
    else:
        rng = np.random.default_rng(0)
        rows = [rng.integers(0, config.vocab_size, n) for n in (L, max(1, L // 2), max(1, L // 4))]
        rows = [row[row != config.pad_token_id] for row in rows]
    ids = np.full((len(rows), L), config.pad_token_id)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    by_token = model not in ("sequence_classification", "multiple_choice", "base")
    if by_token and not config.is_decoder:
        ids[-1] = np.roll(ids[-1], L - len(rows[-1]))
    return ids


def _flax(
    written: Checkpoint, tree: parameters.Tree, model: str, ids: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """The output of the class that users load, float32."""
    options = {"add_pooling_layer": False} if model == "encoder" else {}
    cls = getattr(prelnroberta, "Flax" + hf_checkpoint.ARCHITECTURES[model])
    flax_model = cls(written.config, _do_init=False, **options)
    flax_model.params = tree
    if model == "multiple_choice":
        ids, mask = ids[:, None], mask[:, None]
    with jax.default_matmul_precision("highest"):
        output = flax_model(ids, attention_mask=mask.astype(np.int32))
    if model == "encoder":
        return np.asarray(output.last_hidden_state)
    if model == "base":
        return np.asarray(output.pooler_output)
    if model == "question_answering":
        return np.stack([output.start_logits, output.end_logits], axis=-1)
    return np.asarray(output.logits)


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    difference = np.float64(found) - expected
    return float(np.sqrt(np.mean(difference**2) / np.mean(expected**2)))


def _largest_difference(a: parameters.Tree, b: parameters.Tree) -> float:
    a, b = _effective(a), _effective(b)
    return max(float(np.abs(np.float64(a[path]) - b[path]).max()) for path in a)


def _effective(tree: parameters.Tree) -> dict[str, np.ndarray]:
    """The leaves, token type 0 folded into the positions, as fairseq has it."""
    leaves = parameters.flatten(tree)
    row = np.float64(leaves.pop("embeddings/token_type"))[0]
    return {**leaves, "embeddings/position": leaves["embeddings/position"] + row}

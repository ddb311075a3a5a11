"""Verifies a conversion: reads both files from disk and runs them on the same tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import prelnroberta
from bridges.formats.detect import open_checkpoint
from bridges.formats.foreign_checkpoint import Checkpoint
from bridges.verify.float64_reference import Float64Reference
from prelnroberta import params as parameters
from prelnroberta.config import ARCHITECTURES
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers

TEXTS = (
    "The committee has not yet said when it will publish the results of its first inquiry.",
    "Rain is expected in the north, and later everywhere.",
    "No.",
)
# Bounds for outputs with the weights of the input. With another precision there is no bound: its
# cost is the user's decision.
MAX_FLOAT64_ERROR, MAX_FLOAT32_ERROR = 1e-6, 1e-4
_ONE_OUTPUT_PER_ROW = ("sequence_classification", "multiple_choice", "base")


@dataclasses.dataclass(frozen=True)
class ConversionErrors:
    """Differences between the output and the input of a conversion, padding left out.

    Attributes:
        weights: largest absolute difference of two weights.
        float64: both files in float64, each by its own tensor names.
        float32: the Flax model that users load, in float32, against the input in float64.
        num_tokens: number of tokens compared.

    `float64` and `float32` are the rms of the difference over the rms of the expected values.
    """

    weights: float
    float64: float
    float32: float
    num_tokens: int


def verify_conversion(
    source: Checkpoint,
    params: parameters.Tree,
    directory: Path,
    tokenizer: tokenizers.Tokenizer | None,
    exact: bool,
    head: str | None = None,
) -> ConversionErrors:
    """Runs the input of a conversion and the files that it wrote.

    Args:
        source: the input.
        params: parameter tree of `source`.
        directory: folder of the output.
        tokenizer: makes the tokens; None: they are random.
        exact: whether the output keeps the precision of the input. If so, the errors are bounded.
        head: head of the output, as in `open_checkpoint`.

    Raises:
        InputError: the two are not the same function.
    """
    config, model = source.config, source.model
    ids = make_ids(config, tokenizer, model)
    mask = ids != config.pad_token_id
    compared = np.ones(len(ids), bool) if model in _ONE_OUTPUT_PER_ROW else mask

    written = open_checkpoint(directory, head)
    written_params = written.to_params()
    expected = Float64Reference(source.original)(model, ids)[compared]
    float64_output = Float64Reference(written.original)(model, ids)[compared]
    float32_output = _run_flax(written, written_params, model, ids, mask)[compared]
    errors = ConversionErrors(
        weights=_max_difference(params, written_params),
        float64=_relative_rms(float64_output, expected),
        float32=_relative_rms(float32_output, expected),
        num_tokens=int(mask.sum()),
    )
    # A NaN fails, too.
    passed = errors.float64 <= MAX_FLOAT64_ERROR and errors.float32 <= MAX_FLOAT32_ERROR
    if exact and not passed:
        raise InputError(
            f"{source.path}: the result is another function (relative error in float64 "
            f"{errors.float64:.1e}, in float32 {errors.float32:.1e}): nothing was written; "
            "please report this file"
        )
    return errors


def make_ids(config: Any, tokenizer: tokenizers.Tokenizer | None, model: str) -> np.ndarray:
    """ids [B, L] of three rows: full, padded on the right, and padded on the left.

    For a decoder or a model with one output per row, all padding is on the right.
    """
    L = min(24, config.max_length)
    if tokenizer is not None:
        rows = [np.array(tokenizer.encode(text).ids)[:L] for text in TEXTS]
    else:
        rng = np.random.default_rng(0)
        rows = [rng.integers(0, config.vocab_size, n) for n in (L, max(1, L // 2), max(1, L // 4))]
        rows = [row[row != config.pad_token_id] for row in rows]
    ids = np.full((len(rows), L), config.pad_token_id)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    if model not in _ONE_OUTPUT_PER_ROW and not config.is_decoder:
        ids[-1] = np.roll(ids[-1], L - len(rows[-1]))
    return ids


def _run_flax(
    written: Checkpoint, params: parameters.Tree, model: str, ids: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """The output of the public class, in float32, in the layout of `Float64Reference`."""
    options = {"add_pooling_layer": False} if model == "encoder" else {}
    cls = getattr(prelnroberta, "Flax" + ARCHITECTURES[model])
    flax_model = cls(written.config, _do_init=False, **options)
    flax_model.params = params
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


def _relative_rms(output: np.ndarray, expected: np.ndarray) -> float:
    difference = np.float64(output) - expected
    return float(np.sqrt(np.mean(difference**2) / np.mean(expected**2)))


def _max_difference(a: parameters.Tree, b: parameters.Tree) -> float:
    a, b = _fold_token_type(a), _fold_token_type(b)
    return max(float(np.abs(np.float64(a[path]) - b[path]).max()) for path in a)


def _fold_token_type(params: parameters.Tree) -> dict[str, np.ndarray]:
    """The leaves with token type 0 added to the positions, as fairseq stores them."""
    leaves = parameters.flatten(params)
    row = np.float64(leaves.pop("embeddings/token_type"))[0]
    return {**leaves, "embeddings/position": leaves["embeddings/position"] + row}

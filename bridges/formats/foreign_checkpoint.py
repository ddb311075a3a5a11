"""`Checkpoint`: the common result of reading any foreign format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.pretrained import hf_checkpoint

FLOAT_DTYPES = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))


@dataclasses.dataclass(frozen=True)
class OriginalModel:
    """The model under the names of its file: all that `Float64Reference` needs to run it.

    Attributes:
        tensors: by the file's own names; anything that numpy can read.
        naming: "fairseq" or "transformers", the scheme of these names.
        num_heads: attention heads.
        layer_norm_eps: epsilon of every LayerNorm.
        hidden_act: activation of the MLP, by the file's name for it.
        lm_head_act: activation of the LM head.
        pad_token_id: id of padding.
        is_causal: whether each token attends only to itself and earlier ones.
        head: name of the classification head to run.
    """

    tensors: Mapping[str, Any]
    naming: str
    num_heads: int
    layer_norm_eps: float
    hidden_act: str
    lm_head_act: str = "gelu"
    pad_token_id: int = 1
    is_causal: bool = False
    head: str | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as found on disk, with its tensors under transformers' names.

    Attributes:
        format: description of the format.
        path: file that was read.
        tensors: by transformers' names; data is read on use.
        config: None if the file does not determine one.
        model: one of `params.MODELS`.
        heads: every head in the file, by the file's names.
        norms: description of its LayerNorms: where and how many.
        dropped: descriptions of what the conversion leaves out.
        notes: descriptions of what else the user should know.
        problems: reasons why it is not this model or cannot be read; empty if it can be converted.
        original: the same model under the file's own names; None if it cannot be run.
    """

    format: str
    path: Path
    tensors: Mapping[str, Any]
    config: RobertaPreLayerNormConfig | None
    model: str
    heads: tuple[str, ...]
    norms: str
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    original: OriginalModel | None = None

    @property
    def dtype_counts(self) -> dict[str, int]:
        """Number of elements stored in each dtype."""
        counts: dict[str, int] = {}
        for value in self.tensors.values():
            counts[str(value.dtype)] = counts.get(str(value.dtype), 0) + math.prod(value.shape)
        return counts

    @property
    def stored_dtype(self) -> str:
        """The narrowest of float32, float16 and bfloat16 that holds all its tensors exactly."""
        floats = {name for name in self.dtype_counts if np.dtype(name) in FLOAT_DTYPES}
        return floats.pop() if floats in ({"float16"}, {"bfloat16"}) else "float32"

    def to_params(self) -> parameters.Tree:
        """Returns the parameter tree, in float32 numpy.

        Raises:
            InputError: all of `problems` in one message; a tensor that is missing, unexpected,
                of the wrong shape or not finite.
        """
        if self.problems:
            raise InputError(f"{self.path}: " + "; ".join(self.problems))
        if bad := [n for n, v in self.tensors.items() if np.dtype(v.dtype) not in FLOAT_DTYPES]:
            raise InputError(f"{self.path}: {shorten_list(bad)} quantized or not weights at all")
        return hf_checkpoint.from_state_dict(self.tensors, self.config, self.model, str(self.path))


def shorten_list(names: Iterable[str], limit: int = 4) -> str:
    """Joins the first `limit` of the sorted names and counts the rest."""
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def count_layers(names: Iterable[str], prefix: str) -> int:
    """Counts the distinct layer numbers N among names that begin with `{prefix}N.`."""
    suffixes = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return len({n for n, _, _ in (suffix.partition(".") for suffix in suffixes) if n.isdecimal()})

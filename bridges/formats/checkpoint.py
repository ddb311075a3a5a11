"""What a foreign checkpoint holds, whatever its form: the common ground of readers and writers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bridges.verify.float64_reference import Original
from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.pretrained import hf_checkpoint

FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was found, and as transformers would name it.

    Attributes:
        form: in words, for the reader of a report.
        source: its file.
        state: tensors by transformers' names; read when they are used.
        config: None where the file does not say enough to make one.
        model: of `params.MODELS`.
        heads: all that stands on the encoder, by the file's names.
        norms: how many LayerNorms of which kind, in words.
        dropped: in words, what of the file has no place here.
        remarks: in words, what the owner should know.
        problems: why it is not this model, or cannot be read. Empty: it can be converted.
        original: the same model by the file's own names, where its maths can be run.
    """

    form: str
    source: Path
    state: Mapping[str, Any]
    config: RobertaPreLayerNormConfig | None
    model: str
    heads: tuple[str, ...]
    norms: str
    dropped: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    original: Original | None = None

    @property
    def dtypes(self) -> dict[str, int]:
        """Numbers stored in each dtype."""
        counts: dict[str, int] = {}
        for value in self.state.values():
            counts[str(value.dtype)] = counts.get(str(value.dtype), 0) + math.prod(value.shape)
        return counts

    @property
    def stored_dtype(self) -> str:
        """The narrowest of float32, float16 and bfloat16 that holds all its tensors exactly."""
        found = {name for name in self.dtypes if np.dtype(name) in FLOATS}
        return found.pop() if found in ({"float16"}, {"bfloat16"}) else "float32"

    def tree(self) -> parameters.Tree:
        """The parameter tree, float32 numpy.

        Raises:
            InputError: what `problems` lists, all at once; a tensor that is missing, unexpected,
                mis-shaped or not finite.
        """
        if self.problems:
            raise InputError(f"{self.source}: " + "; ".join(self.problems))
        if strange := [n for n, v in self.state.items() if np.dtype(v.dtype) not in FLOATS]:
            raise InputError(f"{self.source}: {some(strange)} quantized or not weights at all")
        return hf_checkpoint.from_tensors(self.state, self.config, self.model, str(self.source))


def some(names: Iterable[str], most: int = 4) -> str:
    """A list that stays a line."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def count_layers(names: Iterable[str], before: str) -> int:
    """How many N there are of names `{before}N.`."""
    after = (name.removeprefix(before) for name in names if name.startswith(before))
    return len({n for n, _, _ in (rest.partition(".") for rest in after) if n.isdecimal()})

"""Options of `generate`, with the names and meanings of transformers' `GenerationConfig`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from prelnroberta.errors import InputError

DEFAULT_NEW_TOKENS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue a prompt; names and meanings as in transformers' `GenerationConfig`.

    Attributes:
        max_new_tokens: G, the maximum number of new tokens per row.
        max_length: the same limit including the L columns of the prompt, pads included. Set at
            most one of the two; if neither is set, 20 new tokens.
        min_new_tokens: the minimum number of new tokens before a row may end.
        min_length: the same minimum including the L columns of the prompt. Set at most one of the
            two.
        eos_token_id: the id or ids that end a row; None: rows end only at their maximum length.
        pad_token_id: fills a row after its end.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that
            the row already contains, prompt included, pads excluded (arXiv:1909.05858). With
            beams it applies to log-probabilities. 1: no penalty.
        do_sample: sample tokens; otherwise take the most likely one, the lowest id among equals.
        temperature: divides the logits, before top_k and top_p.
        top_k: sample among the k most likely tokens and those equal to the k-th. None: all.
        top_p: of those, sample among the smallest set with at least this probability. 1: all.
        num_beams: W. 1: no beam search. Beams cannot be sampled.
        length_penalty: the score of a finished sequence is its log-probability divided by its
            number of new tokens (including the end) to this power.
        early_stopping: when the beam search of a row ends. True: as soon as W sequences are
            finished. False: when the best running beam, if it ended now, would not beat the worst
            of W finished ones. "never": when no running beam can beat it at any length.
        num_return_sequences: the number of samples, or of best beams, returned per prompt.

    Raises:
        InputError: naming the field, its value and what was expected.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int = 1
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("max_new_tokens", "max_length", "top_k"):
            value = getattr(self, name)
            self._require(value is None or _is_int(value, 1), name, "an int > 0, or None")
        for name in ("min_new_tokens", "min_length"):
            value = getattr(self, name)
            self._require(value is None or _is_int(value, 0), name, "an int >= 0, or None")
        for name in ("num_beams", "num_return_sequences"):
            self._require(_is_int(getattr(self, name), 1), name, "an int > 0")
        for name in ("repetition_penalty", "temperature"):
            value = getattr(self, name)
            self._require(_is_number(value) and value > 0, name, "a number > 0")
        valid = _is_number(self.top_p) and 0 < self.top_p <= 1
        self._require(valid, "top_p", "a number in (0, 1]")
        self._require(_is_number(self.length_penalty), "length_penalty", "a number")
        self._require(isinstance(self.do_sample, bool), "do_sample", "true or false")
        valid = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        self._require(valid, "early_stopping", "true, false or 'never'")
        self._require(_is_int(self.pad_token_id, 0), "pad_token_id", "an id >= 0")
        valid = all(_is_int(token, 0) for token in self.eos_token_ids)
        self._require(valid, "eos_token_id", "an id >= 0, several ids, or None")
        self._require_consistent()

    def _require_consistent(self) -> None:
        """Rejects options that contradict each other and options that would have no effect."""
        for name, other in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            valid = getattr(self, name) is None or getattr(self, other) is None
            self._require(valid, name, f"None because {other}={getattr(self, other)} is set")
        for field in dataclasses.fields(self):
            if field.name in ("temperature", "top_k", "top_p"):
                used, condition = self.do_sample, "do_sample is true"
            elif field.name in ("length_penalty", "early_stopping"):
                used, condition = self.num_beams > 1, "num_beams is more than 1"
            else:
                continue
            valid = used or getattr(self, field.name) == field.default
            self._require(valid, field.name, f"{field.default} unless {condition}")
        if self.do_sample:
            self._require(self.num_beams == 1, "num_beams", "1: beams are not sampled")
        else:
            valid = self.num_return_sequences <= self.num_beams
            expected = f"at most num_beams={self.num_beams} unless do_sample is true"
            self._require(valid, "num_return_sequences", expected)

    def _require(self, valid: bool, field: str, expected: str) -> None:
        if not valid:
            raise InputError(f"generation: {field}={getattr(self, field)!r}, expected {expected}")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a row, as a tuple; empty if eos_token_id is None."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    def new_token_bounds(self, prompt_length: int) -> tuple[int, int]:
        """(minimum, maximum) number of new tokens after a prompt of L columns.

        Raises:
            InputError: if max_length leaves no room after the prompt, or the minimum exceeds the
                maximum.
        """
        maximum = self.max_new_tokens or DEFAULT_NEW_TOKENS
        if self.max_length is not None:
            maximum = self.max_length - prompt_length
            expected = f"more than the {prompt_length} columns of the prompt"
            self._require(maximum > 0, "max_length", expected)
        minimum = self.min_new_tokens or max(0, (self.min_length or 0) - prompt_length)
        field = "min_new_tokens" if self.min_length is None else "min_length"
        expected = (
            f"no more than the {maximum} new tokens allowed after {prompt_length} prompt columns"
        )
        self._require(minimum <= maximum, field, expected)
        return minimum, maximum


def _is_int(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

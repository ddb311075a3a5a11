"""What can be asked of `generate`: names and meanings of transformers' `GenerationConfig`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from prelnroberta.errors import InputError

DEFAULT_NEW_TOKENS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How to continue a prompt. Names and meanings of transformers' `GenerationConfig`.

    Attributes:
        max_new_tokens: G, the most tokens a row is continued by.
        max_length: the same, counted with the L columns of the prompt, pads included. At most one
            of the two; without either, 20 new tokens.
        min_new_tokens: no end before so many new tokens.
        min_length: the same, counted with the L columns of the prompt. At most one of the two.
        eos_token_id: the id or ids that end a row; None: rows end at their greatest length only.
        pad_token_id: fills a row after its end.
        repetition_penalty: divides the positive, multiplies the negative logits of tokens that
            the row already holds, prompt included, pads excluded (arXiv:1909.05858). For beams it
            is log-probabilities that are penalised. 1: none.
        do_sample: draw tokens; otherwise take the most likely one, the lowest id among equals.
        temperature: divides the logits, before top_k and top_p.
        top_k: draw among the k most likely tokens, and those equal to the k-th. None: all.
        top_p: of those, draw among the smallest set with at least this probability. 1: all.
        num_beams: W. 1: no beam search. Beams are not sampled.
        length_penalty: a finished sequence's score is its log-probability over its number of new
            tokens (its end included) to this power.
        early_stopping: when a row's beam search is over. True: when W sequences have ended.
            False: when the best running one, were it to end now, would not beat the worst of W
            ended ones. "never": when no running one can, at whatever length.
        num_return_sequences: how many samples, or best beams, a row returns.

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
            self._require(value is None or _is_count(value, 1), name, "an int > 0, or None")
        for name in ("min_new_tokens", "min_length"):
            value = getattr(self, name)
            self._require(value is None or _is_count(value, 0), name, "an int >= 0, or None")
        for name in ("num_beams", "num_return_sequences"):
            self._require(_is_count(getattr(self, name), 1), name, "an int > 0")
        for name in ("repetition_penalty", "temperature"):
            value = getattr(self, name)
            self._require(_is_number(value) and value > 0, name, "a number > 0")
        valid = _is_number(self.top_p) and 0 < self.top_p <= 1
        self._require(valid, "top_p", "a number in (0, 1]")
        self._require(_is_number(self.length_penalty), "length_penalty", "a number")
        self._require(isinstance(self.do_sample, bool), "do_sample", "true or false")
        valid = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        self._require(valid, "early_stopping", "true, false or 'never'")
        self._require(_is_count(self.pad_token_id, 0), "pad_token_id", "an id >= 0")
        valid = all(_is_count(token, 0) for token in self.eos_ids)
        self._require(valid, "eos_token_id", "an id >= 0, several, or None")
        self._require_consistent()

    def _require_consistent(self) -> None:
        """Refuses what contradicts itself, and what would silently do nothing."""
        for name, twin in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            once = getattr(self, name) is None or getattr(self, twin) is None
            self._require(once, name, f"None when {twin}={getattr(self, twin)} says the same")
        for field in dataclasses.fields(self):
            if field.name in ("temperature", "top_k", "top_p"):
                used, needed = self.do_sample, "do_sample is true"
            elif field.name in ("length_penalty", "early_stopping"):
                used, needed = self.num_beams > 1, "num_beams is more than 1"
            else:
                continue
            holds = used or getattr(self, field.name) == field.default
            self._require(holds, field.name, f"{field.default} unless {needed}")
        if self.do_sample:
            self._require(self.num_beams == 1, "num_beams", "1: beams are not sampled")
        else:
            within = self.num_return_sequences <= self.num_beams
            expected = f"at most num_beams={self.num_beams} unless do_sample is true"
            self._require(within, "num_return_sequences", expected)

    def _require(self, holds: bool, field: str, expected: str) -> None:
        if not holds:
            raise InputError(f"generation: {field}={getattr(self, field)!r}, expected {expected}")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a row: none, one or several."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    def new_tokens(self, prompt_columns: int) -> tuple[int, int]:
        """(least, most) new tokens after a prompt of L columns.

        Raises:
            InputError: when a bound counted with the prompt leaves no room, or they cross.
        """
        most = self.max_new_tokens or DEFAULT_NEW_TOKENS
        if self.max_length is not None:
            most = self.max_length - prompt_columns
            room = f"more than the {prompt_columns} columns of the prompt"
            self._require(most > 0, "max_length", room)
        least = self.min_new_tokens or max(0, (self.min_length or 0) - prompt_columns)
        bound = "min_new_tokens" if self.min_length is None else "min_length"
        within = f"no more than the {most} new tokens allowed after {prompt_columns} prompt columns"
        self._require(least <= most, bound, within)
        return least, most


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

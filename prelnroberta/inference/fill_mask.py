"""Fills `<mask>` in text: the masked language model as people try it first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.data.tokenizer import MASK_TOKEN
from prelnroberta.errors import InputError
from prelnroberta.model.encoder import Execution
from prelnroberta.model.heads import MaskedLM
from prelnroberta.params import Tree

if TYPE_CHECKING:
    import tokenizers


@dataclasses.dataclass(frozen=True)
class Guess:
    """One candidate for a mask: its text (with the leading space, if any), id and probability."""

    text: str
    id: int
    probability: float


class FillMask:
    """Guesses what stands behind each `<mask>` of a text.

    Args:
        params, config: of a masked language model.
        tokenizer: its own, with `<mask>` as the last id.
        execution: how to compute.

    Raises:
        InputError: where the tokenizer is not the model's.
    """

    def __init__(
        self,
        params: Tree,
        config: RobertaPreLayerNormConfig,
        tokenizer: tokenizers.Tokenizer,
        execution: Execution | None = None,
    ):
        if tokenizer.get_vocab_size() != config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model "
                f"{config.vocab_size}: they do not belong together"
            )
        self._config = config
        self._tokenizer = tokenizer
        self._mask_id = tokenizer.token_to_id(MASK_TOKEN)
        self._module = MaskedLM(config, execution or Execution())
        self._params = self._module.execution.params_for_inference(params)

    def __call__(
        self, texts: Iterable[str], top_k: int = 5, batch_size: int = 32
    ) -> Iterator[list[list[Guess]]]:
        """For each text, for each of its masks, the `top_k` likeliest tokens, likeliest first.

        Masks of one text are guessed independently. Streams: reads `batch_size` texts at a time,
        so that any number of texts takes the same memory.

        Raises:
            InputError: a text without a mask, or longer than the model's positions, by number.
        """
        numbered = enumerate(texts, 1)
        while chunk := list(itertools.islice(numbered, batch_size)):
            yield from self._fill([self._encode(*item) for item in chunk], top_k)

    def problem(self, text: str) -> str | None:
        """Why a text cannot be filled, in words; None if it can."""
        ids = self._tokenizer.encode(text).ids
        if self._mask_id not in ids:
            return f"has no {MASK_TOKEN} to fill: {text[:60]!r}"
        try:
            self._config.check_length(len(ids), f"{text[:40]!r}...")
        except InputError as error:
            return str(error)
        return None

    def _encode(self, number: int, text: str) -> list[int]:
        if problem := self.problem(text):
            raise InputError(f"text {number}: {problem}")
        return self._tokenizer.encode(text).ids

    def _fill(self, rows: list[list[int]], top_k: int) -> list[list[list[Guess]]]:
        # Shapes grow by doubling, so that any stream of texts compiles only a handful.
        L = min(_doubled(max(map(len, rows))), self._config.max_length)
        M = _doubled(max(row.count(self._mask_id) for row in rows))
        ids = np.full((_doubled(len(rows)), L), self._config.pad_token_id, np.int32)
        positions = np.zeros((len(ids), M), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            places = np.flatnonzero(ids[i] == self._mask_id)
            positions[i, : len(places)] = places
        top_k = min(top_k, self._config.vocab_size)
        probabilities, tokens = jax.device_get(
            _guess(self._module, top_k, self._params, ids, positions)
        )
        return [
            [
                [
                    Guess(self._tokenizer.decode([token], skip_special_tokens=False), token, p)
                    for token, p in zip(
                        tokens[i, m].tolist(), probabilities[i, m].tolist(), strict=True
                    )
                ]
                for m in range(row.count(self._mask_id))
            ]
            for i, row in enumerate(rows)
        ]


@partial(jax.jit, static_argnums=(0, 1))
def _guess(
    module: MaskedLM, top_k: int, params: Tree, ids: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Probabilities and ids [B, M, top_k] at the masked positions [B, M] of ids [B, L]."""
    logits, _ = module.apply(
        {"params": params},
        ids,
        attention_mask=ids != module.config.pad_token_id,
        read_positions=positions,
    )
    return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)


def _doubled(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()

"""Predicts the tokens behind `<mask>` in text."""

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
class MaskPrediction:
    """One candidate for a mask.

    Attributes:
        text: the token as text, including its leading space if it has one.
        id: its id in the vocabulary.
        probability: of the token at this mask.
    """

    text: str
    id: int
    probability: float


class FillMask:
    """Predicts the token behind each `<mask>` of a text.

    Args:
        params, config: of a masked language model.
        tokenizer: the tokenizer of that model.
        execution: dtype, attention kernel and other options of the computation.

    Raises:
        InputError: if the sizes of the tokenizer and of the model's vocabulary differ.
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
    ) -> Iterator[list[list[MaskPrediction]]]:
        """Yields per text, per mask, the `top_k` most likely tokens, most likely first.

        The masks of one text are predicted independently. Reads `batch_size` texts at a time, so
        memory does not grow with the number of texts.

        Raises:
            InputError: naming the number of a text that has no mask or is too long for the model.
        """
        numbered = enumerate(texts, 1)
        while chunk := list(itertools.islice(numbered, batch_size)):
            yield from self._fill([self._encode(*item) for item in chunk], top_k)

    def find_problem(self, text: str) -> str | None:
        """The reason why a text cannot be filled, for messages; None if it can."""
        ids = self._tokenizer.encode(text).ids
        if self._mask_id not in ids:
            return f"has no {MASK_TOKEN} to fill: {text[:60]!r}"
        try:
            self._config.check_length(len(ids), f"{text[:40]!r}...")
        except InputError as error:
            return str(error)
        return None

    def _encode(self, number: int, text: str) -> list[int]:
        if problem := self.find_problem(text):
            raise InputError(f"text {number}: {problem}")
        return self._tokenizer.encode(text).ids

    def _fill(self, texts: list[list[int]], top_k: int) -> list[list[list[MaskPrediction]]]:
        # Sizes are powers of two, so that few shapes are compiled.
        L = min(_next_power_of_two(max(map(len, texts))), self._config.max_length)
        M = _next_power_of_two(max(row.count(self._mask_id) for row in texts))
        ids = np.full((_next_power_of_two(len(texts)), L), self._config.pad_token_id, np.int32)
        positions = np.zeros((len(ids), M), np.int32)
        for i, row in enumerate(texts):
            ids[i, : len(row)] = row
            masks = np.flatnonzero(ids[i] == self._mask_id)
            positions[i, : len(masks)] = masks
        top_k = min(top_k, self._config.vocab_size)
        probabilities, tokens = jax.device_get(
            _predict(self._module, top_k, self._params, ids, positions)
        )
        return [
            [
                self._predictions(tokens[i, m].tolist(), probabilities[i, m].tolist())
                for m in range(row.count(self._mask_id))
            ]
            for i, row in enumerate(texts)
        ]

    def _predictions(self, tokens: list[int], probabilities: list[float]) -> list[MaskPrediction]:
        return [
            MaskPrediction(self._tokenizer.decode([token], skip_special_tokens=False), token, p)
            for token, p in zip(tokens, probabilities, strict=True)
        ]


@partial(jax.jit, static_argnums=(0, 1))
def _predict(
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


def _next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()

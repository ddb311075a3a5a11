"""Outputs of the Flax* classes: pytrees that index like transformers' `ModelOutput`.

Fields are accessed by attribute, name, number or slice; numbers skip fields that are None.
Iteration, `keys`, `items` and `**output` work as for a dict, `to_tuple` gives a tuple
(transformers/utils/generic.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import flax.struct
import jax

from prelnroberta.model.kv_cache import KVCache

Array = jax.Array
Arrays = tuple[Array, ...]


class ModelOutput:
    """Base class of all outputs: access to fields as in transformers."""

    def items(self) -> list[tuple[str, Any]]:
        """(name, value) of the fields that are not None, in order."""
        pairs = [
            (field.name, getattr(self, field.name)) for field in dataclasses.fields(cast(Any, self))
        ]
        return [(name, value) for name, value in pairs if value is not None]

    def keys(self) -> list[str]:
        return [name for name, _ in self.items()]

    def values(self) -> list[Any]:
        return [value for _, value in self.items()]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.items()).get(name, default)

    def __getitem__(self, key: int | slice | str) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.items())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()


@flax.struct.dataclass
class BaseModelOutput(ModelOutput):
    """Output of the model without a head.

    Attributes:
        last_hidden_state: [B, L, D], after the final norm.
        pooler_output: [B, D]; None without a pooler.
        past_key_values: the updated cache, if one was given.
        hidden_states: N + 1 arrays [B, L, D]: the embeddings and the residual stream after each
            block. The last one is last_hidden_state if config.tie_last_hidden_states, otherwise
            the stream before the final norm.
        attentions: N arrays [B, H, L, T], the probabilities after dropout and head_mask.
        cross_attentions: N arrays [B, H, L, S].
    """

    last_hidden_state: Array | None = None
    pooler_output: Array | None = None
    past_key_values: KVCache | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None
    cross_attentions: Arrays | None = None


@flax.struct.dataclass
class CausalLMOutput(ModelOutput):
    """loss [] float32, if labels are given; logits [B, L, V]; the rest as in `BaseModelOutput`."""

    loss: Array | None = None
    logits: Array | None = None
    past_key_values: KVCache | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None
    cross_attentions: Arrays | None = None


@flax.struct.dataclass
class HeadOutput(ModelOutput):
    """loss [] float32, if labels are given; logits; the rest as in `BaseModelOutput`.

    Logits are [B, L, V] for masked LM, [B, C] for sequence classification, [B, A] for multiple
    choice and [B, L, C] for token classification.
    """

    loss: Array | None = None
    logits: Array | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None


@flax.struct.dataclass
class QuestionAnsweringOutput(ModelOutput):
    """loss [] float32, if positions are given; start_logits and end_logits [B, L]."""

    loss: Array | None = None
    start_logits: Array | None = None
    end_logits: Array | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None

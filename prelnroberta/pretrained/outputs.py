"""What the Flax* classes return: pytrees that also index as transformers' `ModelOutput` does.

By attribute, by name, by number or slice; numbers skip what is None. Iteration, `keys`, `items`
and `**output` are a dict's, `to_tuple` a tuple's (transformers/utils/generic.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax

from prelnroberta.model.kv_cache import KVCache

Array = jax.Array
Arrays = tuple[Array, ...]


class Output:
    """The access that all outputs share."""

    def items(self) -> list[tuple[str, Any]]:
        """(name, value) of the fields that are not None, in order."""
        pairs = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
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
class BaseModelOutput(Output):
    """Of the model without a head.

    Attributes:
        last_hidden_state: [B, L, D], after the final norm.
        pooler_output: [B, D]; None without a pooler.
        past_key_values: the cache, if one was given.
        hidden_states: N + 1 arrays [B, L, D]: the embeddings and the stream after each block. The
            last one is last_hidden_state under `tie_last_hidden_states`, else before its norm.
        attentions: N arrays [B, H, L, T], the probabilities used.
        cross_attentions: N arrays [B, H, L, S].
    """

    last_hidden_state: Array | None = None
    pooler_output: Array | None = None
    past_key_values: KVCache | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None
    cross_attentions: Arrays | None = None


@flax.struct.dataclass
class CausalLMOutput(Output):
    """loss [] float32, given labels; logits [B, L, V]; the rest as in `BaseModelOutput`."""

    loss: Array | None = None
    logits: Array | None = None
    past_key_values: KVCache | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None
    cross_attentions: Arrays | None = None


@flax.struct.dataclass
class HeadOutput(Output):
    """Of masked-LM [B, L, V], sequence [B, C], choice [B, C] and token [B, L, C] logits."""

    loss: Array | None = None
    logits: Array | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None


@flax.struct.dataclass
class QuestionAnsweringOutput(Output):
    """loss [] float32, given positions; start_logits and end_logits [B, L]."""

    loss: Array | None = None
    start_logits: Array | None = None
    end_logits: Array | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None

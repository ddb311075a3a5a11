"""Output of the TF* classes: a dict that can also be read by attribute and by number.

One class serves all seven, because TensorFlow and Keras rebuild structures (from `tf.function`,
`predict` and functional models) by class and keys alone.
"""

from __future__ import annotations

from typing import Any

import optree

# The order of transformers, for access by number: tf.function returns dicts sorted by name.
FIELDS = (
    "loss",
    "logits",
    "start_logits",
    "end_logits",
    "last_hidden_state",
    "pooler_output",
    "past_key_values",
    "hidden_states",
    "attentions",
    "cross_attentions",
)


class ModelOutput(dict):
    """Those of `FIELDS` that are not None; shapes as in `prelnroberta/pretrained/outputs.py`.

    A missing field is None by attribute and a KeyError by name; numbers and slices skip it.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in FIELDS:
            raise AttributeError(f"ModelOutput has no field {name!r}, expected one of {FIELDS}")
        return self.get(name)

    def __getitem__(self, key: int | slice | str) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self[name] for name in FIELDS if name in self)

    # Registration as a pytree of Keras.

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[str, ...]]:
        names = tuple(sorted(self))
        return tuple(self[name] for name in names), names, names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: tuple[Any, ...]) -> ModelOutput:
        return cls(zip(names, values, strict=True))


optree.register_pytree_node_class(ModelOutput, namespace="keras")


def make_output(**fields: Any) -> ModelOutput:
    """A ModelOutput of the fields that are not None."""
    return ModelOutput({name: value for name, value in fields.items() if value is not None})

"""What the TF* classes return: a dict that is also read by attribute and by number.

One class serves all seven, because TensorFlow and Keras rebuild structures (out of `tf.function`,
`predict`, functional models) by class and keys alone.
"""

from __future__ import annotations

from typing import Any

import optree

# In transformers' order, which numbers follow: tf.function returns dicts sorted by name.
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


class Output(dict):
    """Fields of `FIELDS`, those that are not None; their shapes are those of
    `prelnroberta/pretrained/outputs.py`.

    By attribute an absent field is None, by name a KeyError; numbers and slices skip it.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in FIELDS:
            raise AttributeError(f"Output has no field {name!r}, expected one of {FIELDS}")
        return self.get(name)

    def __getitem__(self, key: int | slice | str) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self[name] for name in FIELDS if name in self)

    # How Keras takes it apart and puts it together.

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[str, ...]]:
        names = tuple(sorted(self))
        return tuple(self[name] for name in names), names, names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: tuple[Any, ...]) -> Output:
        return cls(zip(names, values, strict=True))


optree.register_pytree_node_class(Output, namespace="keras")


def output(**fields: Any) -> Output:
    """An Output of the fields that are not None."""
    return Output({name: value for name, value in fields.items() if value is not None})

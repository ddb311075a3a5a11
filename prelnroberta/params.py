"""The parameter table: every weight of the model, declared once.

A row gives a path its shape in letters, its initial value and its kind. The model's `init`, the
strict tree check, the optimizer's decay mask, the shardings and the name tables of other
frameworks all read it. The letters are also the logical axes: a sharding rule maps a letter to
mesh axes.

Shape letters. A letter means the same everywhere in this repository: in this table, in docstrings
such as [B, L, D], in `constrain(x, "BLD")`, and in lower case in einsums.

    B  batch: examples               D  hidden size
    R  rows decoded or packed        E  hidden size, second axis of a D x D matrix
    W  beams of an example           F  MLP size
    A  answer choices of a question  H  attention heads
    Q  sequences packed into a row   K  size of a head
    L  length: positions of a row    N  layers
    M  positions that are read       P  rows of the position table
    T  key positions (L, or cached)  V  vocabulary
    S  encoder states (source)       Y  token types
    G  generated tokens              C  classes (num_labels)
    U  tokens of an uncut stream     1  a single number

A row (R) is what the model computes: beams or returned sequences of B prompts, or B examples
packed into fewer rows. Layers are always stacked on a leading N axis, whether they are run by a
scan or unrolled.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table.

    Attributes:
        shape: shape letters, one per dimension.
        init: initial value. normal: N(0, initializer_range); embedding: the same with a zero pad
            row.
        kind: how the optimizer treats it.
    """

    shape: str
    init: Literal["normal", "embedding", "zeros", "ones"]
    kind: Literal["kernel", "embedding", "bias", "norm"]

    @property
    def is_stacked(self) -> bool:
        """Whether it has one entry per layer, along a leading N axis."""
        return self.shape.startswith("N")

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The (in, out) sizes of this kernel as a matrix; `shape` is without the N axis.

        The input axes are the leading D, or all but the last where the output is D.
        """
        letters = self.shape.removeprefix("N")
        input_axes = 1 if letters.startswith("D") else len(letters) - 1
        return math.prod(shape[:input_axes]), math.prod(shape[input_axes:])


def _norm(path: str, shape: str) -> dict[str, Parameter]:
    return {
        f"{path}/scale": Parameter(shape, "ones", "norm"),
        f"{path}/bias": Parameter(shape, "zeros", "norm"),
    }


def _dense(path: str, kernel: str, bias: str) -> dict[str, Parameter]:
    return {
        f"{path}/kernel": Parameter(kernel, "normal", "kernel"),
        f"{path}/bias": Parameter(bias, "zeros", "bias"),
    }


_EMBEDDINGS = {
    "embeddings/word": Parameter("VD", "embedding", "embedding"),
    "embeddings/position": Parameter("PD", "embedding", "embedding"),
    "embeddings/token_type": Parameter("YD", "normal", "embedding"),
    **_norm("embeddings/norm", "D"),
}
_ENCODER = {
    **_norm("encoder/layers/attention_norm", "ND"),
    **_dense("encoder/layers/attention/query", "NDHK", "NHK"),
    **_dense("encoder/layers/attention/key", "NDHK", "NHK"),
    **_dense("encoder/layers/attention/value", "NDHK", "NHK"),
    **_dense("encoder/layers/attention/output", "NHKD", "ND"),
    **_norm("encoder/layers/mlp_norm", "ND"),
    **_dense("encoder/layers/mlp/wi", "NDF", "NF"),
    **_dense("encoder/layers/mlp/wo", "NFD", "ND"),
    **_norm("encoder/final_norm", "D"),
}
_CROSS_ATTENTION = {
    **_norm("encoder/layers/cross_attention_norm", "ND"),
    **_dense("encoder/layers/cross_attention/query", "NDHK", "NHK"),
    **_dense("encoder/layers/cross_attention/key", "NDHK", "NHK"),
    **_dense("encoder/layers/cross_attention/value", "NDHK", "NHK"),
    **_dense("encoder/layers/cross_attention/output", "NHKD", "ND"),
}
_POOLER = _dense("pooler", "DE", "E")
_LM_HEAD = {
    **_dense("lm_head/dense", "DE", "E"),
    **_norm("lm_head/norm", "E"),
    "lm_head/bias": Parameter("V", "zeros", "bias"),
}
_UNTIED_DECODER = {"lm_head/decoder": Parameter("VD", "normal", "embedding")}

# Parameters on top of the encoder's. `base` is transformers' headless model, with its pooler.
_HEADS: dict[str, dict[str, Parameter]] = {
    "encoder": {},
    "base": _POOLER,
    "masked_lm": _LM_HEAD,
    "causal_lm": _LM_HEAD,
    "sequence_classification": {
        **_dense("classifier/dense", "DE", "E"),
        **_dense("classifier/output", "EC", "C"),
    },
    "multiple_choice": {**_POOLER, **_dense("classifier", "D1", "1")},
    "token_classification": _dense("classifier", "DC", "C"),
    "question_answering": _dense("span", "DC", "C"),
}
MODELS = tuple(_HEADS)


def table(config: RobertaPreLayerNormConfig, model: str = "masked_lm") -> dict[str, Parameter]:
    """The rows of one model, path -> Parameter, in reading order.

    Args:
        model: one of `MODELS`: the encoder alone, or with a pooler or head.

    Raises:
        InputError: question answering with num_labels other than 2 (start and end).
    """
    if model not in _HEADS:
        raise ValueError(f"model {model!r}: expected one of {MODELS}")
    if model == "question_answering" and config.num_labels != 2:
        raise InputError(
            f"config: num_labels={config.num_labels}, expected 2 (start and end) for question "
            "answering"
        )
    rows = {**_EMBEDDINGS, **_ENCODER, **_HEADS[model]}
    if config.add_cross_attention:
        rows |= _CROSS_ATTENTION
    if _HEADS[model] is _LM_HEAD and not config.tie_word_embeddings:
        rows |= _UNTIED_DECODER
    return rows


def letter_sizes(config: RobertaPreLayerNormConfig) -> dict[str, int]:
    """Shape letter -> size under this config."""
    return {
        "1": 1,
        "C": config.num_labels,
        "D": config.hidden_size,
        "E": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_attention_heads,
        "K": config.head_dim,
        "N": config.num_hidden_layers,
        "P": config.max_position_embeddings,
        "V": config.vocab_size,
        "Y": config.type_vocab_size,
    }


def shapes(
    config: RobertaPreLayerNormConfig, model: str = "masked_lm"
) -> dict[str, tuple[int, ...]]:
    """path -> shape in numbers. Every parameter is float32."""
    size = letter_sizes(config)
    return {
        path: tuple(size[letter] for letter in row.shape)
        for path, row in table(config, model).items()
    }


def parameter_count(config: RobertaPreLayerNormConfig, model: str = "masked_lm") -> int:
    """The number of scalars in the tree; a tied word table counts once."""
    return sum(math.prod(shape) for shape in shapes(config, model).values())


def init(config: RobertaPreLayerNormConfig, rng: jax.Array, model: str = "masked_lm") -> Tree:
    """A new parameter tree, float32, a pure function of (config, rng, model).

    Each leaf draws from `rng` folded with its path, so a leaf's value does not depend on which
    other leaves the model has. The distribution is that of transformers' torch classes: N(0,
    initializer_range), zero biases, unit norms, zero rows for the pad token and pad position.
    """
    shape = shapes(config, model)

    def init_leaf(path: str, row: Parameter) -> jax.Array:
        leaf_rng = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        return _init_leaf(row, shape[path], config, leaf_rng)

    return unflatten({path: init_leaf(path, row) for path, row in table(config, model).items()})


def _init_leaf(
    row: Parameter, shape: tuple[int, ...], config: RobertaPreLayerNormConfig, rng: jax.Array
) -> jax.Array:
    if row.init == "zeros":
        return jnp.zeros(shape, jnp.float32)
    if row.init == "ones":
        return jnp.ones(shape, jnp.float32)
    value = config.initializer_range * jax.random.normal(rng, shape, jnp.float32)
    return value.at[config.pad_token_id].set(0.0) if row.init == "embedding" else value


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dicts -> {"encoder/layers/mlp/wi/kernel": leaf}."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def unstack_layers(tree: Tree) -> Tree:
    """The tree with `encoder/layers` as a tuple of N per-layer trees in place of stacked leaves.

    Every model accepts this form. Training, checks, sharding and saving need the stacked tree. On
    a CPU the layers are views of the given arrays, not copies.
    """
    layers = jax.tree.map(np.asarray, tree["encoder"]["layers"])
    N = len(jax.tree.leaves(layers)[0])
    unstacked = tuple(jax.tree.map(operator.itemgetter(n), layers) for n in range(N))
    return jax.device_put({**tree, "encoder": {**tree["encoder"], "layers": unstacked}})


def check(
    tree: Tree, config: RobertaPreLayerNormConfig, model: str = "masked_lm", source: str = "params"
) -> None:
    """Checks a tree against the table, strictly: paths, shapes, dtype float32.

    Raises:
        InputError: one message that lists every missing, unexpected and misshapen leaf; unexpected
            ones with the nearest name in the table.
    """
    check_leaves(float32_leaves(shapes(config, model)), flatten(tree), source)


def float32_leaves(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape, as what `check_leaves` expects: float32 arrays."""
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def check_leaves(
    expected: Mapping[str, jax.ShapeDtypeStruct], found: Mapping[str, Any], source: str
) -> None:
    """Compares named arrays by shape and dtype. Raises InputError that lists every difference."""
    problems = describe_differences(expected, found)
    if problems:
        raise InputError(f"{source}: " + "; ".join(problems))


def describe_differences(
    expected: Mapping[str, jax.ShapeDtypeStruct], found: Mapping[str, Any]
) -> list[str]:
    """One line for each array that is missing, unexpected or has another shape or dtype."""
    problems = [
        f"missing {name} {_describe(leaf)}" for name, leaf in expected.items() if name not in found
    ]
    for name, leaf in found.items():
        if name not in expected:
            nearest = difflib.get_close_matches(name, expected, n=1)
            problems.append(f"unexpected {name}" + (f" (nearest: {nearest[0]})" if nearest else ""))
        elif _describe(leaf) != _describe(expected[name]):
            problems.append(f"{name} is {_describe(leaf)}, expected {_describe(expected[name])}")
    return problems


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"

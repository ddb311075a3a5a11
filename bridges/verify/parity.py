"""Is it one function? Every class in every framework, held to one float64 reference.

The reference is the PyTorch twin in float64, from the tree that is being checked. Flax, PyTorch and
TensorFlow run the same batch in float32 and bfloat16; outputs, hidden states, the loss and every
gradient are compared, layer by layer, so that what differs is named. The reference shares its code
with one of the three: a fault of it shows as an error of the other two.

Bounds are what float error itself shows, not what would be convenient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.params import Tree
from prelnroberta.pretrained.hf_checkpoint import ARCHITECTURES, from_tensors

Batch = dict[str, np.ndarray]
Values = dict[str, np.ndarray]

MODELS = tuple(model for model in ARCHITECTURES if model != "encoder")
DTYPES = ("float32", "bfloat16")


KINDS = ("output", "hidden state", "loss", "gradient")


class Bound(NamedTuple):
    """Errors that pass."""

    rms: float
    largest: float


# Of outputs, streams and the loss; of gradients. The worst that was measured, over the frameworks,
# random values at tiny and base size, and the demo's model: float32 1.8e-6, 1.7e-5 and 1.5e-5,
# 1.3e-5; bfloat16 1.9e-2, 1.8e-1 and 1.4e-1, 1.6e-1, of which PyTorch has as much as the others.
BOUNDS = {
    "float32": (Bound(2e-6, 2e-5), Bound(2e-5, 5e-5)),
    "bfloat16": (Bound(3e-2, 3e-1), Bound(3e-1, 5e-1)),
}
_HEAD_OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


@dataclasses.dataclass(frozen=True)
class Error:
    """How far one array is from the reference.

    Attributes:
        model, framework, dtype: what ran, as "masked_lm", "tensorflow", "bfloat16".
        kind: one of `KINDS`.
        name: of the array: "logits", "hidden_states[3]", "encoder/layers/mlp/wi/kernel[2]".
        rms: of the difference, over the rms of the expected values. NaN where it has any.
        largest: difference, over the same; over the largest expected value of a gradient.
            Gradients are in units of their module's largest leaf: see `_units`.
        bound: what passes.
    """

    model: str
    framework: str
    dtype: str
    kind: str
    name: str
    rms: float
    largest: float
    bound: Bound

    @property
    def passed(self) -> bool:
        return self.rms <= self.bound.rms and self.largest <= self.bound.largest

    @property
    def excess(self) -> float:
        """The error in units of its bound: above 1 fails; infinite for NaN."""
        worst = max(self.rms / self.bound.rms, self.largest / self.bound.largest)
        return worst if math.isfinite(worst) else math.inf


class Found(NamedTuple):
    """What one framework computed, in the tree's names: arrays by name."""

    outputs: Values
    hidden_states: Values
    loss: Values
    gradients: Values


Runner = Callable[[Tree, RobertaPreLayerNormConfig, str, Batch, str], Found]


def check(
    params: Tree,
    config: RobertaPreLayerNormConfig,
    model: str,
    batch: Batch,
    frameworks: Sequence[str] = ("flax", "pytorch", "tensorflow"),
    dtypes: Sequence[str] = DTYPES,
    copy: Tree | None = None,
) -> Iterator[Error]:
    """Runs one class everywhere and yields the errors of every array.

    Args:
        params: of `model`, one of `MODELS`.
        batch: as `make_batch` makes it, or the inputs and targets that the classes take.
        copy: what the classes get in place of `params`, to prove that it is the same.

    Raises:
        InputError: a tree that is not this model's.
    """
    parameters.check(params, config, model)
    expected = _pytorch(params, config, model, batch, "float64")
    for framework in frameworks:
        for dtype in dtypes:
            found = RUNNERS[framework](copy or params, config, model, batch, dtype)
            yield from _compare(found, expected, (model, framework, dtype))


def _compare(found: Found, expected: Found, who: tuple[str, str, str]) -> Iterator[Error]:
    for kind, ours, theirs in zip(KINDS, found, expected, strict=True):
        if ours.keys() != theirs.keys():
            raise ValueError(f"{who}: {sorted(ours)} against {sorted(theirs)}")
        bound = BOUNDS[who[2]][kind == "gradient"]
        units = (
            _units(theirs) if kind == "gradient" else {n: (_rms(x),) * 2 for n, x in theirs.items()}
        )
        for name, value in theirs.items():
            difference = np.float64(ours[name]) - np.float64(value)
            measured = _rms(difference), float(np.abs(difference).max())
            yield Error(*who, kind, name, *np.divide(measured, units[name]).tolist(), bound)


def _units(gradients: Values) -> dict[str, tuple[float, float]]:
    """The rms and the largest value of each gradient, or of its module's largest leaf if more.

    A bias sums over tokens what its kernel sums times the inputs, and that sum may cancel: always
    where the bias only shifts a softmax (keys, choices, spans), by chance where the labels happen
    to be as frequent as the model thinks. Rounding is of the size of the terms, which the kernel
    shows.

    The largest value, since tables' gradients are mostly rows that no token touched.
    """
    sizes = {name: (_rms(x), float(np.abs(x).max())) for name, x in gradients.items()}
    modules: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name, size in sizes.items():
        modules.setdefault(_module(name), []).append(size)
    return {name: tuple(map(max, zip(*modules[_module(name)], strict=True))) for name in sizes}


def _module(name: str) -> tuple[str, str]:
    """Of "encoder/layers/mlp/wi/kernel[2]": its module and the number of its layer."""
    path, _, leaf = name.rpartition("/")
    return path, leaf.partition("[")[2]


def _rms(value: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(np.float64(value)))))


def worst(errors: Iterable[Error], kind: str) -> Error | None:
    """The error of a kind that is largest in units of its bound; None where there is none."""
    return max((e for e in errors if e.kind == kind), key=lambda e: e.excess, default=None)


def diagnosis(errors: Iterable[Error]) -> str:
    """Where the errors of one class in one framework and dtype begin; "" if all passed."""
    failed = [error for error in errors if not error.passed]
    states = [error.name for error in failed if error.kind == "hidden state"]
    if not failed:
        return ""
    if not states:
        return f"the encoder agrees; {failed[0].name} does not"
    first = min(int(name[len("hidden_states[") : -1]) for name in states)
    return "differs from the embeddings on" if first == 0 else f"differs from layer {first - 1} on"


# ---------------------------------------------------------------------------------------------
# Batches


def make_batch(
    config: RobertaPreLayerNormConfig,
    model: str,
    L: int,
    seed: int = 0,
    rows: Sequence[Sequence[int]] = (),
) -> Batch:
    """Inputs and random targets of a class: random ids, and rows of real ones below them.

    Of the four random rows [L] one has no pads; the others have them on the right, on the left and
    amid. Real rows are padded on the right. Multiple choice takes them in pairs.

    Raises:
        InputError: a row longer than L.
    """
    rng = np.random.default_rng(seed)
    ids = np.full((4 + len(rows), L), config.pad_token_id)
    ids[:4] = _random_ids(config, rng, (4, L))
    mask = np.ones_like(ids)
    mask[1, L - L // 3 :] = mask[2, : L // 4] = mask[3, L // 3 : L // 2] = 0
    for n, row in enumerate(rows, 4):
        if len(row) > L:
            raise InputError(f"a row of {len(row)} tokens, expected {L} or fewer")
        ids[n, : len(row)], mask[n, len(row) :] = row, 0
    return _as_batch(config, model, np.where(mask, ids, config.pad_token_id), mask, rng)


def _random_ids(
    config: RobertaPreLayerNormConfig, rng: np.random.Generator, shape: tuple[int, ...]
) -> np.ndarray:
    """Any id but the pad."""
    ids = rng.integers(0, config.vocab_size - 1, shape)
    return ids + (ids >= config.pad_token_id)


def _as_batch(
    config: RobertaPreLayerNormConfig,
    model: str,
    ids: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
) -> Batch:
    """The inputs of a class, with random token types and targets."""
    B, L = ids.shape
    types = rng.integers(0, config.type_vocab_size, ids.shape)
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    C = config.num_labels
    if model == "multiple_choice":
        pairs = {n: rows[: B // 2 * 2].reshape(-1, 2, L) for n, rows in batch.items()}
        return pairs | {"labels": rng.integers(0, 2, B // 2)}
    if model == "question_answering":
        last = mask.cumsum(1).argmax(1)
        starts = rng.integers(0, last + 1)
        return batch | {"start_positions": starts, "end_positions": rng.integers(starts, last + 1)}
    if model == "sequence_classification":
        labels = {
            "regression": rng.standard_normal((B, C)).astype(np.float32),
            "multi_label_classification": rng.integers(0, 2, (B, C)).astype(np.float32),
            None: rng.integers(0, C, B) if C > 1 else rng.standard_normal(B).astype(np.float32),
        }
        kind = config.problem_type
        return batch | {"labels": labels.get(kind, rng.integers(0, C, B))}
    if model in ("masked_lm", "causal_lm", "token_classification"):
        labels = rng.integers(
            0, C if model == "token_classification" else config.vocab_size, (B, L)
        )
        # What a causal row predicts from a pad is nobody's concern.
        counted = mask.astype(bool)
        counted[:, 1:] &= counted[:, :-1]
        return batch | {"labels": np.where(counted, labels, -100)}
    return batch


# ---------------------------------------------------------------------------------------------
# Frameworks. Each gives its results in the tree's names.


def _objective(outputs: Mapping[str, Any], mean_product: Callable[[Any, np.ndarray], Any]) -> Any:
    """What gradients are taken of: the class' loss; of the base model, which has none, the mean
    products of its outputs with fixed weights."""
    if outputs.get("loss") is not None:
        return outputs["loss"]
    return sum(
        mean_product(outputs[name], np.cos(np.arange(np.prod(shape))).reshape(shape))
        for name in ("last_hidden_state", "pooler_output")
        for shape in [tuple(outputs[name].shape)]
    )


def _found(outputs: Mapping[str, Any], gradients: Tree, numpy: Callable) -> Found:
    """Names what the classes of the three frameworks name alike; stacked leaves are cut apart."""
    leaves = {}
    for path, leaf in parameters.flatten(gradients).items():
        if path.startswith("encoder/layers/"):
            leaves |= {f"{path}[{n}]": row for n, row in enumerate(leaf)}
        else:
            leaves[path] = leaf
    return Found(
        {n: numpy(outputs[n]) for n in _HEAD_OUTPUTS if outputs.get(n) is not None},
        {f"hidden_states[{n}]": numpy(x) for n, x in enumerate(outputs["hidden_states"])},
        {"loss": numpy(outputs["loss"])} if outputs.get("loss") is not None else {},
        leaves,
    )


def _flax(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, batch: Batch, dtype: str
) -> Found:
    import jax
    import jax.numpy as jnp

    import prelnroberta

    made = getattr(prelnroberta, f"Flax{ARCHITECTURES[model]}")(
        config, dtype=jnp.dtype(dtype), _do_init=False
    )

    def mean_product(x: jax.Array, weights: np.ndarray) -> jax.Array:
        return (x.astype(jnp.float32) * jnp.asarray(weights, jnp.float32)).mean()

    def run(params: Tree) -> tuple[jax.Array, dict[str, Any]]:
        outputs = dict(made(**batch, params=params, output_hidden_states=True).items())
        return _objective(outputs, mean_product), outputs

    # Accelerators multiply in less than float32 unless told.
    with jax.default_matmul_precision("highest"):
        (_, outputs), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    return _found(outputs, gradients, lambda x: np.asarray(x, np.float64))


def _pytorch(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, batch: Batch, dtype: str
) -> Found:
    import torch

    from bridges import pytorch

    made = getattr(pytorch, ARCHITECTURES[model]).from_params(params, config)
    made = made.to(getattr(torch, dtype))
    inputs = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in batch.items()}

    def mean_product(x: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) * torch.from_numpy(weights).to(wide)).mean()

    outputs = dict(made(**inputs, output_hidden_states=True).items())
    _objective(outputs, mean_product).backward()

    def numpy(x: torch.Tensor) -> np.ndarray:
        return x.detach().to(torch.float64).numpy()

    named = {name: numpy(p.grad) for name, p in made.named_parameters()}
    gradients = from_tensors(named, config, model, "gradients")
    return _found(outputs, gradients, numpy)


def _tensorflow(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, batch: Batch, dtype: str
) -> Found:
    # First, because it keeps TensorFlow from chatting on standard error.
    from bridges import tensorflow as twins
    from bridges.tensorflow.variable_mapping import from_variables

    # isort: split
    import tensorflow as tf

    policy = "float32" if dtype == "float32" else f"mixed_{dtype}"
    made = getattr(twins, f"TF{ARCHITECTURES[model]}").from_params(params, config, dtype=policy)

    def mean_product(x: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
        return tf.reduce_mean(tf.cast(x, tf.float32) * tf.constant(weights, tf.float32))

    with tf.GradientTape() as tape:
        outputs = made(batch, output_hidden_states=True)
        loss = _objective(outputs, mean_product)
    by_path = made.variables_by_path()
    slopes = [tf.convert_to_tensor(x) for x in tape.gradient(loss, list(by_path.values()))]
    named = {path: x.numpy() for path, x in zip(by_path, slopes, strict=True)}
    gradients = from_variables(named, config, model, "gradients")
    return _found(outputs, gradients, lambda x: np.asarray(x, np.float64))


RUNNERS: dict[str, Runner] = {"flax": _flax, "pytorch": _pytorch, "tensorflow": _tensorflow}

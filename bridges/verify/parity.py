"""Compares every class in every framework with one float64 reference.

The reference is the PyTorch twin in float64, with the parameters under test. Flax, PyTorch and
TensorFlow run the same batch in float32 and bfloat16. Outputs, hidden states, the loss and every
gradient are compared array by array, so that a difference is located. The reference shares its code
with one of the three frameworks: a fault of it appears as an error of the other two.

The bounds follow from the measured rounding errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import (
    ARCHITECTURES,
    IGNORE_INDEX,
    MULTI_LABEL,
    REGRESSION,
    RobertaPreLayerNormConfig,
)
from prelnroberta.errors import InputError
from prelnroberta.params import Tree
from prelnroberta.pretrained.hf_checkpoint import from_state_dict

Batch = dict[str, np.ndarray]
Arrays = dict[str, np.ndarray]

# `params.MODELS` without the bare encoder, which is the base model without its pooler.
PARITY_MODELS = tuple(model for model in ARCHITECTURES if model != "encoder")
DTYPES = ("float32", "bfloat16")
ARRAY_KINDS = ("output", "hidden state", "loss", "gradient")


class Bound(NamedTuple):
    """The largest rms error and absolute error that pass."""

    rms: float
    max_abs: float


# dtype -> (bound of outputs, hidden states and the loss; bound of gradients). The worst measured
# errors, over the frameworks, random parameters at tiny and base size, and the demo's model, are:
# float32 1.8e-6, 1.7e-5 and 1.5e-5, 1.3e-5; bfloat16 1.9e-2, 1.8e-1 and 1.4e-1, 1.6e-1. PyTorch's
# are as large as the others'.
BOUNDS = {
    "float32": (Bound(2e-6, 2e-5), Bound(2e-5, 5e-5)),
    "bfloat16": (Bound(3e-2, 3e-1), Bound(3e-1, 5e-1)),
}
_OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The error of one array relative to the reference.

    Attributes:
        model, framework, dtype: what ran, for example "masked_lm", "tensorflow", "bfloat16".
        kind: one of `ARRAY_KINDS`.
        name: of the array: "logits", "hidden_states[3]", "encoder/layers/mlp/wi/kernel[2]".
        rms: rms of the difference over the rms of the expected values; NaN if it contains NaN.
        max_abs: largest absolute difference over the rms of the expected values; for a gradient,
            over its largest expected value. Gradients have their own scales: `_gradient_scales`.
        bound: largest errors that pass.
    """

    model: str
    framework: str
    dtype: str
    kind: str
    name: str
    rms: float
    max_abs: float
    bound: Bound

    @property
    def passed(self) -> bool:
        return self.rms <= self.bound.rms and self.max_abs <= self.bound.max_abs

    @property
    def excess(self) -> float:
        """The error over its bound: more than 1 fails; infinite for NaN."""
        excess = max(self.rms / self.bound.rms, self.max_abs / self.bound.max_abs)
        return excess if math.isfinite(excess) else math.inf


class RunResult(NamedTuple):
    """The arrays that one framework computed, in the order of `ARRAY_KINDS`.

    Gradients have the paths of the parameter tree, with "[n]" for layer n.
    """

    outputs: Arrays
    hidden_states: Arrays
    loss: Arrays
    gradients: Arrays


Runner = Callable[[Tree, RobertaPreLayerNormConfig, str, Batch, str], RunResult]


def compare_frameworks(
    params: Tree,
    config: RobertaPreLayerNormConfig,
    model: str,
    batch: Batch,
    frameworks: Sequence[str] = ("flax", "pytorch", "tensorflow"),
    dtypes: Sequence[str] = DTYPES,
    tested_params: Tree | None = None,
) -> Iterator[Comparison]:
    """Runs one class in every framework and dtype, and compares every array.

    Args:
        params: parameters of the reference.
        model: one of `PARITY_MODELS`.
        batch: result of `make_batch`, or other inputs and targets of the classes.
        tested_params: parameters of the frameworks, to check that they equal `params`; None: these.

    Raises:
        InputError: `params` is not a tree of this model.
    """
    parameters.check(params, config, model)
    expected = _run_pytorch(params, config, model, batch, "float64")
    for framework in frameworks:
        for dtype in dtypes:
            result = RUNNERS[framework](tested_params or params, config, model, batch, dtype)
            yield from _compare(result, expected, (model, framework, dtype))


def _compare(
    result: RunResult, expected: RunResult, run: tuple[str, str, str]
) -> Iterator[Comparison]:
    for kind, arrays, references in zip(ARRAY_KINDS, result, expected, strict=True):
        if arrays.keys() != references.keys():
            raise ValueError(f"{run}: {sorted(arrays)} against {sorted(references)}")
        is_gradient = kind == "gradient"
        bound = BOUNDS[run[2]][is_gradient]
        scales = (
            _gradient_scales(references)
            if is_gradient
            else {name: (_rms(x),) * 2 for name, x in references.items()}
        )
        for name, reference in references.items():
            difference = np.float64(arrays[name]) - np.float64(reference)
            errors = _rms(difference), float(np.abs(difference).max())
            yield Comparison(*run, kind, name, *np.divide(errors, scales[name]).tolist(), bound)


def _gradient_scales(gradients: Arrays) -> dict[str, tuple[float, float]]:
    """The rms and largest absolute value of each gradient, at least those of its module's leaves.

    The gradient of a bias is a sum over tokens whose terms may cancel: always if the bias only
    shifts a softmax (keys, choices, spans), by chance if the labels are as frequent as the model
    predicts. Rounding errors have the size of the terms, and so has the gradient of the kernel.

    The absolute error is relative to the largest value, because most rows of an embedding table's
    gradient are zero.
    """
    scales = {name: (_rms(x), float(np.abs(x).max())) for name, x in gradients.items()}
    by_module: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name, scale in scales.items():
        by_module.setdefault(_module(name), []).append(scale)
    return {name: tuple(map(max, zip(*by_module[_module(name)], strict=True))) for name in scales}


def _module(name: str) -> tuple[str, str]:
    """("encoder/layers/mlp/wi", "2]") of "encoder/layers/mlp/wi/kernel[2]"."""
    path, _, leaf = name.rpartition("/")
    return path, leaf.partition("[")[2]


def _rms(value: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(np.float64(value)))))


def worst(comparisons: Iterable[Comparison], kind: str) -> Comparison | None:
    """The comparison of a kind with the largest error over its bound; None if there is none."""
    return max((c for c in comparisons if c.kind == kind), key=lambda c: c.excess, default=None)


def diagnose(comparisons: Iterable[Comparison]) -> str:
    """Locates the first difference in one run (class, framework, dtype); "" if all passed."""
    failed = [comparison for comparison in comparisons if not comparison.passed]
    states = [comparison.name for comparison in failed if comparison.kind == "hidden state"]
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
    """Makes inputs and random targets of a class: four random rows, then the given ones.

    The random rows have no padding, and padding on the right, on the left and in the middle. The
    given rows are padded on the right. Multiple choice combines rows in pairs.

    Args:
        L: length of every row.
        rows: ids of real text.

    Returns:
        The arguments of the class by name, [B, L] or [B, 2, L], and targets.

    Raises:
        InputError: a row is longer than L.
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
    return _add_targets(config, model, np.where(mask, ids, config.pad_token_id), mask, rng)


def _random_ids(
    config: RobertaPreLayerNormConfig, rng: np.random.Generator, shape: tuple[int, ...]
) -> np.ndarray:
    """Uniform over all ids except padding."""
    ids = rng.integers(0, config.vocab_size - 1, shape)
    return ids + (ids >= config.pad_token_id)


def _add_targets(
    config: RobertaPreLayerNormConfig,
    model: str,
    ids: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
) -> Batch:
    """Adds random token types and targets."""
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
            REGRESSION: rng.standard_normal((B, C)).astype(np.float32),
            MULTI_LABEL: rng.integers(0, 2, (B, C)).astype(np.float32),
            None: rng.integers(0, C, B) if C > 1 else rng.standard_normal(B).astype(np.float32),
        }
        kind = config.problem_type
        return batch | {"labels": labels.get(kind, rng.integers(0, C, B))}
    if model in ("masked_lm", "causal_lm", "token_classification"):
        labels = rng.integers(
            0, C if model == "token_classification" else config.vocab_size, (B, L)
        )
        # A causal model's prediction from padding is undefined.
        has_loss = mask.astype(bool)
        has_loss[:, 1:] &= has_loss[:, :-1]
        return batch | {"labels": np.where(has_loss, labels, IGNORE_INDEX)}
    return batch


# ---------------------------------------------------------------------------------------------
# Runs of one class in one framework. Gradients are renamed to the paths of the parameter tree.


def _objective(outputs: Mapping[str, Any], mean_product: Callable[[Any, np.ndarray], Any]) -> Any:
    """The scalar to differentiate: the loss, or for the base model, which has none, the mean of its
    outputs times fixed weights."""
    if outputs.get("loss") is not None:
        return outputs["loss"]
    return sum(
        mean_product(outputs[name], np.cos(np.arange(np.prod(shape))).reshape(shape))
        for name in ("last_hidden_state", "pooler_output")
        for shape in [tuple(outputs[name].shape)]
    )


def _make_result(outputs: Mapping[str, Any], gradients: Tree, to_numpy: Callable) -> RunResult:
    """Collects the arrays by name; stacked leaves become one array a layer."""
    leaves = {}
    for path, leaf in parameters.flatten(gradients).items():
        if path.startswith("encoder/layers/"):
            leaves |= {f"{path}[{n}]": row for n, row in enumerate(leaf)}
        else:
            leaves[path] = leaf
    return RunResult(
        {name: to_numpy(outputs[name]) for name in _OUTPUTS if outputs.get(name) is not None},
        {f"hidden_states[{n}]": to_numpy(x) for n, x in enumerate(outputs["hidden_states"])},
        {"loss": to_numpy(outputs["loss"])} if outputs.get("loss") is not None else {},
        leaves,
    )


def _run_flax(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, batch: Batch, dtype: str
) -> RunResult:
    import jax
    import jax.numpy as jnp

    import prelnroberta

    flax_model = getattr(prelnroberta, f"Flax{ARCHITECTURES[model]}")(
        config, dtype=jnp.dtype(dtype), _do_init=False
    )

    def mean_product(x: jax.Array, weights: np.ndarray) -> jax.Array:
        return (x.astype(jnp.float32) * jnp.asarray(weights, jnp.float32)).mean()

    def run(params: Tree) -> tuple[jax.Array, dict[str, Any]]:
        outputs = dict(flax_model(**batch, params=params, output_hidden_states=True).items())
        return _objective(outputs, mean_product), outputs

    # By default, accelerators multiply in less than float32.
    with jax.default_matmul_precision("highest"):
        (_, outputs), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    return _make_result(outputs, gradients, lambda x: np.asarray(x, np.float64))


def _run_pytorch(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, batch: Batch, dtype: str
) -> RunResult:
    import torch

    from bridges import pytorch

    module = getattr(pytorch, ARCHITECTURES[model]).from_params(params, config)
    module = module.to(getattr(torch, dtype))
    inputs = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in batch.items()}

    def mean_product(x: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) * torch.from_numpy(weights).to(wide)).mean()

    outputs = dict(module(**inputs, output_hidden_states=True).items())
    _objective(outputs, mean_product).backward()

    def to_numpy(x: torch.Tensor) -> np.ndarray:
        return x.detach().to(torch.float64).numpy()

    state_dict = {name: to_numpy(p.grad) for name, p in module.named_parameters()}
    gradients = from_state_dict(state_dict, config, model, "gradients")
    return _make_result(outputs, gradients, to_numpy)


def _run_tensorflow(
    params: Tree, config: RobertaPreLayerNormConfig, model: str, batch: Batch, dtype: str
) -> RunResult:
    # Before TensorFlow, because it silences TensorFlow's messages on standard error.
    from bridges import tensorflow as twins
    from bridges.tensorflow.variable_mapping import from_variables

    # isort: split
    import tensorflow as tf

    policy = "float32" if dtype == "float32" else f"mixed_{dtype}"
    cls = getattr(twins, f"TF{ARCHITECTURES[model]}")
    keras_model = cls.from_params(params, config, dtype=policy)

    def mean_product(x: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
        return tf.reduce_mean(tf.cast(x, tf.float32) * tf.constant(weights, tf.float32))

    with tf.GradientTape() as tape:
        outputs = keras_model(batch, output_hidden_states=True)
        loss = _objective(outputs, mean_product)
    variables = keras_model.variables_by_path()
    # Gradients of embedding tables are IndexedSlices.
    slopes = map(tf.convert_to_tensor, tape.gradient(loss, list(variables.values())))
    by_path = {path: slope.numpy() for path, slope in zip(variables, slopes, strict=True)}
    gradients = from_variables(by_path, config, model, "gradients")
    return _make_result(outputs, gradients, lambda x: np.asarray(x, np.float64))


RUNNERS: dict[str, Runner] = {
    "flax": _run_flax,
    "pytorch": _run_pytorch,
    "tensorflow": _run_tensorflow,
}

"""What stands on the encoder: heads, their Linen modules and their losses.

Every module takes `Encoder`'s arguments and returns its logits beside the encoder's output. Every
loss is a (sum, weight) pair. The mean is taken once, over all rows, accumulation steps and
devices: a mean of means is wrong as soon as masked tokens differ in number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.distributed.sharding import constrain
from prelnroberta.errors import InputError
from prelnroberta.model.encoder import Encoder, EncoderOutput, TableModule
from prelnroberta.model.layers import ACTIVATIONS, dropout, layer_norm, project, split_keys

Array = jax.Array

IGNORE = -100  # the label of a target that does not count, as in torch's cross entropy
# The logit of what is no class of this target: another segment's token, a choice that is not there.
# Finite, so that a target without any class has a finite loss. Label smoothing passes it by.
IMPOSSIBLE = -1e30


@flax.struct.dataclass
class Scores:
    """Sums over counted targets; divide by `weight` once, at the very end.

    Attributes:
        loss: [] float32, summed negative log likelihood in nats.
        correct: [] float32, targets that are the most likely class (token, span end, side of a
            multi-label decision); 0 in regression.
        weight: [] float32, how many targets counted.
    """

    loss: Array
    correct: Array
    weight: Array

    def __add__(self, other: Scores) -> Scores:
        return jax.tree.map(jnp.add, self, other)

    @property
    def mean(self) -> Array:
        """[] float32: the loss of one target; a finite 0 where none counted."""
        return self.loss / jnp.where(self.weight > 0, self.weight, 1.0)

    @classmethod
    def zero(cls) -> Scores:
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """What a cross entropy does beside counting every target the same.

    Attributes:
        class_weights: one number a class, by which a target of that class counts; None: 1.
        label_smoothing: share of each target spread evenly over all classes, in [0, 1).

    Both as in torch's `cross_entropy` (mean reduction): the smoothed part counts each class by its
    own weight, and the whole is divided by the weights of the targets.
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0


PLAIN = LossSettings()


def cross_entropy(
    logits: Array, labels: Array, weights: Array, settings: LossSettings = PLAIN
) -> Scores:
    """Scores of logits [..., V] against labels [...] int, counted by weights [...] float32."""
    logits = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    smoothing, counted = settings.label_smoothing, weights
    if settings.class_weights is not None:
        by_class = jnp.asarray(settings.class_weights, jnp.float32)
        weights = weights * by_class[labels]
    loss = ((log_normalizer - label_logits) * weights).sum()
    if smoothing:
        possible = logits > IMPOSSIBLE / 2
        surprise = jnp.where(possible, log_normalizer[..., None] - logits, 0.0)
        if settings.class_weights is not None:
            surprise = surprise * by_class
        mean = surprise.sum(axis=-1) / jnp.maximum(possible.sum(axis=-1), 1)
        spread = (mean * counted).sum()
        loss = (1.0 - smoothing) * loss + smoothing * spread
    return Scores(
        loss=loss,
        correct=((logits.argmax(axis=-1) == labels) * weights).sum(),
        weight=weights.sum(),
    )


def lm_logits(p: dict, config: RobertaPreLayerNormConfig, hidden: Array) -> Array:
    """hidden [B, M, D] -> logits [B, M, V] float32, by the tied word table or `lm_head/decoder`.

    The activation is the exact gelu whatever `hidden_act` says, as in transformers.
    """
    head = p["lm_head"]
    x = ACTIVATIONS["gelu"](project(head["dense"], "bmd,de->bme", hidden))
    x = layer_norm(head["norm"], x, config.layer_norm_eps)
    decoder = p["embeddings"]["word"] if config.tie_word_embeddings else head["decoder"]
    logits = jnp.einsum(
        "bmd,vd->bmv", x, decoder.astype(x.dtype), preferred_element_type=jnp.float32
    )
    return constrain(logits, "BMV") + head["bias"]


def pool(p: dict, first: Array) -> Array:
    """[..., D] -> [..., D]: tanh of a dense layer, over what stands at a sequence's first token."""
    return jnp.tanh(project(p["pooler"], "...d,de->...e", first))


def classifier_dropout(x: Array, config: RobertaPreLayerNormConfig, key: Array | None) -> Array:
    rate = config.classifier_dropout
    return dropout(x, config.hidden_dropout_prob if rate is None else rate, key)


class Base(TableModule):
    """The encoder and its pooler: transformers' model without a head."""

    @nn.compact
    def __call__(
        self, *inputs: Any, deterministic: bool = True, **named: Any
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s. Returns pooled [B, D] and the encoder's output."""
        p = self.tree("base")
        [key] = self.keys(1, deterministic, named)
        output = self.encode(p, *inputs, key=key, **named)
        return pool(p, output.last_hidden_state[:, 0]), output


class MaskedLM(TableModule):
    """The encoder with the masked-language-model head."""

    @nn.compact
    def __call__(
        self, *inputs: Any, deterministic: bool = True, **named: Any
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s.

        Returns:
            logits [B, L, V] float32, or [B, M, V] at `read_positions`, and the encoder's output.
        """
        p = self.tree("masked_lm")
        [key] = self.keys(1, deterministic, named)
        output = self.encode(p, *inputs, key=key, **named)
        return lm_logits(p, self.config, output.last_hidden_state), output

    @nn.compact
    def hidden(self, *inputs: Any, deterministic: bool = True, **named: Any) -> Array:
        """The same without the head: [B, L, D], or [B, M, D] at `read_positions`."""
        [key] = self.keys(1, deterministic, named)
        return self.encode(self.tree("masked_lm"), *inputs, key=key, **named).last_hidden_state


class CausalLM(TableModule):
    """The decoder with the language-model head: logits at t predict the token at t + 1."""

    @nn.compact
    def __call__(
        self, *inputs: Any, deterministic: bool = True, **named: Any
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s. Returns logits [B, L, V] float32 and the encoder's output.

        Raises:
            InputError: for a config that is no decoder's: every token would see what it predicts.
        """
        if not self.config.is_decoder:
            raise InputError("config: is_decoder=False, expected True for a causal language model")
        p = self.tree("causal_lm")
        [key] = self.keys(1, deterministic, named)
        output = self.encode(p, *inputs, key=key, **named)
        return lm_logits(p, self.config, output.last_hidden_state), output


def _narrowed(named: dict[str, Any]) -> dict[str, Any]:
    """Arguments that compute the last block at position 0 alone, if no one sees the difference;
    those that say themselves where, as they are."""
    if named.get("keep_residuals") or named.get("keep_attentions"):
        return named
    if named.get("read_positions") is not None:
        return named
    return {**named, "read_positions": jnp.zeros((1, 1), jnp.int32)}


class SequenceClassification(TableModule):
    """The encoder and a two-layer classifier over `<s>`."""

    @nn.compact
    def __call__(
        self, *inputs: Any, deterministic: bool = True, **named: Any
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s.

        Returns:
            logits [B, C], and the encoder's output. Its last block computes position 0 alone,
            which is exact, unless residuals or attentions are kept. Of packed rows: logits
            [B, S, C] at `read_positions` [B, S], where their segments begin.
        """
        p = self.tree("sequence_classification")
        key, k_dense, k_output = self.keys(3, deterministic, named)
        packed = named.get("read_positions") is not None
        output = self.encode(p, *inputs, key=key, **_narrowed(named))
        x = output.last_hidden_state if packed else output.last_hidden_state[:, 0]
        x = classifier_dropout(x, self.config, k_dense)
        x = jnp.tanh(project(p["classifier"]["dense"], "...d,de->...e", x))
        x = classifier_dropout(x, self.config, k_output)
        return project(p["classifier"]["output"], "...e,ec->...c", x), output


class MultipleChoice(TableModule):
    """The encoder, its pooler and one number a choice."""

    @nn.compact
    def __call__(
        self, *inputs: Any, deterministic: bool = True, **named: Any
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s, those of a row with an axis of choices after B: [B, C, L].

        Returns:
            logits [B, C], and the encoder's output over B * C rows. Of packed rows, whose
            arguments have no axis of choices: logits [B, S, C] at `read_positions` [B, S, C],
            where the choices of up to S questions begin.
        """
        p = self.tree("multiple_choice")
        if (read := named.get("read_positions")) is not None:
            key, k_output = self.keys(2, deterministic, named)
            named["read_positions"] = read.reshape(len(read), -1)
            output = self.encode(p, *inputs, key=key, **named)
            return self._score(p, output.last_hidden_state, k_output).reshape(read.shape), output
        rows = {name: named.pop(name) for name in _BY_CHOICE & named.keys()}
        shapes = [x.shape[:2] for x in (*inputs, *rows.values()) if x is not None]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (inputs, rows))
        if named.get("dropout_keys") is not None:
            by_choice = split_keys(named["dropout_keys"], shapes[0][1])
            named["dropout_keys"] = by_choice.T.reshape(-1)
        key, k_output = self.keys(2, deterministic, named)
        output = self.encode(p, *flat[0], key=key, **_narrowed({**named, **flat[1]}))
        scores = self._score(p, output.last_hidden_state[:, 0], k_output)
        return scores.reshape(shapes[0]), output

    def _score(self, p: dict, first: Array, key: Array | None) -> Array:
        """[..., D] -> [..., 1]"""
        x = dropout(pool(p, first), self.config.hidden_dropout_prob, key)
        return project(p["classifier"], "...d,dc->...c", x)


_BY_CHOICE = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "segment_ids",
    "inputs_embeds",
}


class TokenClassification(TableModule):
    """The encoder and a linear classifier over every token."""

    @nn.compact
    def __call__(
        self, *inputs: Any, deterministic: bool = True, **named: Any
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s. Returns logits [B, L, C] and the encoder's output."""
        p = self.tree("token_classification")
        key, k_output = self.keys(2, deterministic, named)
        output = self.encode(p, *inputs, key=key, **named)
        x = output.last_hidden_state
        x = classifier_dropout(x, self.config, k_output)
        return project(p["classifier"], "bld,dc->blc", x), output


class QuestionAnswering(TableModule):
    """The encoder and two numbers a token: how likely the answer starts, and ends, there."""

    @nn.compact
    def __call__(
        self, *inputs: Any, deterministic: bool = True, **named: Any
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s. Returns logits [B, L, 2], start and end, and the output."""
        p = self.tree("question_answering")
        [key] = self.keys(1, deterministic, named)
        output = self.encode(p, *inputs, key=key, **named)
        return project(p["span"], "bld,dc->blc", output.last_hidden_state), output


# The models of the parameter table.
MODULES: dict[str, type[TableModule]] = {
    "encoder": Encoder,
    "base": Base,
    "masked_lm": MaskedLM,
    "causal_lm": CausalLM,
    "sequence_classification": SequenceClassification,
    "multiple_choice": MultipleChoice,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
}


def label_scores(logits: Array, labels: Array, settings: LossSettings = PLAIN) -> Scores:
    """Cross entropy of logits [..., C] against labels [...] int; -100 does not count.

    For masked tokens, token classes, single-label classification and choices.
    """
    counted = labels != IGNORE
    weights = counted.astype(jnp.float32)
    return cross_entropy(logits, jnp.where(counted, labels, 0), weights, settings)


def causal_lm_scores(logits: Array, labels: Array, settings: LossSettings = PLAIN) -> Scores:
    """Scores of logits [B, L, V] at t against labels [B, L] at t + 1; -100 does not count."""
    return label_scores(logits[:, :-1], labels[:, 1:], settings)


def regression_scores(outputs: Array, labels: Array, weights: Array | None = None) -> Scores:
    """Squared errors of outputs [B] or [B, C] against labels of as many numbers.

    `weights` [B] float32 counts examples; None: each once. Of packed rows, [B, S] for [B].
    """
    squares = jnp.square(outputs.astype(jnp.float32).reshape(labels.shape) - labels)
    return _weighted(squares, jnp.zeros_like(squares), weights)


def multi_label_scores(logits: Array, labels: Array, weights: Array | None = None) -> Scores:
    """Binary cross entropy of logits [B, C] against labels [B, C] in [0, 1], C decisions each.

    `weights` [B] float32 counts examples; None: each once. Of packed rows, [B, S] for [B].
    """
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    loss = jax.nn.softplus(logits) - labels * logits
    return _weighted(loss, (logits > 0) == (labels > 0.5), weights)


def _weighted(loss: Array, correct: Array, weights: Array | None) -> Scores:
    """Sums over all axes of `loss` and `correct` [B, ...], weighted along their first axes."""
    weights = jnp.ones((), jnp.float32) if weights is None else weights
    weights = weights.reshape(weights.shape + (1,) * (loss.ndim - weights.ndim))
    counted = jnp.broadcast_to(weights, loss.shape)
    return Scores((loss * counted).sum(), (correct * counted).sum(), counted.sum())


def problem_type(config: RobertaPreLayerNormConfig, labels: Array) -> str:
    """The config's, or what the labels look like: decided anew by every call, written nowhere."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    whole = jnp.issubdtype(labels.dtype, jnp.integer)
    return "single_label_classification" if whole else "multi_label_classification"


def sequence_scores(
    config: RobertaPreLayerNormConfig,
    logits: Array,
    labels: Array,
    settings: LossSettings = PLAIN,
    weights: Array | None = None,
) -> Scores:
    """Scores of logits [B, C]: against labels [B] int, [B, C] float, or in regression [B(, C)].

    `settings` is of single labels, whose -100 does not count; `weights` [B] counts the others. Of
    packed rows, [B, S] for [B] everywhere.
    """
    kind = problem_type(config, labels)
    if kind == "single_label_classification":
        return label_scores(logits, labels, settings)
    return (regression_scores if kind == "regression" else multi_label_scores)(
        logits, labels, weights
    )


def span_scores(
    logits: Array,
    starts: Array,
    ends: Array,
    settings: LossSettings = PLAIN,
    segment_ids: Array | None = None,
) -> tuple[Scores, Scores]:
    """Of logits [B, L, 2] against positions [B]: scores of the starts and of the ends.

    Positions outside of the row do not count. transformers' loss is the mean of the two means;
    training adds the two up.

    Args:
        segment_ids: [B, L] int. Positions are then [B, S], those of segments 1 to S, and are
            sought among the tokens of their segment alone: neither among others nor among pads,
            which transformers' loss takes for possible answers.
    """
    L = logits.shape[1]

    def score(side: int, positions: Array) -> Scores:
        inside = (positions >= 0) & (positions < L)
        among = logits[:, :, side].astype(jnp.float32)
        if segment_ids is not None:
            segments = 1 + jnp.arange(positions.shape[1])
            own = segment_ids[:, None] == segments[:, None]  # [B, S, L]
            among = jnp.where(own, among[:, None], IMPOSSIBLE)
        return label_scores(among, jnp.where(inside, positions, IGNORE), settings)

    return score(0, starts), score(1, ends)


def masked_lm_scores(
    module: MaskedLM, params: dict, batch: dict[str, Array], dropout_keys: Array | None = None
) -> Scores:
    """Scores of one batch of masked rows: logits are computed at masked positions alone, and
    where `execution.logits_chunk_size` says so, never all of them at the same time.

    Args:
        batch: input_ids, segment_ids, position_ids [B, L] int; masked_positions, masked_labels
            [B, M] int; masked_weights [B, M] float32 (`data/loader.py` makes it).
        dropout_keys: [B], each row's own; None evaluates without dropout.
    """
    hidden = module.apply(
        {"params": params},
        batch["input_ids"],
        position_ids=batch["position_ids"],
        segment_ids=batch["segment_ids"],
        read_positions=batch["masked_positions"],
        dropout_keys=dropout_keys,
        method=MaskedLM.hidden,
    )
    targets = batch["masked_labels"], batch["masked_weights"]

    def score(hidden: Array, labels: Array, weights: Array) -> Scores:
        return cross_entropy(lm_logits(params, module.config, hidden), labels, weights)

    M, at_once = hidden.shape[1], module.execution.logits_chunk_size
    if not at_once or at_once >= M:
        return score(hidden, *targets)

    def cut(x: Array) -> Array:
        """[B, M, ...] -> [chunks, B, at_once, ...], filled up with zeros."""
        x = jnp.pad(x, [(0, 0), (0, -M % at_once)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, at_once, *x.shape[2:]).swapaxes(0, 1)

    def add(total: Scores, part: tuple[Array, Array, Array]) -> tuple[Scores, None]:
        # Their logits are not kept for the backward pass, but computed again.
        return total + jax.checkpoint(score, prevent_cse=False)(*part), None

    return jax.lax.scan(add, Scores.zero(), jax.tree.map(cut, (hidden, *targets)))[0]

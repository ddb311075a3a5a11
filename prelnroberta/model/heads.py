"""What stands on the encoder: heads, their Linen modules and their losses.

Every module takes `Encoder`'s arguments and returns its logits beside the encoder's output. Every
loss is a (sum, weight) pair. The mean is taken once, over all rows, accumulation steps and
devices: a mean of means is wrong as soon as masked tokens differ in number.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.distributed.sharding import constrain
from prelnroberta.errors import InputError
from prelnroberta.model.encoder import Encoder, EncoderOutput, TableModule
from prelnroberta.model.layers import ACTIVATIONS, dropout, layer_norm, project, split_rngs

Array = jax.Array


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
        if named.get("dropout_rngs") is not None:
            by_choice = split_rngs(named["dropout_rngs"], shapes[0][1])
            named["dropout_rngs"] = by_choice.T.reshape(-1)
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

"""Task heads: the Linen modules of the encoder with a head on top.

Every module takes `Encoder`'s arguments and returns its logits and the encoder's output. Losses
are in `losses.py`; shape letters are listed in `params.py`.
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


def lm_logits(params: dict, config: RobertaPreLayerNormConfig, hidden: Array) -> Array:
    """hidden [B, M, D] -> logits [B, M, V] float32, by the tied word table or `lm_head/decoder`.

    The activation is the exact gelu whatever `hidden_act` is, as in transformers.
    """
    head = params["lm_head"]
    x = ACTIVATIONS["gelu"](project(head["dense"], "bmd,de->bme", hidden))
    x = layer_norm(head["norm"], x, config.layer_norm_eps)
    decoder = params["embeddings"]["word"] if config.tie_word_embeddings else head["decoder"]
    logits = jnp.einsum(
        "bmd,vd->bmv", x, decoder.astype(x.dtype), preferred_element_type=jnp.float32
    )
    return constrain(logits, "BMV") + head["bias"]


def pool(params: dict, first: Array) -> Array:
    """tanh of a dense layer, over hidden states of first tokens: [..., D] -> [..., D]."""
    return jnp.tanh(project(params["pooler"], "...d,de->...e", first))


def classifier_dropout(x: Array, config: RobertaPreLayerNormConfig, rngs: Array | None) -> Array:
    rate = config.classifier_dropout
    return dropout(x, config.hidden_dropout_prob if rate is None else rate, rngs)


class Base(TableModule):
    """The encoder and its pooler: transformers' model without a head."""

    @nn.compact
    def __call__(
        self,
        *inputs: Any,
        deterministic: bool = True,
        dropout_rngs: Array | None = None,
        **kwargs: Any,
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s. Returns pooled [B, D] and the encoder's output."""
        params = self.get_params("base")
        [rng] = self.make_dropout_rngs(1, deterministic, dropout_rngs)
        output = self.encode(params, *inputs, dropout_rng=rng, **kwargs)
        return pool(params, output.last_hidden_state[:, 0]), output


class MaskedLM(TableModule):
    """The encoder with the masked-language-model head."""

    @nn.compact
    def __call__(
        self,
        *inputs: Any,
        deterministic: bool = True,
        dropout_rngs: Array | None = None,
        **kwargs: Any,
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s.

        Returns:
            logits [B, L, V] float32, or [B, M, V] at `read_positions`, and the encoder's output.
        """
        params = self.get_params("masked_lm")
        [rng] = self.make_dropout_rngs(1, deterministic, dropout_rngs)
        output = self.encode(params, *inputs, dropout_rng=rng, **kwargs)
        return lm_logits(params, self.config, output.last_hidden_state), output

    @nn.compact
    def hidden(
        self,
        *inputs: Any,
        deterministic: bool = True,
        dropout_rngs: Array | None = None,
        **kwargs: Any,
    ) -> Array:
        """The hidden states without the head: [B, L, D], or [B, M, D] at `read_positions`."""
        [rng] = self.make_dropout_rngs(1, deterministic, dropout_rngs)
        params = self.get_params("masked_lm")
        return self.encode(params, *inputs, dropout_rng=rng, **kwargs).last_hidden_state


class CausalLM(TableModule):
    """The decoder with the language-model head: logits at t predict the token at t + 1."""

    @nn.compact
    def __call__(
        self,
        *inputs: Any,
        deterministic: bool = True,
        dropout_rngs: Array | None = None,
        **kwargs: Any,
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s. Returns logits [B, L, V] float32 and the encoder's output.

        Raises:
            InputError: the config has is_decoder=False: every token would see what it predicts.
        """
        if not self.config.is_decoder:
            raise InputError("config: is_decoder=False, expected True for a causal language model")
        params = self.get_params("causal_lm")
        [rng] = self.make_dropout_rngs(1, deterministic, dropout_rngs)
        output = self.encode(params, *inputs, dropout_rng=rng, **kwargs)
        return lm_logits(params, self.config, output.last_hidden_state), output


def _read_first_position(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by which the last block is computed at position 0 alone.

    Unchanged if they have `read_positions`, or if outputs of all positions are to be returned.
    """
    if kwargs.get("keep_residuals") or kwargs.get("keep_attentions"):
        return kwargs
    if kwargs.get("read_positions") is not None:
        return kwargs
    return {**kwargs, "read_positions": jnp.zeros((1, 1), jnp.int32)}


class SequenceClassification(TableModule):
    """The encoder and a two-layer classifier over `<s>`."""

    @nn.compact
    def __call__(
        self,
        *inputs: Any,
        deterministic: bool = True,
        dropout_rngs: Array | None = None,
        **kwargs: Any,
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s.

        Returns:
            logits [B, C], and the encoder's output. The last block computes position 0 alone,
            which is exact, unless residuals or attentions are kept. For packed rows: logits
            [R, Q, C] at `read_positions` [R, Q], the starts of the packed sequences.
        """
        params = self.get_params("sequence_classification")
        rng, *head_rngs = self.make_dropout_rngs(3, deterministic, dropout_rngs)
        packed = kwargs.get("read_positions") is not None
        output = self.encode(params, *inputs, dropout_rng=rng, **_read_first_position(kwargs))
        x = output.last_hidden_state if packed else output.last_hidden_state[:, 0]
        x = classifier_dropout(x, self.config, head_rngs[0])
        x = jnp.tanh(project(params["classifier"]["dense"], "...d,de->...e", x))
        x = classifier_dropout(x, self.config, head_rngs[1])
        return project(params["classifier"]["output"], "...e,ec->...c", x), output


class MultipleChoice(TableModule):
    """The encoder, its pooler and one score per choice."""

    @nn.compact
    def __call__(
        self,
        *inputs: Any,
        deterministic: bool = True,
        dropout_rngs: Array | None = None,
        **kwargs: Any,
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s; those of a row have an axis of choices after B: [B, A, L].

        Returns:
            logits [B, A], and the encoder's output over B * A rows. For packed rows, whose
            arguments have no axis of choices: logits [R, Q, A] at `read_positions` [R, Q, A], the
            starts of the choices of up to Q questions.
        """
        params = self.get_params("multiple_choice")
        if (read_positions := kwargs.get("read_positions")) is not None:
            rng, head_rngs = self.make_dropout_rngs(2, deterministic, dropout_rngs)
            kwargs = {**kwargs, "read_positions": read_positions.reshape(len(read_positions), -1)}
            output = self.encode(params, *inputs, dropout_rng=rng, **kwargs)
            scores = self._scores(params, output.last_hidden_state, head_rngs)
            return scores.reshape(read_positions.shape), output
        per_choice = {name: kwargs[name] for name in _PER_CHOICE & kwargs.keys()}
        B, A = next(x.shape[:2] for x in (*inputs, *per_choice.values()) if x is not None)
        inputs, per_choice = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (inputs, per_choice)
        )
        if dropout_rngs is not None:
            dropout_rngs = split_rngs(dropout_rngs, A).T.reshape(-1)
        rng, head_rngs = self.make_dropout_rngs(2, deterministic, dropout_rngs)
        kwargs = _read_first_position({**kwargs, **per_choice})
        output = self.encode(params, *inputs, dropout_rng=rng, **kwargs)
        scores = self._scores(params, output.last_hidden_state[:, 0], head_rngs)
        return scores.reshape(B, A), output

    def _scores(self, params: dict, first: Array, rngs: Array | None) -> Array:
        """Hidden states of first tokens [..., D] -> [..., 1]."""
        x = dropout(pool(params, first), self.config.hidden_dropout_prob, rngs)
        return project(params["classifier"], "...d,dc->...c", x)


_PER_CHOICE = {
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
        self,
        *inputs: Any,
        deterministic: bool = True,
        dropout_rngs: Array | None = None,
        **kwargs: Any,
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s. Returns logits [B, L, C] and the encoder's output."""
        params = self.get_params("token_classification")
        rng, head_rngs = self.make_dropout_rngs(2, deterministic, dropout_rngs)
        output = self.encode(params, *inputs, dropout_rng=rng, **kwargs)
        x = classifier_dropout(output.last_hidden_state, self.config, head_rngs)
        return project(params["classifier"], "bld,dc->blc", x), output


class QuestionAnswering(TableModule):
    """The encoder and two logits per token: for the answer's start and its end."""

    @nn.compact
    def __call__(
        self,
        *inputs: Any,
        deterministic: bool = True,
        dropout_rngs: Array | None = None,
        **kwargs: Any,
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s. Returns logits [B, L, 2], start and end, and the output."""
        params = self.get_params("question_answering")
        [rng] = self.make_dropout_rngs(1, deterministic, dropout_rngs)
        output = self.encode(params, *inputs, dropout_rng=rng, **kwargs)
        return project(params["span"], "bld,dc->blc", output.last_hidden_state), output


# Model of the parameter table -> its module.
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

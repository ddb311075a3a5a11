"""What stands on the encoder: heads, their Linen modules and their losses.

Every loss is a (sum, weight) pair. The mean is taken once, over all rows, accumulation steps and
devices: a mean of means is wrong as soon as masked tokens differ in number.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.modeling import (
    ACTIVATIONS,
    EncoderOutput,
    TableModule,
    encode,
    layer_norm,
    project,
)

Array = jax.Array


@flax.struct.dataclass
class Scores:
    """Sums over counted targets; divide by `weight` once, at the very end.

    Attributes:
        loss: [] float32, summed negative log likelihood in nats.
        correct: [] float32, targets that are the most likely token.
        weight: [] float32, how many targets counted.
    """

    loss: Array
    correct: Array
    weight: Array

    def __add__(self, other: Scores) -> Scores:
        return jax.tree.map(jnp.add, self, other)

    @classmethod
    def zero(cls) -> Scores:
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def cross_entropy(logits: Array, labels: Array, weights: Array) -> Scores:
    """Scores of logits [..., V] against labels [...] int, counted by weights [...] float32."""
    logits = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return Scores(
        loss=((log_normalizer - label_logits) * weights).sum(),
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
    return logits + head["bias"]


class MaskedLM(TableModule):
    """The encoder with the masked-language-model head."""

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
        read_positions: Array | None = None,
        deterministic: bool = True,
        keep_residuals: bool = False,
    ) -> tuple[Array, EncoderOutput]:
        """Arguments as `Encoder`'s.

        Returns:
            logits [B, L, V] float32, or [B, M, V] at `read_positions`, and the encoder's output.
        """
        p = self.tree("masked_lm")
        output = encode(
            p,
            self.config,
            self.execution,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            segment_ids,
            read_positions,
            self.dropout_key(deterministic),
            keep_residuals,
        )
        return lm_logits(p, self.config, output.last_hidden_state), output


def masked_lm_scores(
    module: MaskedLM, params: dict, batch: dict[str, Array], dropout_key: Array | None = None
) -> Scores:
    """Scores of one batch of masked rows: logits are computed at masked positions alone.

    Args:
        batch: input_ids, segment_ids, position_ids [B, L] int; masked_positions, masked_labels
            [B, M] int; masked_weights [B, M] float32 (`data/loader.py` makes it).
        dropout_key: None evaluates without dropout.
    """
    logits, _ = module.apply(
        {"params": params},
        batch["input_ids"],
        position_ids=batch["position_ids"],
        segment_ids=batch["segment_ids"],
        read_positions=batch["masked_positions"],
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return cross_entropy(logits, batch["masked_labels"], batch["masked_weights"])

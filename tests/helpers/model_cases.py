"""Cases of every Flax class: odd configurations, inputs and targets, losses and gradients.

Rows are as long as the position table allows, padded on every side, of one token, and all padding.
"""

import functools

import jax
import numpy as np

from prelnroberta.pretrained.hf_checkpoint import to_state_dict
from tests.helpers.small_models import (
    ODD,
    SMALL,
    TWO_TYPES,
    flax_model,
    ragged_batch,
    random_params,
)

ROW_LENGTH = 11


MODEL_CASES = {
    "base": ("base", ODD),
    "base_encoder": ("encoder", TWO_TYPES.replace(hidden_act="silu")),
    "masked_lm": ("masked_lm", SMALL),
    "causal_lm": ("causal_lm", ODD.replace(is_decoder=True)),
    "cross": ("causal_lm", SMALL.replace(is_decoder=True, add_cross_attention=True)),
    "single_label": ("sequence_classification", ODD.replace(num_labels=5)),
    "regression": ("sequence_classification", TWO_TYPES.replace(num_labels=1)),
    "multi_label": ("sequence_classification", SMALL.replace(num_labels=3)),
    "multiple_choice": ("multiple_choice", TWO_TYPES),
    "token": ("token_classification", ODD.replace(num_labels=7)),
    "span": ("question_answering", SMALL),
}


def with_minimal_positions(cases, **changes):
    """The same cases with no more positions than rows of ROW_LENGTH tokens need."""
    return {
        kind: (
            model,
            config.replace(max_position_embeddings=ROW_LENGTH + config.pad_token_id + 1, **changes),
        )
        for kind, (model, config) in cases.items()
    }


MODEL_CASES = with_minimal_positions(MODEL_CASES)


def case_batch(model, config, kind):
    """Inputs and targets of one case.

    No target reads the row of pads: torch's additive masks send gradients through its softmax,
    where ours, which selects, has none.
    """
    rng = np.random.default_rng(3)
    batch = ragged_batch(config, L=ROW_LENGTH)
    labels = batch.pop("labels")
    if kind == "regression":
        return batch | {"labels": rng.standard_normal(5).astype(np.float32)}
    if kind == "multi_label":
        return batch | {"labels": (rng.random((5, 3)) < 0.5).astype(np.float32)}
    of_pads = dict.fromkeys(batch, 0) | {"input_ids": config.pad_token_id}
    batch = {k: np.concatenate([v, np.full((1, ROW_LENGTH), of_pads[k])]) for k, v in batch.items()}
    labels = np.concatenate([labels, np.full((1, ROW_LENGTH), -100)])
    if model == "multiple_choice":
        return {k: np.stack([v, v[::-1]], 1) for k, v in batch.items()} | {
            "labels": np.array([-100, 1, 1, 0, 0, -100])
        }
    if model in ("base", "encoder"):
        return batch
    if kind == "cross":
        states = rng.standard_normal((6, 6, config.hidden_size)).astype(np.float32)
        batch["encoder_hidden_states"] = 2 * states + 1
        batch["encoder_attention_mask"] = np.array([[1] * 6, [1, 1, 1, 0, 0, 0]] * 3)
    if model == "causal_lm":
        # A pad before all others sees nothing in a causal row: the same as a row of pads.
        labels[:, 1:][batch["attention_mask"][:, :-1] == 0] = -100
    if model == "question_answering":
        return batch | {
            "start_positions": np.array([3, 0, 10, 40, 11, 40]),
            "end_positions": np.array([5, 2, 11, 7, 4, 40]),
        }
    if model == "token_classification":
        labels = np.where(labels == -100, -100, labels % config.num_labels)
    elif kind == "single_label":
        labels = np.array([0, config.num_labels - 1, -100, 2, 1, -100])
    return batch | {"labels": labels}


@functools.cache  # one compilation for the tests of a process
def flax_loss_and_gradients(kind, model, config):
    """Our loss, output and gradients, and the weights of outputs whose sum takes the place of a
    loss where there is none."""
    params, batch = random_params(config, model), case_batch(model, config, kind)
    ours = flax_model(model, config)
    weight = np.linspace(-1, 1, 6 * ROW_LENGTH * config.hidden_size, dtype=np.float32)
    weight = weight.reshape(6, ROW_LENGTH, -1) * (np.arange(6) < 5)[:, None, None]

    def loss(params):
        output = ours(**batch, params=params, output_hidden_states=True, output_attentions=True)
        if model not in ("base", "encoder"):
            return output.loss, output
        value = (output.last_hidden_state * weight).sum()
        if model == "base":
            value = value + (output.pooler_output * weight[:, 0]).sum()
        return value, output

    (value, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, output, to_state_dict(gradients, config, model), weight

"""Generated tokens and filters against transformers' `generate`."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from prelnroberta.inference.generation import (
    generate,
    keep_top_k,
    keep_top_p,
)
from prelnroberta.inference.generation_config import GenerationConfig
from tests.helpers.toy_decoders import PAD, pad_toy_prompts, trigram

pytestmark = [pytest.mark.torch, pytest.mark.oracle]


class TorchTrigram(transformers.PreTrainedModel, transformers.GenerationMixin):
    config_class = transformers.PretrainedConfig
    base_model_prefix = "trigram"

    def __init__(self, table: np.ndarray):
        super().__init__(transformers.PretrainedConfig(vocab_size=len(table), use_cache=False))
        self.table = torch.nn.Parameter(torch.from_numpy(table))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **unused):
        before = torch.nn.functional.pad(input_ids, (1, 0))[:, :-1]
        return transformers.modeling_outputs.CausalLMOutput(logits=self.table[before, input_ids])


MANY_ENDS = {  # few tokens: two can be said in many orders, to the same score
    "max_new_tokens": 5,
    "num_beams": 3,
    "num_return_sequences": 3,
    "eos_token_id": (0, 2, 3, 4, 5, 6),
    "length_penalty": 4.0,
    "early_stopping": "never",
}
HUGGING_FACE = [
    {},
    {"eos_token_id": (3, 4, 5), "min_new_tokens": 4},
    {"max_length": 13, "min_length": 8},
    {"repetition_penalty": 1.7},
    {"num_beams": 4, "num_return_sequences": 3},
    {"num_beams": 3, "length_penalty": 2.5, "early_stopping": True},
    {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": 1.5, "early_stopping": "never", "min_new_tokens": 3},
    MANY_ENDS,
    {"num_beams": 3, "repetition_penalty": 2.5, "eos_token_id": (3,)},
]


@pytest.mark.parametrize("changes", HUGGING_FACE, ids=str)
def test_generated_tokens_match_transformers(changes):
    V, eos = 8, (2, 3)
    prompts = [(5, 3, 2, 4), (7, 2), (4, 4, 6), (0, 6)]
    ids, mask = pad_toy_prompts(prompts)
    fields = {"eos_token_id": eos, "pad_token_id": PAD} | changes
    if "max_length" not in fields:
        fields.setdefault("max_new_tokens", 8)
    settings = GenerationConfig(**fields)
    for seed in range(4):
        table = 1.5 * np.random.default_rng(seed).standard_normal((V, V, V)).astype(np.float32)
        cache = {"pair": jnp.full((len(prompts), 2), PAD, jnp.int32)}
        ours = generate(trigram, table, cache, ids, mask, settings)
        asked = transformers.GenerationConfig(
            **fields | {"eos_token_id": list(settings.eos_token_ids)},
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        theirs = TorchTrigram(table).generate(
            torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask),
            generation_config=asked,
        )
        width = ours.sequences.shape[1]
        sequences = torch.nn.functional.pad(
            theirs.sequences, (0, width - theirs.sequences.shape[1]), value=PAD
        )
        np.testing.assert_array_equal(ours.sequences, sequences.numpy())
        if settings.num_beams > 1:
            np.testing.assert_allclose(ours.scores, theirs.sequences_scores.numpy(), atol=1e-5)


def test_top_k_and_top_p_match_transformers():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((200, 17)).astype(np.float32)
    for k in (1, 2, 5, 17, 40):
        theirs = TopKLogitsWarper(k)(None, torch.from_numpy(logits)).numpy()
        np.testing.assert_array_equal(keep_top_k(jnp.array(logits), k), theirs)
    for p in (0.01, 0.3, 0.8, 0.95, 0.999):
        theirs = TopPLogitsWarper(p)(None, torch.from_numpy(logits)).numpy()
        np.testing.assert_array_equal(keep_top_p(jnp.array(logits), p), theirs)

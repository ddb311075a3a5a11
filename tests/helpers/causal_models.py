"""A causal model whose generated tokens can be checked one by one."""

import numpy as np

from prelnroberta import FlaxRobertaPreLayerNormForCausalLM
from tests.helpers.small_models import TINY, random_params

CAUSAL_CONFIG = TINY.replace(vocab_size=60, is_decoder=True, eos_token_id=None)
PROMPTS = [[0, 5, 6, 7, 8], [9, 10], [11]]
NEW = 5


def causal_model():
    made = FlaxRobertaPreLayerNormForCausalLM(CAUSAL_CONFIG, _do_init=False)
    made.params = random_params(CAUSAL_CONFIG, "causal_lm")
    # Never a pad: it is no token, as in every forward pass; transformers' `generate` counts it.
    made.params["lm_head"]["bias"][CAUSAL_CONFIG.pad_token_id] = -50
    return made


def pad_prompts(prompts, side):
    width, pad = max(map(len, prompts)), CAUSAL_CONFIG.pad_token_id
    rows = [
        [pad] * (width - len(p)) + p if side == "left" else p + [pad] * (width - len(p))
        for p in prompts
    ]
    return np.array(rows)

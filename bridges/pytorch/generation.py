"""Decoding with a causal language model: greedy, sampling and beam search.

Computes the same as `prelnroberta/inference/generation.py`, ties included, which names the sources.
Here the loop over tokens is Python's.

Shape letters are those of `prelnroberta/params.py`. R is B x W with beams, otherwise
B x num_return_sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bridges.pytorch.input_checks import check_inputs
from bridges.pytorch.kv_cache import KVCache
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.inference.generation import GenerationOutput
from prelnroberta.inference.generation_config import GenerationConfig
from prelnroberta.pretrained.outputs import BaseModelOutput

NEG_INF = float("-inf")

# decode(input_ids [R, L], attention_mask [R, L], cache) -> (logits [R, V] float32, cache): the
# logits are those of each row's last visible token.
Decode = Callable[[Tensor, Tensor, KVCache], tuple[Tensor, KVCache]]


class CausalLM(Protocol):
    """The model that `generate` needs: a decoder and a head."""

    config: RobertaPreLayerNormConfig
    roberta_prelayernorm: Callable[..., BaseModelOutput]
    lm_head: Callable[[Tensor], Tensor]


def generate(
    model: CausalLM,
    input_ids: Tensor,
    attention_mask: Tensor,
    settings: GenerationConfig,
    generator: torch.Generator | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> GenerationOutput:
    """Continues prompts [B, L]. Each prompt is read once, whatever the number of continuations.

    Raises:
        InputError: a row without a token, ids outside the vocabulary, or rows that would exceed
            the model's positions.
    """
    B, L = input_ids.shape
    min_new, max_new = settings.new_token_bounds(L)
    mask = attention_mask != 0
    _check_prompts(model.config, input_ids, mask, settings, max_new)

    def decode(
        input_ids: Tensor, mask: Tensor, cache: KVCache | None, **encoder_inputs: Tensor | None
    ) -> tuple[Tensor, KVCache]:
        output = model.roberta_prelayernorm(
            input_ids,
            mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **encoder_inputs,
        )
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        hidden = output.last_hidden_state[torch.arange(len(mask), device=last.device), last]
        return model.lm_head(hidden).float(), output.past_key_values

    logits, cache = decode(
        input_ids,
        mask,
        None,
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
    )
    per_prompt = settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences
    prompt_index = torch.arange(B, device=mask.device).repeat_interleave(per_prompt)
    seen = None
    if settings.repetition_penalty != 1.0:
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=mask.device)
        seen = seen.scatter_reduce(1, input_ids.long(), mask, "amax")[prompt_index]
    logits, cache = logits[prompt_index], cache.reorder(prompt_index)

    search = _beam_search if settings.num_beams > 1 else _greedy_or_sample
    new_tokens, scores = search(
        settings, (min_new, max_new), decode, logits, cache, seen, generator
    )
    prompts = input_ids.long().repeat_interleave(settings.num_return_sequences, 0)
    return GenerationOutput(torch.cat([prompts, new_tokens], 1), scores)


def _check_prompts(
    config: RobertaPreLayerNormConfig,
    input_ids: Tensor,
    mask: Tensor,
    settings: GenerationConfig,
    max_new: int,
) -> None:
    check_inputs(config, {"input_ids": input_ids, "attention_mask": mask}, with_cache=True)
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"generate: attention_mask of row {empty[0]} is all 0: a prompt needs a token"
        )
    for token in (*settings.eos_token_ids, settings.pad_token_id):
        if token >= config.vocab_size:
            raise InputError(
                f"generation: eos or pad id {token}, expected one in [0, V={config.vocab_size})"
            )
    longest = int((input_ids != config.pad_token_id).sum(-1).max())
    config.check_length(longest + max_new - 1, "a prompt and its continuation")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Lowers the logits [R, V] of `seen` [R, V] bool tokens, whatever their sign."""
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets logits [R, V] below the k-th greatest to -inf."""
    kth = logits.topk(min(k, logits.shape[-1]), -1).values[:, -1:]
    return logits.masked_fill(logits < kth, NEG_INF)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the smallest set of logits [R, V] with probability >= p; sets the others to -inf."""
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = sorted_logits.softmax(-1)
    probs_before = probs.cumsum(-1) - probs
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, probs_before < p)
    return logits.masked_fill(~kept, NEG_INF)


def _process_logits(
    settings: GenerationConfig, min_new: int, step: int, seen: Tensor | None, logits: Tensor
) -> Tensor:
    """Applies the repetition penalty and the minimum length to logits or log-probs [R, V]."""
    if seen is not None:
        logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    if settings.eos_token_ids and step < min_new:
        logits = logits.index_fill(1, _eos_tensor(settings, logits.device), NEG_INF)
    return logits


def _eos_tensor(settings: GenerationConfig, device: torch.device) -> Tensor:
    return torch.tensor(settings.eos_token_ids, dtype=torch.long, device=device)


def _greedy_or_sample(
    settings: GenerationConfig,
    bounds: tuple[int, int],
    decode: Decode,
    logits: Tensor,
    cache: KVCache,
    seen: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, None]:
    """New tokens [R, G], from the logits [R, V] after the prompts."""
    min_new, max_new = bounds
    running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    tokens = torch.full((len(logits), max_new), settings.pad_token_id, device=logits.device)
    for step in range(max_new):
        if step:
            logits, cache = decode(tokens[:, step - 1 : step], running[:, None], cache)
        logits = _process_logits(settings, min_new, step, seen, logits)
        token = _sample(settings, logits, generator) if settings.do_sample else logits.argmax(-1)
        token = token.where(running, settings.pad_token_id)
        tokens[:, step] = token
        running = running & ~torch.isin(token, _eos_tensor(settings, token.device))
        if seen is not None:
            seen = seen.scatter(1, token[:, None], True)
        if not running.any():
            break
    return tokens, None


def _sample(
    settings: GenerationConfig, logits: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Tokens [R] sampled from logits [R, V]."""
    logits = logits / settings.temperature
    if settings.top_k is not None:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p < 1.0:
        logits = keep_top_p(logits, settings.top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _beam_search(
    settings: GenerationConfig,
    bounds: tuple[int, int],
    decode: Decode,
    logits: Tensor,
    cache: KVCache,
    seen: Tensor | None,
    generator: None,
) -> tuple[Tensor, Tensor]:
    """The best finished sequences and their scores, from the logits [B * W, V] after the prompts.

    Each step considers enough candidates that W can continue even if every beam ends. A finished
    candidate is kept only if it is among the best W.

    Returns [B * num_return_sequences, G] and [B * num_return_sequences].
    """
    min_new, max_new = bounds
    W, (R, V), device = settings.num_beams, logits.shape, logits.device
    B = R // W
    rows = torch.arange(B, device=device)[:, None]
    num_candidates = min(max(2, 1 + len(settings.eos_token_ids)) * W, W * V)
    among_best = torch.arange(num_candidates, device=device) < W
    running = torch.ones(B, dtype=torch.bool, device=device)
    tokens = torch.full((B, W, max_new), settings.pad_token_id, device=device)
    scores = torch.full((B, W), NEG_INF, device=device)
    finished_tokens, finished_scores = tokens, scores
    # One beam at first: W equal beams would stay equal.
    scores = scores.index_fill(1, torch.zeros(1, dtype=torch.long, device=device), 0.0)
    for step in range(max_new):
        if step:
            newest = tokens[:, :, step - 1].reshape(R, 1)
            logits, cache = decode(newest, running.repeat_interleave(W)[:, None], cache)
        log_probs = _process_logits(settings, min_new, step, seen, F.log_softmax(logits, -1))
        totals = (log_probs.view(B, W, V) + scores[:, :, None]).view(B, W * V)
        scores, choice = totals.topk(num_candidates, -1)
        beam, token = choice // V, choice % V
        tokens = tokens[rows, beam].clone()
        tokens[:, :, step] = token
        ends = torch.isin(token, _eos_tensor(settings, device)) | (step == max_new - 1)

        final_scores = scores / float(step + 1) ** settings.length_penalty
        final_scores = final_scores.masked_fill(~(ends & among_best & running[:, None]), NEG_INF)
        finished_scores, kept = _stable_topk(torch.cat([finished_scores, final_scores], 1), W)
        finished_tokens = torch.cat([finished_tokens, tokens], 1)[rows, kept]

        scores, kept = _stable_topk(scores.masked_fill(ends, NEG_INF), W)
        parent = (rows * W + beam[rows, kept]).flatten()
        tokens, token = tokens[rows, kept], token[rows, kept].flatten()
        cache = cache.reorder(parent)
        if seen is not None:
            seen = seen[parent].scatter(1, token[:, None], True)
        running = running & _can_improve(settings, scores, finished_scores, step + 1, max_new)
        if not running.any():
            break
    returned = settings.num_return_sequences
    return finished_tokens[:, :returned].flatten(0, 1), finished_scores[:, :returned].flatten()


def _can_improve(
    settings: GenerationConfig,
    scores: Tensor,
    finished_scores: Tensor,
    length: int,
    max_new: int,
) -> Tensor:
    """[B] bool: whether a running beam may still beat the worst finished sequence.

    Log-probabilities only fall, so with a positive penalty the greatest length scores best.
    """
    if settings.early_stopping == "never" and settings.length_penalty > 0:
        length = max_new
    best_score = scores[:, 0] / float(length) ** settings.length_penalty
    can_improve = best_score > finished_scores[:, -1]
    if settings.early_stopping is True:
        can_improve &= finished_scores[:, -1].isneginf()
    return can_improve


def _stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest of [B, n]; equal ones, such as -inf, keep their order."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], order[:, :k]

"""Decoding with a causal language model: greedy, sampling and beam search.

What is computed, and which of equals is taken, is as in `prelnroberta/inference/generation.py`, which says
where it comes from; here the loop is Python's.

    B rows  L prompt columns  W beams  R rows decoded at once (B x W, or B x returned sequences)
    G new columns  V vocab
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bridges.pytorch.kv_cache import Cache
from prelnroberta.errors import InputError
from prelnroberta.inference.generation import GenerationOutput
from prelnroberta.inference.generation_config import Generation

if TYPE_CHECKING:
    from bridges.pytorch.task_models import RobertaPreLayerNormForCausalLM

LOWEST = float("-inf")

# Reads tokens [R, 1], real where [R, 1] says so, after a cache: logits [R, V] float32, new cache.
Step = Callable[[Tensor, Tensor, Cache], tuple[Tensor, Cache]]


def generate(
    model: RobertaPreLayerNormForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor,
    settings: Generation,
    generator: torch.Generator | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> GenerationOutput:
    """Continues every row of prompts [B, L]; a prompt is read once, however many go on from it.

    Raises:
        InputError: for a row without a token, ids outside the vocabulary, or rows that would
            outgrow the model's positions.
    """
    B, L = input_ids.shape
    least, most = settings.new_tokens(L)
    mask = attention_mask != 0
    _check(model, input_ids, mask, settings, most)

    def read(tokens: Tensor, real: Tensor, cache: Cache | None, **states: Tensor | None):
        output = model.roberta_prelayernorm(
            tokens, real, past_key_values=cache, use_cache=True, return_dict=True, **states
        )
        # The newest real column of each row is all that is needed of the logits.
        last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
        hidden = output.last_hidden_state[torch.arange(len(tokens), device=last.device), last]
        return model.lm_head(hidden).float(), output.past_key_values

    logits, cache = read(
        input_ids,
        mask,
        None,
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
    )
    copies = settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences
    rows = torch.arange(B, device=mask.device).repeat_interleave(copies)
    seen = None
    if settings.repetition_penalty != 1.0:
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=mask.device)
        seen = seen.scatter_reduce(1, input_ids.long(), mask, "amax")[rows]
    logits, cache = logits[rows], cache.reorder(rows)

    search = _beams if settings.num_beams > 1 else _samples
    new, scores = search(settings, (least, most), read, logits, cache, seen, generator)
    prompts = input_ids.long().repeat_interleave(settings.num_return_sequences, 0)
    return GenerationOutput(torch.cat([prompts, new], 1), scores)


def _check(
    model: RobertaPreLayerNormForCausalLM,
    input_ids: Tensor,
    mask: Tensor,
    settings: Generation,
    most: int,
) -> None:
    config = model.config
    model.check({"input_ids": input_ids, "attention_mask": mask}, caches=True)
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"generate: attention_mask of row {empty[0]} is all 0: a prompt needs a token"
        )
    for token in (*settings.eos_ids, settings.pad_token_id):
        if token >= config.vocab_size:
            raise InputError(
                f"generation: eos or pad id {token}, expected one in [0, V={config.vocab_size})"
            )
    longest = int((input_ids != config.pad_token_id).sum(-1).max())
    config.check_length(longest + most - 1, "a prompt and its continuation")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes `seen` [R, V] bool tokens of logits [R, V] less likely, whatever their sign."""
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets all but the k greatest logits [R, V], and those equal to the k-th, to -inf."""
    kth = logits.topk(min(k, logits.shape[-1]), -1).values[:, -1:]
    return logits.masked_fill(logits < kth, LOWEST)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Sets all logits [R, V] to -inf but the smallest set's with probability >= p; one at least."""
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = sorted_logits.softmax(-1)
    before = probability.cumsum(-1) - probability
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < p)
    return logits.masked_fill(~kept, LOWEST)


def _constrain(
    settings: Generation, least: int, step: int, seen: Tensor | None, logits: Tensor
) -> Tensor:
    """Logits, or log-probabilities, [R, V] under what every way of choosing obeys."""
    if seen is not None:
        logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    if settings.eos_ids and step < least:
        logits = logits.index_fill(1, _eos(settings, logits), LOWEST)
    return logits


def _eos(settings: Generation, like: Tensor) -> Tensor:
    return torch.tensor(settings.eos_ids, dtype=torch.long, device=like.device)


def _samples(
    settings: Generation,
    bounds: tuple[int, int],
    read: Step,
    logits: Tensor,
    cache: Cache,
    seen: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, None]:
    """New tokens [R, G], the most likely or drawn, from the logits [R, V] after the prompts."""
    least, most = bounds
    running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    tokens = torch.full((len(logits), most), settings.pad_token_id, device=logits.device)
    for step in range(most):
        if step:
            logits, cache = read(tokens[:, step - 1 : step], running[:, None], cache)
        logits = _constrain(settings, least, step, seen, logits)
        if settings.do_sample:
            logits = logits / settings.temperature
            if settings.top_k is not None:
                logits = keep_top_k(logits, settings.top_k)
            if settings.top_p < 1.0:
                logits = keep_top_p(logits, settings.top_p)
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        token = token.where(running, settings.pad_token_id)
        tokens[:, step] = token
        running = running & ~torch.isin(token, _eos(settings, token))
        if seen is not None:
            seen = seen.scatter(1, token[:, None], True)
        if not running.any():
            break
    return tokens, None


def _beams(
    settings: Generation,
    bounds: tuple[int, int],
    read: Step,
    logits: Tensor,
    cache: Cache,
    seen: Tensor | None,
    generator: None,
) -> tuple[Tensor, Tensor]:
    """The best ended sequences [B * returned, G] and their scores, from logits [B * W, V].

    Each step considers so many of the best extensions that W are left to run should every beam
    end. An ended one is kept only if it is among the best W of all.
    """
    least, most = bounds
    W, (R, V), device = settings.num_beams, logits.shape, logits.device
    B = R // W
    rows = torch.arange(B, device=device)[:, None]
    considered = min(max(2, 1 + len(settings.eos_ids)) * W, W * V)
    running = torch.ones(B, dtype=torch.bool, device=device)
    tokens = torch.full((B, W, most), settings.pad_token_id, device=device)
    scores = torch.full((B, W), LOWEST, device=device)
    ended_tokens, ended_scores = tokens, scores
    scores = scores.index_fill(1, torch.zeros(1, dtype=torch.long, device=device), 0.0)
    for step in range(most):
        if step:
            newest = tokens[:, :, step - 1].reshape(R, 1)
            logits, cache = read(newest, running.repeat_interleave(W)[:, None], cache)
        log_p = _constrain(settings, least, step, seen, F.log_softmax(logits, -1))
        totals = (log_p.view(B, W, V) + scores[:, :, None]).view(B, W * V)
        scores, choice = totals.topk(considered, -1)
        parent, token = choice // V, choice % V
        tokens = tokens[rows, parent].clone()
        tokens[:, :, step] = token
        ends = torch.isin(token, _eos(settings, token)) | (step == most - 1)

        final = scores / float(step + 1) ** settings.length_penalty
        first = torch.arange(considered, device=device) < W
        final = final.masked_fill(~(ends & first & running[:, None]), LOWEST)
        ended_scores, kept = _best(torch.cat([ended_scores, final], 1), W)
        ended_tokens = torch.cat([ended_tokens, tokens], 1)[rows, kept]

        scores, kept = _best(scores.masked_fill(ends, LOWEST), W)
        origin = (rows * W + parent[rows, kept]).flatten()
        tokens, token = tokens[rows, kept], token[rows, kept].flatten()
        cache = cache.reorder(origin)
        if seen is not None:
            seen = seen[origin].scatter(1, token[:, None], True)

        # Log-probabilities only fall, so with a positive penalty the greatest length is the best.
        length = float(step + 1)
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            length = float(most)
        goes_on = scores[:, 0] / length**settings.length_penalty > ended_scores[:, -1]
        if settings.early_stopping is True:
            goes_on &= ended_scores[:, -1].isneginf()
        running = running & goes_on
        if not running.any():
            break
    returned = settings.num_return_sequences
    return ended_tokens[:, :returned].flatten(0, 1), ended_scores[:, :returned].flatten()


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest of [B, n], the first of equals first: what is -inf stays in its place."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], order[:, :k]

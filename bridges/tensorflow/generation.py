"""Decoding with a causal language model: greedy, sampling and beam search as one `tf.while_loop`.

Follows `prelnroberta/inference/generation.py` step for step, so that greedy and beam search choose
the same tokens; its `generation_config.py` lists the options. Samples are drawn by TensorFlow's own
random numbers.

Shape letters are those of `prelnroberta/params.py`. R is B x W with beams, otherwise
B x num_return_sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from bridges.tensorflow.kv_cache import KVCache
from prelnroberta.inference.generation_config import GenerationConfig

Tensor = tf.Tensor
# The loop's variables: cache, step [], tokens [R, G], running [R] and, with a repetition penalty,
# seen [R, V] bool. With beams: tokens [B, W, G], running [B], scores [B, W], finished_tokens
# [B, W, G] and finished_scores [B, W].
State = dict[str, Any]

# decode(input_ids [R, L], attention_mask [R, L], cache) -> (logits [R, L, V] float32, cache).
Decode = Callable[[Tensor, Tensor, KVCache], tuple[Tensor, KVCache]]


class GenerationOutput(NamedTuple):
    """The result of `generate`; the num_return_sequences rows of each prompt are adjacent.

    Attributes:
        sequences: [B * num_return_sequences, L + G] int32: the prompts with their pads, then the
            new tokens, then pads.
        scores: [B * num_return_sequences] float32, of beam search alone, best first within a
            prompt; -inf marks a row of pads, if there are fewer sequences than requested.
    """

    sequences: Tensor
    scores: Tensor | None = None


def generate(
    decode: Decode,
    settings: GenerationConfig,
    cache: KVCache,
    input_ids: Tensor,
    mask: Tensor,
    seed: Tensor,
) -> GenerationOutput:
    """Continues prompts [B, L] int32. Each prompt is read once.

    Args:
        cache: for B rows and at least L + G - 1 more columns.
        mask: [B, L] int32, nonzero where input_ids is a token.
        seed: [2] int32. A row's samples depend only on it, the row's number and its content.
    """
    B, L = input_ids.shape
    min_new, max_new = settings.new_token_bounds(L)
    uses_beams = settings.num_beams > 1
    per_prompt = settings.num_beams if uses_beams else settings.num_return_sequences
    R = B * per_prompt
    logits, cache = decode(input_ids, mask, cache)
    last = L - 1 - tf.argmax(mask[:, ::-1], axis=1, output_type=tf.int32)
    logits = tf.gather(logits, last, batch_dims=1)
    prompt_index = tf.repeat(tf.range(B), per_prompt)
    seen = None
    if settings.repetition_penalty != 1.0:
        V = logits.shape[-1]
        one_hot = tf.one_hot(input_ids, V, on_value=True, off_value=False)
        seen = tf.reduce_any(one_hot & (mask != 0)[:, :, None], axis=1)
        seen = tf.gather(seen, prompt_index)
    state = _initial_state(settings, (B, max_new), reorder_cache(cache, prompt_index), seen)

    def advance(state: State, logits: Tensor) -> State:
        if uses_beams:
            return _advance_beams(settings, min_new, state, logits)
        return _advance_rows(settings, min_new, seed, state, logits)

    def should_continue(state: State) -> Tensor:
        return (state["step"] < max_new) & tf.reduce_any(state["running"])

    def body(state: State) -> tuple[State]:
        tokens = tf.reshape(state["tokens"], [R, max_new])
        newest = tf.gather(tokens, state["step"] - 1, axis=1)[:, None]
        running = tf.repeat(state["running"], R // state["running"].shape[0])[:, None]
        logits, cache = decode(newest, tf.cast(running, tf.int32), state["cache"])
        return (advance({**state, "cache": cache}, logits[:, -1]),)

    state = advance(state, tf.gather(logits, prompt_index))
    (state,) = tf.while_loop(should_continue, body, (state,))

    returned = settings.num_return_sequences
    new_tokens, scores = state["tokens"], None
    if uses_beams:
        new_tokens = tf.reshape(state["finished_tokens"][:, :returned], [-1, max_new])
        scores = tf.reshape(state["finished_scores"][:, :returned], [-1])
    prompts = tf.repeat(input_ids, returned, axis=0)
    return GenerationOutput(tf.concat([prompts, new_tokens], axis=1), scores)


def _initial_state(
    settings: GenerationConfig, shape: tuple[int, int], cache: KVCache, seen: Tensor | None
) -> State:
    """The state before the first new token; `shape` is (B, G)."""
    B, max_new = shape
    state = {"cache": cache, "step": tf.constant(0)}
    if seen is not None:
        state["seen"] = seen
    if settings.num_beams == 1:
        R = B * settings.num_return_sequences
        tokens = tf.fill([R, max_new], settings.pad_token_id)
        return {**state, "tokens": tokens, "running": tf.ones([R], tf.bool)}
    W = settings.num_beams
    tokens = tf.fill([B, W, max_new], settings.pad_token_id)
    no_scores = tf.fill([B, W], -math.inf)
    return {
        **state,
        "tokens": tokens,
        "running": tf.ones([B], tf.bool),
        # One beam at first: W equal beams would stay equal.
        "scores": tf.concat([tf.zeros([B, 1]), no_scores[:, 1:]], axis=1),
        "finished_tokens": tokens,
        "finished_scores": no_scores,
    }


def reorder_cache(cache: KVCache, index: Tensor) -> KVCache:
    """The cache of rows `index` [R]: repeated, dropped or reordered."""
    return tf.nest.map_structure(lambda x: tf.gather(x, index) if x.shape.rank else x, cache)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Lowers the logits [R, V] of `seen` [R, V] bool tokens, whatever their sign."""
    penalized = tf.where(logits < 0, logits * penalty, logits / penalty)
    return tf.where(seen, penalized, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets logits [R, V] below the k-th greatest to -inf."""
    kth = tf.math.top_k(logits, min(k, logits.shape[-1])).values[:, -1:]
    return tf.where(logits < kth, -math.inf, logits)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the smallest set of logits [R, V] with probability >= p; sets the others to -inf."""
    ranked = tf.math.top_k(logits, logits.shape[-1])
    probabilities = tf.nn.softmax(ranked.values)
    before = tf.cumsum(probabilities, axis=-1) - probabilities
    kept = tf.gather(before < p, tf.argsort(ranked.indices, axis=-1), batch_dims=1)
    return tf.where(kept, logits, -math.inf)


def _process_logits(
    settings: GenerationConfig, min_new: int, state: State, logits: Tensor
) -> Tensor:
    """Applies the repetition penalty and the minimum length to logits or log-probs [R, V]."""
    if "seen" in state:
        logits = penalize_repetition(logits, state["seen"], settings.repetition_penalty)
    if settings.eos_token_ids and min_new > 0:
        is_eos = _is_eos(settings, tf.range(logits.shape[-1]))
        logits = tf.where(is_eos & (state["step"] < min_new), -math.inf, logits)
    return logits


def _is_eos(settings: GenerationConfig, tokens: Tensor) -> Tensor:
    eos = tf.constant(settings.eos_token_ids, tf.int32)
    return tf.reduce_any(tokens[..., None] == eos, axis=-1)


def _advance_rows(
    settings: GenerationConfig, min_new: int, seed: Tensor, state: State, logits: Tensor
) -> State:
    """Greedy search and sampling: chooses each row's next token from its logits [R, V]."""
    logits = _process_logits(settings, min_new, state, logits)
    if settings.do_sample:
        logits = logits / settings.temperature
        if settings.top_k is not None:
            logits = keep_top_k(logits, settings.top_k)
        if settings.top_p < 1.0:
            logits = keep_top_p(logits, settings.top_p)
        samples = settings.num_return_sequences
        logits = logits + _gumbel_noise(seed, samples, state["step"], logits.shape)
    token = tf.argmax(logits, axis=-1, output_type=tf.int32)
    token = tf.where(state["running"], token, settings.pad_token_id)
    is_newest = tf.range(state["tokens"].shape[1]) == state["step"]
    new_state = {
        "step": state["step"] + 1,
        "tokens": tf.where(is_newest, token[:, None], state["tokens"]),
        "running": state["running"] & ~_is_eos(settings, token),
    }
    if "seen" in state:
        new_state["seen"] = _add_seen(state["seen"], token)
    return {**state, **new_state}


def _gumbel_noise(
    seed: Tensor, samples_per_prompt: int, step: Tensor, shape: tf.TensorShape
) -> Tensor:
    """[R, V]. Added to logits, it makes their argmax a sample. Each row has its own seed."""
    R, V = shape
    step_seed = tf.random.fold_in(seed, step)

    def row_noise(row: Tensor) -> Tensor:
        prompt_seed = tf.random.fold_in(step_seed, row // samples_per_prompt)
        row_seed = tf.random.fold_in(prompt_seed, row % samples_per_prompt)
        uniform = tf.random.stateless_uniform([V], row_seed, minval=1e-30)
        return -tf.math.log(-tf.math.log(uniform))

    return tf.map_fn(row_noise, tf.range(R), fn_output_signature=tf.TensorSpec([V], tf.float32))


def _advance_beams(settings: GenerationConfig, min_new: int, state: State, logits: Tensor) -> State:
    """Beam search: extends each prompt's beams by a token, given logits [B * W, V].

    Considers enough candidates that W can continue even if every beam ends. A finished candidate
    is kept only if it is among the best W (transformers' `_beam_search`).
    """
    B, W, max_new = state["tokens"].shape
    V, step = logits.shape[-1], state["step"]

    log_probs = _process_logits(settings, min_new, state, tf.nn.log_softmax(logits))
    totals = tf.reshape(log_probs, [B, W, V]) + state["scores"][:, :, None]
    num_candidates = min(max(2, 1 + len(settings.eos_token_ids)) * W, W * V)
    scores, choice = tf.math.top_k(tf.reshape(totals, [B, W * V]), num_candidates)
    beam, token = choice // V, choice % V
    is_newest = tf.range(max_new) == step
    tokens = tf.gather(state["tokens"], beam, batch_dims=1)
    tokens = tf.where(is_newest, token[:, :, None], tokens)
    ends = _is_eos(settings, token) | (step == max_new - 1)

    length = tf.cast(step + 1, tf.float32)
    may_finish = ends & (tf.range(num_candidates) < W) & state["running"][:, None]
    final_scores = tf.where(may_finish, scores / length**settings.length_penalty, -math.inf)
    finished_scores = tf.concat([state["finished_scores"], final_scores], axis=1)
    finished_scores, kept = tf.math.top_k(finished_scores, W)
    finished_tokens = tf.concat([state["finished_tokens"], tokens], axis=1)
    finished_tokens = tf.gather(finished_tokens, kept, batch_dims=1)

    scores, kept = tf.math.top_k(tf.where(ends, -math.inf, scores), W)
    parent = tf.range(B)[:, None] * W + tf.gather(beam, kept, batch_dims=1)
    parent = tf.reshape(parent, [-1])
    can_improve = _can_improve(settings, scores, finished_scores, length, max_new)
    new_state = {
        "cache": reorder_cache(state["cache"], parent),
        "step": step + 1,
        "tokens": tf.gather(tokens, kept, batch_dims=1),
        "running": state["running"] & can_improve,
        "scores": scores,
        "finished_tokens": finished_tokens,
        "finished_scores": finished_scores,
    }
    if "seen" in state:
        token = tf.reshape(tf.gather(token, kept, batch_dims=1), [-1])
        new_state["seen"] = _add_seen(tf.gather(state["seen"], parent), token)
    return {**state, **new_state}


def _can_improve(
    settings: GenerationConfig,
    scores: Tensor,
    finished_scores: Tensor,
    length: Tensor,
    max_new: int,
) -> Tensor:
    """[B] bool: whether a running beam may still beat the worst finished sequence.

    Log-probabilities only fall, so with a positive penalty the greatest length scores best.
    """
    if settings.early_stopping == "never" and settings.length_penalty > 0:
        length = float(max_new)
    can_improve = scores[:, 0] / length**settings.length_penalty > finished_scores[:, -1]
    if settings.early_stopping is True:
        can_improve &= finished_scores[:, -1] == -math.inf
    return can_improve


def _add_seen(seen: Tensor, token: Tensor) -> Tensor:
    """`seen` [R, V] with each row's token [R] added."""
    return seen | tf.one_hot(token, seen.shape[-1], on_value=True, off_value=False)

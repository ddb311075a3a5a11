"""Decoding with a causal language model: greedy, sampling and beam search as one `tf.while_loop`.

What `prelnroberta/inference/generation.py` computes, step for step, so that greedy and beam search choose the
same tokens; `prelnroberta/inference/generation_config.py` says what can be asked for. The draws of sampling
are TensorFlow's own.

    B rows  L prompt columns  W beams  R rows decoded at once (B x W, or B x returned sequences)
    G new columns  V vocab
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from bridges.tensorflow.kv_cache import Cache
from prelnroberta.inference.generation_config import Generation

Tensor = tf.Tensor
State = dict[str, Any]

# decode(input_ids [R, L], attention_mask [R, L], cache) -> (logits [R, L, V] float32, cache).
Decode = Callable[[Tensor, Tensor, Cache], tuple[Tensor, Cache]]


class GenerationOutput(NamedTuple):
    """What `generate` returns; of each prompt row, its num_return_sequences rows together.

    Attributes:
        sequences: [B * num_return_sequences, L + G] int32: the prompt as given, its pads
            included, then the new tokens, pads after the end.
        scores: [B * num_return_sequences] float32, best first within a row, of beam search;
            -inf marks a row of pads, where fewer sequences exist than were asked for. Otherwise
            None.
    """

    sequences: Tensor
    scores: Tensor | None = None


def search(
    decode: Decode,
    settings: Generation,
    least: int,
    most: int,
    cache: Cache,
    input_ids: Tensor,
    mask: Tensor,
    seed: Tensor,
) -> GenerationOutput:
    """Continues every row of prompts [B, L] int32, real where `mask` [B, L] is nonzero.

    Args:
        least, most: bounds of G, from `settings.new_tokens`.
        cache: for B rows and at least L + G - 1 more columns.
        seed: [2] int32. A row's draws depend on it, its number and its own content alone.
    """
    B, L = input_ids.shape
    copies = settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences
    R = B * copies
    logits, cache = decode(input_ids, mask, cache)
    V = logits.shape[-1]
    last = L - 1 - tf.argmax(mask[:, ::-1], axis=1, output_type=tf.int32)
    logits = tf.gather(logits, last, batch_dims=1)

    # The prompt is read once a row, however many beams or samples go on from it.
    spread = tf.repeat(tf.range(B), copies)
    grid = (B, copies) if settings.num_beams > 1 else (R,)
    empty = tf.fill([*grid, most], settings.pad_token_id)
    state = {
        "cache": reorder_cache(cache, spread),
        "step": tf.constant(0),
        "tokens": empty,
        "running": tf.ones([B if settings.num_beams > 1 else R], tf.bool),
    }
    if settings.repetition_penalty != 1.0:
        held = tf.one_hot(input_ids, V, on_value=True, off_value=False) & (mask != 0)[:, :, None]
        state["seen"] = tf.gather(tf.reduce_any(held, axis=1), spread)
    if settings.num_beams > 1:
        none = tf.fill(grid, -math.inf)
        # One beam at first: W equal ones would stay equal.
        state["scores"] = tf.concat([tf.zeros([B, 1]), none[:, 1:]], axis=1)
        state |= {"ended_tokens": empty, "ended_scores": none}

    def advance(state: State, logits: Tensor) -> State:
        if settings.num_beams > 1:
            return _advance_beams(settings, least, state, logits)
        return _advance_rows(settings, least, copies, seed, state, logits)

    def more(state: State) -> Tensor:
        return (state["step"] < most) & tf.reduce_any(state["running"])

    def body(state: State) -> tuple[State]:
        tokens = tf.reshape(state["tokens"], [R, most])
        newest = tf.gather(tokens, state["step"] - 1, axis=1)[:, None]
        real = tf.repeat(state["running"], R // state["running"].shape[0])[:, None]
        logits, cache = decode(newest, tf.cast(real, tf.int32), state["cache"])
        return (advance({**state, "cache": cache}, logits[:, -1]),)

    (state,) = tf.while_loop(more, body, (advance(state, tf.gather(logits, spread)),))

    returned = settings.num_return_sequences
    new, scores = state["tokens"], None
    if settings.num_beams > 1:
        new = tf.reshape(state["ended_tokens"][:, :returned], [-1, most])
        scores = tf.reshape(state["ended_scores"][:, :returned], [-1])
    prompts = tf.repeat(input_ids, returned, axis=0)
    return GenerationOutput(tf.concat([prompts, new], axis=1), scores)


def reorder_cache(cache: Cache, index: Tensor) -> Cache:
    """The cache of rows `index` [R]: repeated, dropped or put in another order."""
    return tf.nest.map_structure(lambda x: tf.gather(x, index) if x.shape.rank else x, cache)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes `seen` [R, V] bool tokens of logits [R, V] less likely, whatever their sign."""
    penalized = tf.where(logits < 0, logits * penalty, logits / penalty)
    return tf.where(seen, penalized, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets all but the k greatest logits [R, V], and those equal to the k-th, to -inf."""
    kth = tf.math.top_k(logits, min(k, logits.shape[-1])).values[:, -1:]
    return tf.where(logits < kth, -math.inf, logits)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Sets all logits [R, V] to -inf but the smallest set's with probability >= p; one at least."""
    ranked = tf.math.top_k(logits, logits.shape[-1])
    probability = tf.nn.softmax(ranked.values)
    before = tf.cumsum(probability, axis=-1) - probability
    kept = tf.gather(before < p, tf.argsort(ranked.indices, axis=-1), batch_dims=1)
    return tf.where(kept, logits, -math.inf)


def _constrain(settings: Generation, least: int, state: State, logits: Tensor) -> Tensor:
    """Logits, or log-probabilities, [R, V] under what every way of choosing obeys."""
    if "seen" in state:
        logits = penalize_repetition(logits, state["seen"], settings.repetition_penalty)
    if settings.eos_ids and least > 0:
        ends = _is_eos(settings, tf.range(logits.shape[-1]))
        logits = tf.where(ends & (state["step"] < least), -math.inf, logits)
    return logits


def _is_eos(settings: Generation, tokens: Tensor) -> Tensor:
    ends = tf.constant(settings.eos_ids, tf.int32)
    return tf.reduce_any(tokens[..., None] == ends, axis=-1)


def _advance_rows(
    settings: Generation, least: int, copies: int, seed: Tensor, state: State, logits: Tensor
) -> State:
    """Chooses each row's next token from its logits [R, V]."""
    logits = _constrain(settings, least, state, logits)
    if settings.do_sample:
        logits = logits / settings.temperature
        if settings.top_k is not None:
            logits = keep_top_k(logits, settings.top_k)
        if settings.top_p < 1.0:
            logits = keep_top_p(logits, settings.top_p)
        logits = logits + _gumbel_noise(seed, copies, state["step"], logits.shape)
    token = tf.argmax(logits, axis=-1, output_type=tf.int32)
    token = tf.where(state["running"], token, settings.pad_token_id)
    column = tf.range(state["tokens"].shape[1]) == state["step"]
    advanced = {
        "step": state["step"] + 1,
        "tokens": tf.where(column, token[:, None], state["tokens"]),
        "running": state["running"] & ~_is_eos(settings, token),
    }
    return {**state, **advanced, **_with_tokens(state, token)}


def _gumbel_noise(seed: Tensor, copies: int, step: Tensor, shape: tf.TensorShape) -> Tensor:
    """[R, V] of noise that makes an argmax a draw, each row from a seed of its own."""
    R, V = shape
    step_seed = tf.random.fold_in(seed, step)

    def of_row(row: Tensor) -> Tensor:
        own = tf.random.fold_in(tf.random.fold_in(step_seed, row // copies), row % copies)
        uniform = tf.random.stateless_uniform([V], own, minval=1e-30)
        return -tf.math.log(-tf.math.log(uniform))

    return tf.map_fn(of_row, tf.range(R), fn_output_signature=tf.TensorSpec([V], tf.float32))


def _advance_beams(settings: Generation, least: int, state: State, logits: Tensor) -> State:
    """Extends each row's beams by a token, given logits [R, V].

    Considers so many of the best extensions that W are left to run should every beam end. An
    ended one is kept only if it is among the best W of all (transformers' `_beam_search`).
    """
    B, W, most = state["tokens"].shape
    V, step = logits.shape[-1], state["step"]

    log_p = _constrain(settings, least, state, tf.nn.log_softmax(logits))
    totals = tf.reshape(tf.reshape(log_p, [B, W, V]) + state["scores"][:, :, None], [B, W * V])
    considered = min(max(2, 1 + len(settings.eos_ids)) * W, W * V)
    scores, choice = tf.math.top_k(totals, considered)
    parent, token = choice // V, choice % V
    here = tf.range(most) == step
    tokens = tf.gather(state["tokens"], parent, batch_dims=1)
    tokens = tf.where(here, token[:, :, None], tokens)
    ends = _is_eos(settings, token) | (step == most - 1)

    length = tf.cast(step + 1, tf.float32)
    eligible = ends & (tf.range(considered) < W) & state["running"][:, None]
    final = tf.where(eligible, scores / length**settings.length_penalty, -math.inf)
    ended_scores, kept = tf.math.top_k(tf.concat([state["ended_scores"], final], axis=1), W)
    ended_tokens = tf.concat([state["ended_tokens"], tokens], axis=1)
    ended_tokens = tf.gather(ended_tokens, kept, batch_dims=1)

    scores, kept = tf.math.top_k(tf.where(ends, -math.inf, scores), W)
    origin = tf.range(B)[:, None] * W + tf.gather(parent, kept, batch_dims=1)
    origin = tf.reshape(origin, [-1])
    token = tf.reshape(tf.gather(token, kept, batch_dims=1), [-1])

    # Log-probabilities only fall, so with a positive penalty the greatest length is the best.
    if settings.early_stopping == "never" and settings.length_penalty > 0:
        length = float(most)
    running = scores[:, 0] / length**settings.length_penalty > ended_scores[:, -1]
    if settings.early_stopping is True:
        running &= ended_scores[:, -1] == -math.inf
    advanced = {
        "cache": reorder_cache(state["cache"], origin),
        "step": step + 1,
        "tokens": tf.gather(tokens, kept, batch_dims=1),
        "running": state["running"] & running,
        "scores": scores,
        "ended_tokens": ended_tokens,
        "ended_scores": ended_scores,
    }
    reordered = {"seen": tf.gather(state["seen"], origin)} if "seen" in state else {}
    return {**state, **advanced, **_with_tokens(reordered, token)}


def _with_tokens(state: State, token: Tensor) -> State:
    """`seen` [R, V], where it is kept, with each row's token [R] added."""
    if "seen" not in state:
        return {}
    V = state["seen"].shape[-1]
    return {"seen": state["seen"] | tf.one_hot(token, V, on_value=True, off_value=False)}

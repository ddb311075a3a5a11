"""Decoding with a causal language model: greedy, sampling and beam search as one jitted loop.

The model is a function with a key/value cache, `DecodeFn`. The prompt is read once, then one
`lax.while_loop` chooses tokens until every row has ended, without a transfer to the host per token.
Options are in `generation_config.py`. Results follow transformers 4.57 and 5, which agree
(`generation/utils.py`, `generation/logits_process.py`).

Shape letters are those of `params.py`: B prompts, W beams of a prompt, R rows decoded together
(B x W, or B x num_return_sequences), L prompt columns, G new columns, T columns of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from prelnroberta.errors import InputError
from prelnroberta.inference.generation_config import GenerationConfig
from prelnroberta.model.kv_cache import KVCache

Array = jax.Array

# decode(params, input_ids [B, L], attention_mask [B, L], cache) -> (logits [B, L, V], cache).
# Appends L columns to the cache. A column where the mask is 0 holds no token and is never attended
# to. Logits are float32. A model that computes only those of each row's last real token may return
# [B, 1, V]. The function computes position ids itself: they continue those in the cache.
DecodeFn = Callable[[Any, Array, Array, KVCache], tuple[Array, KVCache]]


@flax.struct.dataclass
class GenerationOutput:
    """What `generate` returns. The num_return_sequences rows of a prompt are adjacent.

    Attributes:
        sequences: [B * num_return_sequences, L + G] int32: the prompt as given, pads included,
            then the new tokens, with pads after the end.
        scores: [B * num_return_sequences] float32, scores of beam search, best first per prompt;
            -inf marks a row of pads, where fewer sequences exist than were requested. None without
            beam search.
    """

    sequences: Array
    scores: Array | None = None


def generate(
    decode: DecodeFn,
    params: Any,
    cache: KVCache,
    input_ids: Array,
    attention_mask: Array,
    config: GenerationConfig,
    prng_key: Array | None = None,
) -> GenerationOutput:
    """Continues every prompt of a batch.

    Pure, and usable under jit. Compiles once for each (decode, config, shapes): pass the same
    function object each time, not a new lambda.

    Args:
        decode: see `DecodeFn`; a pure function, or a hashable bound method.
        params: passed to `decode`.
        cache: for B rows, with at least L + G - 1 free columns, in the layout of `reorder_cache`.
        input_ids: [B, L] int; each row may have pads anywhere.
        attention_mask: [B, L], nonzero where input_ids is a token.
        config: how to choose tokens.
        prng_key: a jax PRNG key, required for sampling. The draws of a row depend on the key, its
            index and its own content, not on other rows or padding.

    Raises:
        InputError: for shapes or dtypes that do not match, a row without a token, a cache that is
            too small, ids outside the vocabulary, or sampling without a key.
    """
    _check_prompts(input_ids, attention_mask)
    min_new_tokens, max_new_tokens = config.new_token_bounds(input_ids.shape[1])
    _check_cache_size(cache, input_ids.shape[1], max_new_tokens)
    if config.do_sample and prng_key is None:
        raise InputError("generate: prng_key=None, expected a jax PRNG key when do_sample is true")
    mask = jnp.asarray(attention_mask, bool)
    input_ids = jnp.asarray(input_ids, jnp.int32)
    return _generate(
        decode, config, min_new_tokens, max_new_tokens, params, cache, input_ids, mask, prng_key
    )


def _check_prompts(input_ids: Array, attention_mask: Array) -> None:
    shape = np.shape(input_ids)
    if len(shape) != 2 or 0 in shape:
        raise InputError(
            f"generate: input_ids has shape {list(shape)}, expected [B, L] without an empty axis"
        )
    if not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise InputError(f"generate: input_ids is {input_ids.dtype}, expected integers")
    if np.shape(attention_mask) != shape:
        raise InputError(
            f"generate: attention_mask has shape {list(np.shape(attention_mask))}, expected "
            f"{list(shape)} as input_ids"
        )
    if not isinstance(attention_mask, jax.core.Tracer):
        empty = np.flatnonzero(~np.asarray(attention_mask).astype(bool).any(axis=1))
        if empty.size:
            raise InputError(
                f"generate: attention_mask of row {empty[0]} is all 0: a prompt needs a token"
            )


def _check_cache_size(cache: KVCache, prompt_length: int, max_new_tokens: int) -> None:
    """A write past the end of the cache would be clamped to its last column without an error."""
    if "valid" not in cache:
        return
    index = cache["index"]
    used = 0 if isinstance(index, jax.core.Tracer) else int(index)
    needed, columns = used + prompt_length + max_new_tokens - 1, cache["valid"].shape[1]
    if needed > columns:
        raise InputError(
            f"generate: the cache has {columns} columns, expected {needed} or more: {used} used, "
            f"{prompt_length} of the prompt, {max_new_tokens} new tokens (the last is not cached)"
        )


def reorder_cache(cache: KVCache, row_index: Array) -> KVCache:
    """Gathers rows `row_index` [R] of a cache of B rows, each index in [0, B).

    Leaves named `*keys` and `*values` are stacked, [N, B, T, H, K] (`cross_*`: [N, B, S, H, K]).
    Scalars are shared by all rows. All other leaves have rows on their first axis (valid [B, T],
    count [B]).
    """

    def gather(name: str, leaf: Array) -> Array:
        if leaf.ndim == 0:
            return leaf
        return jnp.take(leaf, row_index, axis=1 if name.endswith(("keys", "values")) else 0)

    return {name: gather(name, leaf) for name, leaf in cache.items()}


def penalize_repetition(logits: Array, seen: Array, penalty: float) -> Array:
    """Makes the tokens marked in `seen` [R, V] less likely; logits [R, V] may have any sign."""
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def keep_top_k(logits: Array, k: int) -> Array:
    """Keeps the k largest logits [R, V] and those equal to the k-th; sets the others to -inf."""
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def keep_top_p(logits: Array, p: float) -> Array:
    """Keeps the smallest set of logits [R, V] with total probability >= p, at least one; sets the
    others to -inf."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = jnp.take_along_axis(before < p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


class _DecodeState(flax.struct.PyTreeNode):
    """State of the loop after `step` new tokens.

    Attributes:
        cache: of R rows; does not contain the newest token yet.
        step: [] int32.
        tokens: [R, G] new tokens, or [B, W, G] of running beams; pads where none is chosen yet.
        unfinished: [R] bool, or [B] with beams; False once the result is final.
        seen: [R, V] bool, the tokens that a row contains; None if no penalty needs them.
    """

    cache: KVCache
    step: Array
    tokens: Array
    unfinished: Array
    seen: Array | None


class _BeamState(_DecodeState):
    """State of beam search; beams are sorted, best first.

    Attributes:
        scores: [B, W], log-probabilities of running beams; -inf marks an unused beam.
        finished_tokens: [B, W, G].
        finished_scores: [B, W], of finished sequences, with length penalty; -inf marks an unused
            place.
    """

    scores: Array
    finished_tokens: Array
    finished_scores: Array


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    decode: DecodeFn,
    config: GenerationConfig,
    min_new_tokens: int,
    max_new_tokens: int,
    params: Any,
    cache: KVCache,
    input_ids: Array,
    mask: Array,
    prng_key: Array | None,
) -> GenerationOutput:
    B = len(input_ids)
    with_beams = config.num_beams > 1
    rows_per_prompt = config.num_beams if with_beams else config.num_return_sequences

    logits, cache = decode(params, input_ids, mask.astype(jnp.int32), cache)
    V = logits.shape[-1]
    _check_token_ids(config, V)
    logits = _last_token_logits(logits, mask)
    seen = None
    if config.repetition_penalty != 1.0:
        seen = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], input_ids].max(mask)

    # The prompt is read once, then copied for each of its beams or samples.
    row_index = jnp.repeat(jnp.arange(B), rows_per_prompt)
    cache, seen = reorder_cache(cache, row_index), None if seen is None else seen[row_index]
    advance: Callable[[Any, Array], Any]
    state: Any
    if with_beams:
        state = _initial_beam_state(config, max_new_tokens, cache, seen, B)
        advance = partial(_advance_beams, config, min_new_tokens)
    else:
        R = len(row_index)
        tokens = jnp.full((R, max_new_tokens), config.pad_token_id, jnp.int32)
        state = _DecodeState(cache, jnp.int32(0), tokens, jnp.ones(R, bool), seen)
        keys = _row_prng_keys(prng_key, B, rows_per_prompt) if config.do_sample else None
        advance = partial(_advance_rows, config, min_new_tokens, keys)
    state = advance(state, logits[row_index])
    state = _run_loop(partial(decode, params), advance, state, max_new_tokens)

    tokens, scores = state.tokens, None
    if with_beams:
        tokens = state.finished_tokens[:, : config.num_return_sequences].reshape(-1, max_new_tokens)
        scores = state.finished_scores[:, : config.num_return_sequences].reshape(-1)
    prompts = jnp.repeat(input_ids, config.num_return_sequences, axis=0)
    return GenerationOutput(jnp.concatenate([prompts, tokens], axis=1), scores)


def _check_token_ids(config: GenerationConfig, V: int) -> None:
    for token in (*config.eos_token_ids, config.pad_token_id):
        if token >= V:
            raise InputError(f"generation: eos or pad id {token}, expected one in [0, V={V})")


def _last_token_logits(logits: Array, mask: Array) -> Array:
    """[B, V]: the logits [B, L, V] or [B, 1, V] at the last real token of each row."""
    B, L = mask.shape
    last = L - 1 - mask[:, ::-1].argmax(axis=1) if logits.shape[1] == L else jnp.zeros(B, int)
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]


def _initial_beam_state(
    config: GenerationConfig, max_new_tokens: int, cache: KVCache, seen: Array | None, B: int
) -> _BeamState:
    W = config.num_beams
    tokens = jnp.full((B, W, max_new_tokens), config.pad_token_id, jnp.int32)
    unused = jnp.full((B, W), -jnp.inf)
    return _BeamState(
        cache=cache,
        step=jnp.int32(0),
        tokens=tokens,
        unfinished=jnp.ones(B, bool),
        seen=seen,
        scores=unused.at[:, 0].set(0.0),  # one beam at first: W equal ones would stay equal
        finished_tokens=tokens,
        finished_scores=unused,
    )


def _run_loop(
    decode: Callable[[Array, Array, KVCache], tuple[Array, KVCache]],
    advance: Callable[[_DecodeState, Array], _DecodeState],
    state: _DecodeState,
    max_new_tokens: int,
) -> _DecodeState:
    """Decodes the newest token and chooses the next until all rows have finished."""
    R = state.tokens.size // max_new_tokens

    def should_continue(state: _DecodeState) -> Array:
        return (state.step < max_new_tokens) & state.unfinished.any()

    def body(state: _DecodeState) -> _DecodeState:
        tokens = state.tokens.reshape(R, max_new_tokens)
        newest = jax.lax.dynamic_index_in_dim(tokens, state.step - 1, 1)
        mask = jnp.repeat(state.unfinished, R // state.unfinished.size)[:, None]
        logits, cache = decode(newest, mask.astype(jnp.int32), state.cache)
        return advance(state.replace(cache=cache), logits[:, -1])

    return jax.lax.while_loop(should_continue, body, state)


def _row_prng_keys(prng_key: Array, B: int, rows_per_prompt: int) -> Array:
    """[R] keys, each derived from the index of the prompt and that of its sample."""
    fold_in = jax.vmap(jax.random.fold_in)
    by_prompt = jax.vmap(jax.random.fold_in, (None, 0))(prng_key, jnp.arange(B))
    samples = jnp.tile(jnp.arange(rows_per_prompt), B)
    return fold_in(jnp.repeat(by_prompt, rows_per_prompt, axis=0), samples)


def _process_logits(
    config: GenerationConfig, min_new_tokens: int, state: _DecodeState, logits: Array
) -> Array:
    """Applies the repetition penalty and the minimum length to logits, or log-probabilities,
    [R, V]."""
    if state.seen is not None:
        logits = penalize_repetition(logits, state.seen, config.repetition_penalty)
    if config.eos_token_ids and min_new_tokens > 0:
        without_eos = logits.at[:, jnp.array(config.eos_token_ids)].set(-jnp.inf)
        logits = jnp.where(state.step < min_new_tokens, without_eos, logits)
    return logits


def _is_eos(config: GenerationConfig, tokens: Array) -> Array:
    return jnp.isin(tokens, jnp.array(config.eos_token_ids, jnp.int32))


def _advance_rows(
    config: GenerationConfig,
    min_new_tokens: int,
    keys: Array | None,
    state: _DecodeState,
    logits: Array,
) -> _DecodeState:
    """Chooses the next token of each row from its logits [R, V]: greedily, or by sampling with
    `keys` [R]."""
    logits = _process_logits(config, min_new_tokens, state, logits)
    if keys is None:
        token = logits.argmax(axis=-1)
    else:
        logits = logits / config.temperature
        if config.top_k is not None:
            logits = keep_top_k(logits, config.top_k)
        if config.top_p < 1.0:
            logits = keep_top_p(logits, config.top_p)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        token = jax.vmap(jax.random.categorical)(step_keys, logits)
    token = jnp.where(state.unfinished, token, config.pad_token_id).astype(jnp.int32)
    return state.replace(
        step=state.step + 1,
        tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.step, 1),
        unfinished=state.unfinished & ~_is_eos(config, token),
        seen=_mark_seen(state.seen, token),
    )


def _advance_beams(
    config: GenerationConfig, min_new_tokens: int, state: _BeamState, logits: Array
) -> _BeamState:
    """Extends the beams of each prompt by one token, given logits [R, V].

    Considers enough of the best extensions that W can continue even if every beam ends. A finished
    sequence is kept only if it is among the best W of all (transformers' `_beam_search`).
    """
    B, W, max_new_tokens = state.tokens.shape
    V, step, prompt = logits.shape[-1], state.step, jnp.arange(B)[:, None]

    log_probs = jax.nn.log_softmax(logits, axis=-1)
    log_probs = _process_logits(config, min_new_tokens, state, log_probs)
    totals = (log_probs.reshape(B, W, V) + state.scores[:, :, None]).reshape(B, W * V)
    num_candidates = min(max(2, 1 + len(config.eos_token_ids)) * W, W * V)
    scores, candidate = jax.lax.top_k(totals, num_candidates)
    parent, token = candidate // V, (candidate % V).astype(jnp.int32)
    tokens = state.tokens[prompt, parent].at[:, :, step].set(token)
    ends = _is_eos(config, token) | (step == max_new_tokens - 1)

    length: Any = (step + 1).astype(jnp.float32)
    finishes = ends & (jnp.arange(num_candidates) < W) & state.unfinished[:, None]
    final = jnp.where(finishes, scores / length**config.length_penalty, -jnp.inf)
    all_finished_scores = jnp.concatenate([state.finished_scores, final], axis=1)
    finished_scores, kept = jax.lax.top_k(all_finished_scores, W)
    finished_tokens = jnp.concatenate([state.finished_tokens, tokens], axis=1)[prompt, kept]

    scores, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), W)
    row_index = (prompt * W + parent[prompt, kept]).reshape(-1)
    token = token[prompt, kept].reshape(-1)

    # Log-probabilities only decrease, so with a positive penalty the maximum length is the best.
    if config.early_stopping == "never" and config.length_penalty > 0:
        length = float(max_new_tokens)
    can_improve = scores[:, 0] / length**config.length_penalty > finished_scores[:, -1]
    if config.early_stopping is True:
        can_improve &= jnp.isneginf(finished_scores[:, -1])
    return state.replace(
        cache=reorder_cache(state.cache, row_index),
        step=step + 1,
        tokens=tokens[prompt, kept],
        unfinished=state.unfinished & can_improve,
        seen=None if state.seen is None else _mark_seen(state.seen[row_index], token),
        scores=scores,
        finished_tokens=finished_tokens,
        finished_scores=finished_scores,
    )


def _mark_seen(seen: Array | None, token: Array) -> Array | None:
    """Adds the token [R] of each row to `seen` [R, V]."""
    return None if seen is None else seen.at[jnp.arange(token.size), token].set(True)

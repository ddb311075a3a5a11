"""Decoding with a causal language model: greedy, sampling and beam search as one jitted loop.

The model is a function with a key/value cache, `Decode`; nothing here knows more of it. The prompt
is read once, then one `lax.while_loop` chooses tokens until every row has ended: no round trip to
the host a token. `generation_settings.py` says what can be asked for. What is computed follows
transformers 4.57 and 5, which agree (`generation/utils.py`, `generation/logits_process.py`).

    B rows  L prompt columns  W beams  R rows decoded at once (B x W, or B x returned sequences)
    G new columns  V vocab; of the cache  N layers  T columns  H heads  K head dim  S source columns
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
from prelnroberta.inference.generation_config import Generation

Array = jax.Array
Cache = dict[str, Array]

# decode(params, input_ids [B, L], attention_mask [B, L], cache) -> (logits [B, L, V], cache).
# Appends L columns to the cache; where the mask is 0 the new column holds no token and is never
# seen. Logits are float32; a model that computes them at each row's last real token alone may
# return [B, 1, V]. Positions are its own business: they go on from the tokens in the cache.
Decode = Callable[[Any, Array, Array, Cache], tuple[Array, Cache]]


@flax.struct.dataclass
class GenerationOutput:
    """What `generate` returns; of each prompt row, its num_return_sequences rows together.

    Attributes:
        sequences: [B * num_return_sequences, L + G] int32: the prompt as given, its pads
            included, then the new tokens, pads after the end.
        scores: [B * num_return_sequences] float32, best first within a row, of beam search;
            -inf marks a row of pads, where fewer sequences exist than were asked for. Otherwise
            None.
    """

    sequences: Array
    scores: Array | None = None


def generate(
    decode: Decode,
    params: Any,
    cache: Cache,
    input_ids: Array,
    attention_mask: Array,
    settings: Generation,
    key: Array | None = None,
) -> GenerationOutput:
    """Continues every row of a batch of prompts.

    Pure, and usable under jit. Compiled once for each (decode, settings, shapes): give the same
    function object each time, not a new lambda.

    Args:
        decode: see `Decode`; a pure function, or a hashable bound method.
        params: whatever `decode` takes.
        cache: for B rows and at least L + G - 1 more columns, in the layout of `reorder_cache`.
        input_ids: [B, L] int, padded on either side or amid, per row.
        attention_mask: [B, L], nonzero where input_ids is a token.
        settings: how to choose.
        key: a jax PRNG key, to sample. A row's draws depend on the key, its number and its own
            content alone: neither on the other rows nor on the padding.

    Raises:
        InputError: for shapes or dtypes that don't fit, a row without a token, a cache too small,
            ids outside the vocabulary, or no key to sample with.
    """
    _check_prompts(input_ids, attention_mask)
    least, most = settings.new_tokens(input_ids.shape[1])
    _check_room(cache, input_ids.shape[1], most)
    if settings.do_sample and key is None:
        raise InputError("generate: key=None, expected a jax PRNG key when do_sample is true")
    mask = jnp.asarray(attention_mask, bool)
    input_ids = jnp.asarray(input_ids, jnp.int32)
    return _generate(decode, settings, least, most, params, cache, input_ids, mask, key)


def _check_prompts(input_ids: Array, attention_mask: Array) -> None:
    shape = np.shape(input_ids)
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"generate: input_ids has shape {list(shape)}, expected [B, L], none 0")
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


def _check_room(cache: Cache, prompt_columns: int, most: int) -> None:
    """A write beyond the end of the cache would be clamped to its last column, silently."""
    if "valid" not in cache:
        return
    used = cache["index"]
    used = 0 if isinstance(used, jax.core.Tracer) else int(used)
    needed, columns = used + prompt_columns + most - 1, cache["valid"].shape[1]
    if needed > columns:
        raise InputError(
            f"generate: the cache has {columns} columns, expected {needed} or more: {used} used, "
            f"{prompt_columns} of the prompt, {most} new tokens (the last one is not read again)"
        )


def reorder_cache(cache: Cache, index: Array) -> Cache:
    """The cache of rows `index` [R], each in [0, B): repeated, dropped or put in another order.

    Leaves named `*keys` and `*values` are stacked, [N, B, T, H, K] (`cross_*`: [N, B, S, H, K]);
    scalars are shared by all rows; any other leaf has its rows first (valid [B, T], count [B]).
    """

    def rows(name: str, leaf: Array) -> Array:
        if leaf.ndim == 0:
            return leaf
        return jnp.take(leaf, index, axis=1 if name.endswith(("keys", "values")) else 0)

    return {name: rows(name, leaf) for name, leaf in cache.items()}


def penalize_repetition(logits: Array, seen: Array, penalty: float) -> Array:
    """Makes `seen` [R, V] bool tokens of logits [R, V] less likely, whatever their sign."""
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def keep_top_k(logits: Array, k: int) -> Array:
    """Sets all but the k greatest logits [R, V], and those equal to the k-th, to -inf."""
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def keep_top_p(logits: Array, p: float) -> Array:
    """Sets all logits [R, V] to -inf but the smallest set's with probability >= p; one at least."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = jnp.take_along_axis(before < p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


@flax.struct.dataclass
class _Search:
    """The loop's state, after `step` new tokens.

    Attributes:
        cache: of R rows; lacks the newest token.
        step: [] int32.
        tokens: [R, G], or [B, W, G] of running beams; pads where nothing is chosen yet.
        running: [R], or [B] with beams; False where the result is settled.
        seen: [R, V] bool, the tokens a row holds; None when nobody reads it.
    """

    cache: Cache
    step: Array
    tokens: Array
    running: Array
    seen: Array | None


@flax.struct.dataclass
class _BeamSearch(_Search):
    """With beams; best first.

    Attributes:
        scores: [B, W], log-probabilities of running beams; -inf: there is none.
        ended_tokens: [B, W, G].
        ended_scores: [B, W], of ended sequences, with length penalty; -inf: there is none.
    """

    scores: Array
    ended_tokens: Array
    ended_scores: Array


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    decode: Decode,
    settings: Generation,
    least: int,
    most: int,
    params: Any,
    cache: Cache,
    input_ids: Array,
    mask: Array,
    key: Array | None,
) -> GenerationOutput:
    B, L = input_ids.shape
    copies = settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences
    R = B * copies

    logits, cache = decode(params, input_ids, mask.astype(jnp.int32), cache)
    V = logits.shape[-1]
    for token in (*settings.eos_ids, settings.pad_token_id):
        if token >= V:
            raise InputError(f"generation: eos or pad id {token}, expected one in [0, V={V})")
    last = L - 1 - mask[:, ::-1].argmax(axis=1) if logits.shape[1] == L else jnp.zeros(B, int)
    logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
    seen = None
    if settings.repetition_penalty != 1.0:
        seen = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], input_ids].max(mask)

    # The prompt is read once a row, however many beams or samples go on from it.
    spread = jnp.repeat(jnp.arange(B), copies)
    state = {
        "cache": reorder_cache(cache, spread),
        "step": jnp.int32(0),
        "seen": None if seen is None else seen[spread],
    }
    empty = jnp.full((R, most), settings.pad_token_id, jnp.int32)
    if settings.num_beams > 1:
        grid = (B, copies)
        none = jnp.full(grid, -jnp.inf)
        state = _BeamSearch(
            **state,
            tokens=empty.reshape(*grid, most),
            running=jnp.ones(B, bool),
            scores=none.at[:, 0].set(0.0),  # one beam at first: W equal ones would stay equal
            ended_tokens=empty.reshape(*grid, most),
            ended_scores=none,
        )
        advance = partial(_advance_beams, settings, least)
    else:
        state = _Search(**state, tokens=empty, running=jnp.ones(R, bool))
        keys = _row_keys(key, B, copies) if settings.do_sample else None
        advance = partial(_advance_rows, settings, least, keys)

    def more(state: _Search) -> Array:
        return (state.step < most) & state.running.any()

    def body(state: _Search) -> _Search:
        newest = jax.lax.dynamic_index_in_dim(state.tokens.reshape(R, most), state.step - 1, 1)
        real = jnp.repeat(state.running, R // state.running.size)[:, None].astype(jnp.int32)
        logits, cache = decode(params, newest, real, state.cache)
        return advance(state.replace(cache=cache), logits[:, -1])

    state = jax.lax.while_loop(more, body, advance(state, logits[spread]))

    new, scores = state.tokens, None
    if settings.num_beams > 1:
        new = state.ended_tokens[:, : settings.num_return_sequences].reshape(-1, most)
        scores = state.ended_scores[:, : settings.num_return_sequences].reshape(-1)
    prompts = jnp.repeat(input_ids, settings.num_return_sequences, axis=0)
    return GenerationOutput(jnp.concatenate([prompts, new], axis=1), scores)


def _row_keys(key: Array, B: int, copies: int) -> Array:
    """[B * copies] keys, each of its row's number and its copy's."""
    fold_in = jax.vmap(jax.random.fold_in)
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    return fold_in(jnp.repeat(rows, copies, axis=0), jnp.tile(jnp.arange(copies), B))


def _constrain(settings: Generation, least: int, state: _Search, logits: Array) -> Array:
    """Logits, or log-probabilities, [R, V] under what every way of choosing obeys."""
    if state.seen is not None:
        logits = penalize_repetition(logits, state.seen, settings.repetition_penalty)
    if settings.eos_ids and least > 0:
        without = logits.at[:, jnp.array(settings.eos_ids)].set(-jnp.inf)
        logits = jnp.where(state.step < least, without, logits)
    return logits


def _is_eos(settings: Generation, tokens: Array) -> Array:
    return jnp.isin(tokens, jnp.array(settings.eos_ids, jnp.int32))


def _advance_rows(
    settings: Generation, least: int, keys: Array | None, state: _Search, logits: Array
) -> _Search:
    """Chooses each row's next token from its logits [R, V]."""
    logits = _constrain(settings, least, state, logits)
    if keys is None:
        token = logits.argmax(axis=-1)
    else:
        logits = logits / settings.temperature
        if settings.top_k is not None:
            logits = keep_top_k(logits, settings.top_k)
        if settings.top_p < 1.0:
            logits = keep_top_p(logits, settings.top_p)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        token = jax.vmap(jax.random.categorical)(step_keys, logits)
    token = jnp.where(state.running, token, settings.pad_token_id).astype(jnp.int32)
    return state.replace(
        step=state.step + 1,
        tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.step, 1),
        running=state.running & ~_is_eos(settings, token),
        seen=_with_tokens(state.seen, token),
    )


def _advance_beams(
    settings: Generation, least: int, state: _BeamSearch, logits: Array
) -> _BeamSearch:
    """Extends each row's beams by a token, given logits [R, V].

    Considers so many of the best extensions that W are left to run should every beam end. An
    ended one is kept only if it is among the best W of all (transformers' `_beam_search`).
    """
    B, W, most = state.tokens.shape
    V, step, rows = logits.shape[-1], state.step, jnp.arange(B)[:, None]

    log_p = _constrain(settings, least, state, jax.nn.log_softmax(logits, axis=-1))
    totals = (log_p.reshape(B, W, V) + state.scores[:, :, None]).reshape(B, W * V)
    considered = min(max(2, 1 + len(settings.eos_ids)) * W, W * V)
    scores, choice = jax.lax.top_k(totals, considered)
    parent, token = choice // V, (choice % V).astype(jnp.int32)
    tokens = state.tokens[rows, parent].at[:, :, step].set(token)
    ends = _is_eos(settings, token) | (step == most - 1)

    length = (step + 1).astype(jnp.float32)
    eligible = ends & (jnp.arange(considered) < W) & state.running[:, None]
    final = jnp.where(eligible, scores / length**settings.length_penalty, -jnp.inf)
    ended_scores, kept = jax.lax.top_k(jnp.concatenate([state.ended_scores, final], axis=1), W)
    ended_tokens = jnp.concatenate([state.ended_tokens, tokens], axis=1)[rows, kept]

    scores, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), W)
    origin = (rows * W + parent[rows, kept]).reshape(-1)
    token = token[rows, kept].reshape(-1)

    # Log-probabilities only fall, so with a positive penalty the greatest length is the best.
    if settings.early_stopping == "never" and settings.length_penalty > 0:
        length = float(most)
    running = scores[:, 0] / length**settings.length_penalty > ended_scores[:, -1]
    if settings.early_stopping is True:
        running &= jnp.isneginf(ended_scores[:, -1])
    return state.replace(
        cache=reorder_cache(state.cache, origin),
        step=step + 1,
        tokens=tokens[rows, kept],
        running=state.running & running,
        seen=None if state.seen is None else _with_tokens(state.seen[origin], token),
        scores=scores,
        ended_tokens=ended_tokens,
        ended_scores=ended_scores,
    )


def _with_tokens(seen: Array | None, token: Array) -> Array | None:
    """`seen` [R, V] with each row's token [R] added."""
    return None if seen is None else seen.at[jnp.arange(token.size), token].set(True)

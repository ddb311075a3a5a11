"""Small decoders with a cache whose every number is known, for tests of generation."""

import jax
import jax.numpy as jnp
import numpy as np

from prelnroberta.inference.generation import (
    generate,
)

PAD = 1


def toy_params(seed: int = 0, V: int = 11, N: int = 2, D: int = 8, H: int = 2, P: int = 24):
    rng = np.random.default_rng(seed)
    shapes = {"word": (V, D), "position": (P, D), "out": (D, V)}
    shapes |= dict.fromkeys("qkv", (N, D, H, D // H)) | {"o": (N, H, D // H, D)}
    scale = {"out": 1.5}
    return {
        name: (scale.get(name, 0.8) * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def toy_logits(params: dict, tokens: tuple[int, ...]) -> np.ndarray:
    """Next-token logits [V] after bare tokens: no padding, no cache, float64."""
    p = {name: np.float64(value) for name, value in params.items()}
    x = p["word"][list(tokens)] + p["position"][1 : len(tokens) + 1]
    hidden = np.triu(np.ones((len(tokens), len(tokens)), bool), 1)
    for q, k, v, o in zip(p["q"], p["k"], p["v"], p["o"], strict=True):
        scores = np.einsum("md,dhk,le,ehk->hml", x, q, x, k) / np.sqrt(q.shape[-1])
        weights = np.exp(np.where(hidden, -np.inf, scores))
        weights /= weights.sum(axis=-1, keepdims=True)
        x = np.tanh(x + np.einsum("hml,ld,dhk,hke->me", weights, x, v, o))
    return x[-1] @ p["out"]


def toy_decode(params, input_ids, attention_mask, cache):
    L, T = input_ids.shape[1], cache["valid"].shape[1]
    real, start = attention_mask != 0, cache["index"]
    position = (cache["count"][:, None] + jnp.cumsum(real, axis=1)) * real
    x = params["word"][input_ids] + params["position"][position]
    valid = jax.lax.dynamic_update_slice(cache["valid"], real, (0, start))
    visible = valid[:, None, :] & (jnp.arange(T) <= (start + jnp.arange(L))[:, None])

    def layer(x, p):
        q, k, v = (jnp.einsum("bld,dhk->blhk", x, p[name]) for name in "qkv")
        k = jax.lax.dynamic_update_slice(p["keys"], k, (0, start, 0, 0))
        v = jax.lax.dynamic_update_slice(p["values"], v, (0, start, 0, 0))
        scores = jnp.einsum("bmhk,bthk->bhmt", q, k) / np.sqrt(q.shape[-1])
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), axis=-1)
        mixed = jnp.einsum("bhmt,bthk->bmhk", weights, v)
        return jnp.tanh(x + jnp.einsum("bmhk,hkd->bmd", mixed, p["o"])), (k, v)

    stacked = {name: params[name] for name in "qkvo"}
    stacked |= {name: cache[name] for name in ("keys", "values")}
    x, (keys, values) = jax.lax.scan(layer, x, stacked)
    return x @ params["out"], {
        "keys": keys,
        "values": values,
        "valid": valid,
        "count": cache["count"] + real.sum(axis=1),
        "index": start + L,
    }


def toy_cache(params: dict, B: int, T: int) -> dict:
    N, _, H, K = params["q"].shape
    return {
        "keys": jnp.zeros((N, B, T, H, K)),
        "values": jnp.zeros((N, B, T, H, K)),
        "valid": jnp.zeros((B, T), bool),
        "count": jnp.zeros(B, jnp.int32),
        "index": jnp.int32(0),
    }


def toy_generate(params, prompts, settings, key=None, **layout):
    ids, mask = pad_toy_prompts(prompts, **layout)
    columns = (
        ids.shape[1] + settings.new_token_bounds(ids.shape[1])[1] - 1
    )  # the least that will do
    cache = toy_cache(params, len(prompts), columns)
    output = generate(toy_decode, params, cache, ids, mask, settings, key)
    new = np.asarray(output.sequences)[:, ids.shape[1] :]
    repeated = np.repeat(ids, settings.num_return_sequences, axis=0)
    np.testing.assert_array_equal(output.sequences[:, : ids.shape[1]], repeated)
    return new, output.scores


def pad_toy_prompts(prompts, side="left", width=None):
    width = width or max(map(len, prompts))
    ids = np.full((len(prompts), width), PAD, np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        begin = {"left": width - len(prompt), "right": 0, "both": (width - len(prompt)) // 2}[side]
        ids[row, begin : begin + len(prompt)] = prompt
        mask[row, begin : begin + len(prompt)] = 1
    return ids, mask


TOY_PROMPTS = [(5, 3, 9, 4), (7,), (4, 4, 8), (10, 6)]


def constant_decoder(params, input_ids, attention_mask, cache):
    """The same logits [V] after any tokens."""
    return jnp.broadcast_to(params, (*input_ids.shape, params.size)), cache


def trigram(params, input_ids, attention_mask, cache):
    """Logits [V, V, V] by the two latest tokens."""

    def step(pair, column):
        token, real = column
        pair = jnp.where(real[:, None] != 0, jnp.stack([pair[:, 1], token], axis=1), pair)
        return pair, params[pair[:, 0], pair[:, 1]]

    pair, logits = jax.lax.scan(step, cache["pair"], (input_ids.T, attention_mask.T))
    return logits.swapaxes(0, 1), {"pair": pair}


def generate_from_logits(logits, prompts, settings, key=None):
    ids, mask = pad_toy_prompts(prompts)
    output = generate(constant_decoder, jnp.float32(logits), {}, ids, mask, settings, key)
    return np.asarray(output.sequences)[:, ids.shape[1] :].tolist()

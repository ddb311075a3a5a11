"""Positions, normalization, projections and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prelnroberta.model import encoder


def test_position_ids_count_real_tokens():
    ids = jnp.asarray([[12, 31, 13, 1], [1, 12, 31, 1], [1, 1, 1, 1]])
    found = encoder.default_position_ids(ids, 1)
    np.testing.assert_array_equal(found, [[2, 3, 4, 1], [1, 2, 3, 1], [1, 1, 1, 1]])


def test_layer_norm_precision_far_from_zero():
    """At mean 100 and deviation 1, Flax's one-pass variance is off by 1.7e-3."""
    x = np.random.default_rng(0).standard_normal((64, 256)) + 100
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    unit = {"scale": jnp.ones(256), "bias": jnp.zeros(256)}
    found = encoder.layer_norm(unit, jnp.asarray(x), 1e-12)
    assert np.abs(found - expected).max() < 3e-5


@pytest.mark.parametrize(
    ("equation", "inputs", "kernel", "fan_in"),
    [
        ("bld,df->blf", (3, 5, 8), (8, 12), 1),  # wider, by halves
        ("bld,df->blf", (3, 5, 4), (4, 7), 1),  # wider, no halves
        ("blf,fd->bld", (3, 5, 12), (12, 8), 1),
        ("bld,dhk->blhk", (3, 5, 8), (8, 2, 4), 1),
        ("bmhk,hkd->bmd", (3, 5, 2, 4), (2, 4, 8), 2),
        ("...d,dc->...c", (0, 8), (8, 3), 1),
    ],
)
def test_projection_matches_einsum_in_value_and_derivatives(equation, inputs, kernel, fan_in):
    """Forwards, backwards and one after the other: it has a derivative rule of its own."""
    rng = np.random.default_rng(0)
    shapes = inputs, kernel, kernel[fan_in:]
    at, along = (tuple(rng.standard_normal(shape) for shape in shapes) for _ in range(2))

    def projected(x, kernel, bias):
        return encoder.project({"kernel": kernel, "bias": bias}, equation, x)

    def plain(x, kernel, bias):
        return jnp.einsum(equation, x, kernel) + bias

    def derivatives(function):
        def loss(*values):
            return jnp.sin(function(*values)).sum()

        gradient = jax.grad(loss, (0, 1, 2))
        return (
            function(*at),
            jax.jvp(gradient, at, along),
            jax.grad(
                lambda *values: sum(
                    (g * t).sum() for g, t in zip(gradient(*values), along, strict=True)
                ),
                (0, 1, 2),
            )(*at),
        )

    with jax.enable_x64(True):
        found, expected = derivatives(projected), derivatives(plain)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected
    )


def test_dropout_differs_by_head_and_example_and_keeps_the_mean():
    x = jnp.ones((8, 4, 32, 32))
    dropped = np.asarray(encoder.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(4 / 3)}
    assert abs(dropped.mean() - 1) < 0.02
    flat = dropped.reshape(32, -1)
    assert len({row.tobytes() for row in flat}) == 32
    assert encoder.dropout(x, 0.25, None) is x


@pytest.mark.parametrize("shape", [(64, 4097), (64, 3, 1367), (4096, 1)])
def test_dropout_draws_are_independent(shape):
    """Four draws share a block of random bits: neither they nor neighbours know of each other."""
    rate, n = 0.1, np.prod(shape)
    dropped = np.asarray(encoder.dropout(jnp.ones(shape), rate, jax.random.key(1))) == 0
    spread = 5 / np.sqrt(n)
    assert abs(dropped.mean() - rate) < spread * np.sqrt(rate * (1 - rate))
    flat = dropped.reshape(len(dropped), -1) - rate
    size = flat.shape[1]
    for lag in {1, 2, 3, size // 4, size // 2, size - 1} - {0}:
        pairs = flat[:, :-lag] * flat[:, lag:]
        if pairs.size:
            assert abs(pairs.mean()) < 5 / np.sqrt(pairs.size) * rate * (1 - rate), lag
    rows = flat[:-1] * flat[1:]
    assert abs(rows.mean()) < 5 / np.sqrt(rows.size) * rate * (1 - rate)

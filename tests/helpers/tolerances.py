"""Error measures and the bounds of the parity tests."""

from __future__ import annotations

import numpy as np

from prelnroberta import params as parameters


def rms_relative(found: np.ndarray, expected: np.ndarray) -> float:
    """rms of the difference over rms of the expected values."""
    found, expected = np.float64(found), np.float64(expected)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def max_relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over rms of the expected values."""
    found, expected = np.float64(found), np.float64(expected)
    return float(np.abs(found - expected).max() / np.sqrt(np.mean(expected**2)))


def assert_close(
    found: np.ndarray, expected: np.ndarray, name: str, rms: float = 2e-6, largest: float = 2e-5
) -> None:
    """The parity ladder's bounds (design, section 6): torch's own float32 shows half of them."""
    assert np.shape(found) == np.shape(expected), f"{name}: {np.shape(found)}"
    measured = rms_relative(found, expected), max_relative(found, expected)
    assert measured[0] <= rms and measured[1] <= largest, f"{name}: rms, max = {measured}"


def assert_outputs_match(config, batch, found, expected, rms=3e-6, largest=3e-5):
    """Expected arrays by name against ours, at real tokens where pads may differ."""
    real = batch["attention_mask"] == 1 if config.is_decoder else slice(None)
    assert [k for k in found if k != "loss"] == list(expected)
    for name, value in expected.items():
        a, b = found[name], value
        if not isinstance(a, tuple):
            a, b = (a,), (b,)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            x, y = np.asarray(x), np.asarray(y)
            if "attentions" in name:
                x, y = x.swapaxes(1, 2), y.swapaxes(1, 2)
            assert_close(x[real], y[real], f"{name} {i}", rms, largest)


def assert_gradients_match(config, found, expected, floor=1e-9, padding_idx=True):
    """Expected gradients by torch name against ours.

    Args:
        floor: below this share of the greatest gradient, one is zero in truth (softmax sees no
            shift by a key's, a choice's or a span's bias) and is compared absolutely.
        padding_idx: whether the reference stops the gradient of lookups at the pad row, as torch
            does and Flax did not.
    """
    scale = max(np.abs(g).max() for g in expected.values())
    # Untied, transformers 5 computes with decoder.bias and also keeps an unused lm_head.bias.
    moved = {n for n in found if np.abs(found[n]).max() > 2e-6 * scale}
    assert moved - {"lm_head.bias", "lm_head.decoder.bias"} <= set(expected)
    for name, gradient in expected.items():
        if name not in found:
            assert name.startswith("lm_head.decoder."), name
        elif np.abs(gradient).max() <= floor * scale:
            assert np.abs(found[name]).max() < 2e-6 * scale, name
        else:
            ours = found[name]
            if padding_idx and ("word_emb" in name or "position_emb" in name):
                ours, gradient = (np.delete(g, config.pad_token_id, 0) for g in (ours, gradient))
            assert_close(ours, gradient, f"gradient of {name}", 1e-5, 2e-4)


def assert_same_params(a, b):
    a, b = parameters.flatten(a), parameters.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)

"""Fused attention: the numbers of splash (interpreted), the calls of cuDNN (lowered), errors."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prelnroberta.errors import InputError
from prelnroberta.model import attention_kernels
from prelnroberta.model.attention_kernels import choose_kernel, unsupported_reasons
from prelnroberta.model.layers import visibility_mask
from tests.helpers.programs import ROOT, call, tiny_flags
from tests.helpers.small_models import TINY

NO_DROPOUT = TINY.replace(attention_probs_dropout_prob=0.0)


@pytest.mark.parametrize(("L", "K", "causal"), [(20, 20, False), (20, 8, True), (150, 8, False)])
def test_splash_matches_plain_attention(L, K, causal):
    """Outputs and gradients on packed rows with pads on either side, who see each other."""
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, L, 3, K)), jnp.float32) for _ in "qkvg")
    ids = np.repeat([[1, 1, 2, 3], [4, 4, 4, 2]], -(-L // 4), axis=1)[:, :L]
    mask = np.ones((2, L), int)
    mask[0, :3] = mask[1, L - 5 :] = 0
    segments = attention_kernels.to_segment_ids(jnp.asarray(mask), jnp.asarray(ids), (2, L))
    visible = visibility_mask(segment_ids=segments, causal_length=L if causal else None)

    def splash(q, k, v):
        return attention_kernels.splash_attention(q, k, v, segments, causal, interpret=True)

    def plain(q, k, v):
        scores = jnp.where(visible[:, None], jnp.einsum("bmhk,blhk->bhml", q, k), -1e30)
        return jnp.einsum("bhml,blhk->bmhk", jax.nn.softmax(scores), v)

    (found, back), (expected, expected_back) = (jax.vjp(f, q, k, v) for f in (splash, plain))
    np.testing.assert_allclose(found, expected, atol=5e-6)
    for ours, theirs in zip(back(g), expected_back(g), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_segments_of_real_tokens_follow_the_mask():
    mask = jnp.asarray([[0, 1, 1, 0], [1, 1, 1, 1]])
    segments = attention_kernels.to_segment_ids(mask, None, mask.shape)
    same = visibility_mask(segment_ids=segments)
    seen = jnp.broadcast_to(visibility_mask(mask), same.shape)
    np.testing.assert_array_equal(same[mask == 1], seen[mask == 1])
    assert same.any(axis=-1).all()  # splash is wrong where nobody is seen


@pytest.mark.slow
def test_splash_on_eight_devices_matches_xla_on_one():
    """A step of gradient descent at rate 1, with remat under a scan: on a mesh and by pmap."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/programs/splash_on_a_mesh.py"],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for mesh, found in json.loads(done.stdout).items():
        assert found["loss"] <= 1e-6 and found["apart"] <= 1e-6, mesh


@pytest.mark.parametrize("queries", [1, 10])
def test_cudnn_is_called_forward_and_backward(queries, monkeypatch):
    """The program for a GPU: one call each way, with the mask as one bias for all heads."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    B, L, H, K = 3, 10, 2, 8
    x = jax.ShapeDtypeStruct((B, L, H, K), jnp.bfloat16)
    visible = jax.ShapeDtypeStruct((B, queries, L), bool)

    def total(*arguments):
        return attention_kernels.cudnn_attention(*arguments).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(x, x, x, visible)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    forward, backward = (line for line in text.splitlines() if "__cudnn$fmha" in line)
    qkv, bias = f"tensor<{B}x{L}x{H}x{K}xbf16>", f"tensor<{B}x1x{L}x{L}xbf16>"
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in forward
    assert "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in backward
    taken = re.findall(r"tensor<[^>]*>", forward.rpartition(": (")[2].partition("->")[0])
    assert taken == [qkv, qkv, qkv, bias]
    assert re.search(r"fmha_scale\\22: 1\.0\b", forward)
    assert bias in backward.rpartition(": (")[2].partition("->")[0]


def test_auto_selects_kernel_only_where_supported(monkeypatch):
    def chosen(platform, config=NO_DROPOUT, dtype=jnp.bfloat16, training=True, **more):
        monkeypatch.setattr(attention_kernels, "target_platform", lambda: platform)
        asked = {"a cache": more.get("cache", False)}
        return choose_kernel("auto", config, dtype, 32, more.get("mask"), training, asked)

    dropping = NO_DROPOUT.replace(attention_probs_dropout_prob=0.1)
    assert [chosen(x) for x in ("cpu", "tpu", "gpu")] == [None, "splash", "cudnn"]
    assert chosen("gpu", dtype=jnp.float32) is None
    assert chosen("tpu", dropping) is None and chosen("tpu", dropping, training=False) == "splash"
    assert chosen("tpu", cache=True) is None
    assert chosen("tpu", mask=jnp.ones((1, 32, 32))) is None


def test_unsupported_kernel_features_are_reported_together():
    config = TINY.replace(attention_probs_dropout_prob=0.1, num_attention_heads=1, hidden_size=20)
    found = unsupported_reasons("cudnn", config, jnp.float32, 31, True, "tpu")
    for part in ("tpu backend", "dropout_prob=0.1", "float32", "20 dimensions", "31 positions"):
        assert any(part in reason for reason in found), part
    assert unsupported_reasons("splash", config, jnp.float32, 31, False, "tpu") == []
    with pytest.raises(InputError, match=r"splash.*cpu backend.*a cache"):
        choose_kernel("splash", config, jnp.float32, 31, None, False, {"a cache": True})


@pytest.mark.libtpu
@pytest.mark.parametrize("mesh", [(), ("--mesh_tensor=2",)])
def test_splash_compiles_for_tpu_slice(mesh):
    run = ["--run_dir=none", "--compile_topology=v5e:2x2", "--attention=splash", *mesh]
    rows = {"sequence_length": 160, "max_position_embeddings": 162}  # two tiles
    done = call("pretrain", *tiny_flags(attention_probs_dropout_prob=0.0, **rows), *run)
    assert done.returncode == 0, done.stderr
    assert ": fits" in done.stdout and "all-gather" not in done.stdout


def test_unsupported_kernel_is_refused_before_training(tmp_path):
    flags = tiny_flags(attention="splash", attention_probs_dropout_prob=0.1)
    done = call("pretrain", *flags, f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    [line] = done.stderr.splitlines()
    assert "--attention=splash does not support the cpu backend" in line
    assert "attention_probs_dropout_prob=0.1 in training, expected 0" in line

"""Checkpoints as fairseq and its forks write them, and fairseq's encoder in float64 torch.

Written from descriptions of fairseq's files and encoder, sharing no line with `bridges`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

N, D, H, MLP, V, P = 2, 24, 3, 40, 61, 22
S = "encoder.sentence_encoder."


def fairseq_state(
    heads: dict[str, int] | None = None, untied: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Every tensor of fairseq's RoBERTa with --encoder-normalize-before, all of them random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + normal(D), f"{name}.bias": normal(D)}

    def linear(name: str, out: int, into: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": normal(out, into), f"{name}.bias": normal(out)}

    state = {
        S + "version": torch.tensor([3.0]),
        S + "embed_tokens.weight": normal(V, D),
        S + "embed_positions.weight": normal(P, D),
        **norm(S + "layernorm_embedding"),
        **norm(S + "layer_norm"),
        **linear("encoder.lm_head.dense", D, D),
        **norm("encoder.lm_head.layer_norm"),
        "encoder.lm_head.bias": normal(V),
    }
    table = state[S + "embed_tokens.weight"]
    state["encoder.lm_head.weight"] = normal(V, D) if untied else table
    for n in range(N):
        layer = f"{S}layers.{n}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state |= linear(f"{layer}self_attn.{name}", D, D)
        state |= norm(layer + "self_attn_layer_norm") | norm(layer + "final_layer_norm")
        state |= linear(layer + "fc1", MLP, D) | linear(layer + "fc2", D, MLP)
    for name, classes in (heads or {}).items():
        state |= linear(f"classification_heads.{name}.dense", D, D)
        state |= linear(f"classification_heads.{name}.out_proj", classes, D)
    return state


def fairseq_settings(**changes: Any) -> dict[str, Any]:
    """The model settings in the Namespace of a training run."""
    return {
        "arch": "roberta_large",
        "encoder_layers": N,
        "encoder_embed_dim": D,
        "encoder_ffn_embed_dim": MLP,
        "encoder_attention_heads": H,
        "encoder_normalize_before": True,
        "layernorm_embedding": True,
        "activation_fn": "gelu",
        "pooler_activation_fn": "tanh",
        "untie_weights_roberta": False,
        "max_positions": P - 2,
        "dropout": 0.1,
        "attention_dropout": 0.2,
        "pooler_dropout": 0.0,
        "lr": [0.002],
        "adam_betas": (0.9, 0.98),
        **changes,
    }


def fairseq_checkpoint(state: dict[str, torch.Tensor], where: str = "cfg", **changes: Any) -> dict:
    """What fairseq's trainer saves."""
    namespace = argparse.Namespace(**fairseq_settings(**changes))
    cfg = {"common": {"fp16": True}, "model": namespace, "task": {"_name": "masked_lm"}}
    return {
        "args": namespace if where == "args" else None,
        "cfg": cfg if where == "cfg" else None,
        "model": state,
        "criterion": None,
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "num_updates": 3}],
        "extra_state": {"val_loss": np.float64(3.5), "train_iterator": {"epoch": 1}},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}},
    }


def with_copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As fairseq 0.12 saves: each layer's weights again, for a fused kernel, and stale."""
    copies = {
        "in_proj_weight": (3 * D, D),
        "in_proj_bias": (3 * D,),
        "out_proj_weight": (D, D),
        "fc1_weight": (MLP, D),
        "fc2_bias": (D,),
    }
    return state | {
        f"{S}layers.{n}.{name}": torch.zeros(shape)
        for n in range(N)
        for name, shape in copies.items()
    }


def in_old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Before fairseq 0.9: `decoder.`, packed q, k, v, numbered norms."""
    old = _packed(state, ".self_attn.in_proj_weight", ".self_attn.in_proj_bias")
    renames = (
        ("self_attn_layer_norm", "layer_norms.0"),
        ("final_layer_norm", "layer_norms.1"),
        ("layernorm_embedding", "emb_layer_norm"),
    )
    found = {}
    for name, value in old.items():
        for new, before in renames:
            name = name.replace(f".{new}.", f".{before}.")
        found[re.sub(r"^encoder\.", "decoder.", name)] = value
    return found


def in_deepspeed_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DinkyTrain's `deepspeed_roberta_*`: one fused layer, with names of its own."""
    fused = {
        "self_attn.out_proj.weight": "attn_ow",
        "self_attn.out_proj.bias": "attn_ob",
        "self_attn_layer_norm.weight": "norm_w",
        "self_attn_layer_norm.bias": "norm_b",
        "final_layer_norm.weight": "attn_nw",
        "final_layer_norm.bias": "attn_nb",
        "fc1.weight": "inter_w",
        "fc1.bias": "inter_b",
        "fc2.weight": "output_w",
        "fc2.bias": "output_b",
    }
    found = {}
    for name, value in _packed(state, ".attn_qkvw", ".attn_qkvb").items():
        for plain, own in fused.items():
            name = re.sub(rf"(\.layers\.\d+\.){re.escape(plain)}$", rf"\g<1>{own}", name)
        found[name] = value
    return found


def _packed(state: dict[str, torch.Tensor], weight: str, bias: str) -> dict[str, torch.Tensor]:
    found = {k: v for k, v in state.items() if not re.search(r"\.[qkv]_proj\.", k)}
    for n in range(N):
        for leaf, name in (("weight", weight), ("bias", bias)):
            parts = [state[f"{S}layers.{n}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            found[f"{S}layers.{n}{name}"] = torch.cat(parts)
    return found


def save_shards(path: Path, whole: dict, ranks: int) -> list[Path]:
    """As --use-sharded-state: one flat parameter an outer and an inner module, cut for ranks."""
    state = dict(whole["model"])
    buffers = {S + "version": state.pop(S + "version")}
    output = state.pop("encoder.lm_head.weight")
    assert output is state[S + "embed_tokens.weight"]
    inner = {k: v for k, v in state.items() if k.startswith(S)}
    outer = {k: v for k, v in state.items() if not k.startswith(S)}
    shared = [(S + "embed_tokens.weight", "encoder.lm_head.weight")]
    parts = [{"model": dict(buffers), "wraps": []} for _ in range(ranks)]
    for prefix, group in (("", outer), (S.removesuffix("."), inner)):
        flat = torch.cat([v.reshape(-1) for v in group.values()])
        size = -(-len(flat) // ranks)
        padded = torch.cat([flat, torch.zeros(size * ranks - len(flat))])
        for rank, part in enumerate(parts):
            begin, end = rank * size, (rank + 1) * size
            key = f"{prefix}.flat_param_0" if prefix else "flat_param_0"
            part["model"][key] = padded[begin:end].clone()
            names = [k.removeprefix(prefix + ".") if prefix else k for k in group]
            part["wraps"].append(
                {
                    "fsdp_path": prefix,
                    "params": {
                        "flat_param_0": {
                            "names": names,
                            "shapes": [v.shape for v in group.values()],
                            "numels": [v.numel() for v in group.values()],
                            "padding": min(size, max(0, end - len(flat))),
                        }
                    },
                    "no_broadcast_optim_state": False,
                    "shared_param_info": [] if prefix else shared,
                }
            )
    files = []
    for rank, part in enumerate(parts):
        metadata = {"param_metadata": part["wraps"], "buffer_names": list(buffers)}
        files.append(path.with_name(f"{path.stem}-shard{rank}.pt"))
        torch.save({**whole, "model": part["model"], "fsdp_metadata": metadata}, files[-1])
    return files


def ragged_ids(seed: int = 0) -> np.ndarray:
    """ids [5, 17]: no padding, on the right, on the left, in the middle, and a single token."""
    ids = np.random.default_rng(seed).integers(4, V, (5, 17))
    ids[1, 12:] = ids[2, :5] = ids[3, 4:8] = ids[4, 1:] = 1
    return ids


def run_fairseq(
    state: dict[str, torch.Tensor], ids: np.ndarray, head: str | None = "masked_lm"
) -> np.ndarray:
    """fairseq's RobertaModel in eval mode, in float64, on today's names.

    Returns logits [B, L, V], features [B, L, D] without a head, or [B, C] of a named head.
    """
    w = {name: value.double() for name, value in state.items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (D,), w[name + ".weight"], w[name + ".bias"], 1e-5)

    tokens = torch.from_numpy(ids)
    padding = tokens == 1
    positions = torch.cumsum(~padding, 1) * ~padding + 1
    x = w[S + "embed_tokens.weight"][tokens] + w[S + "embed_positions.weight"][positions]
    x = norm(x, S + "layernorm_embedding") * ~padding[..., None]
    for n in range(N):
        layer = f"{S}layers.{n}."
        y = norm(x, layer + "self_attn_layer_norm")
        q, k, v = (
            linear(y, f"{layer}self_attn.{name}_proj").unflatten(-1, (H, D // H)).transpose(1, 2)
            for name in "qkv"
        )
        scores = q @ k.transpose(-1, -2) * (D // H) ** -0.5
        scores = scores.masked_fill(padding[:, None, None], float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = x + linear(mixed, layer + "self_attn.out_proj")
        y = F.gelu(linear(norm(x, layer + "final_layer_norm"), layer + "fc1"))
        x = x + linear(y, layer + "fc2")
    x = norm(x, S + "layer_norm")
    if head == "masked_lm":
        x = norm(F.gelu(linear(x, "encoder.lm_head.dense")), "encoder.lm_head.layer_norm")
        x = F.linear(x, w["encoder.lm_head.weight"], w["encoder.lm_head.bias"])
    elif head is not None:
        x = torch.tanh(linear(x[:, 0], f"classification_heads.{head}.dense"))
        x = linear(x, f"classification_heads.{head}.out_proj")
    return x.numpy()

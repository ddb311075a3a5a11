"""Joins the shards that fairseq writes in fully sharded data-parallel (FSDP) training.

`--use-sharded-state` writes `NAME-shard0.pt`, `NAME-shard1.pt`, ... Each holds a part of every flat
parameter and the metadata to split the flat parameters into tensors (fairscale's
FullyShardedDataParallel: `local_metadata_dict` and `consolidate_shard_weights`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridges.formats import torch_pickle
from prelnroberta.errors import InputError

_SHARD = re.compile(r"(?P<stem>.+)-shard\d+\.pt")


def shard_paths(path: Path) -> list[Path]:
    """Returns all shards of a checkpoint in order, or `path` itself if it is not sharded.

    Raises:
        InputError: `path` is a shard, and one before it is missing.
    """
    match = _SHARD.fullmatch(path.name)
    stem = match["stem"] if match else path.stem
    if not match and path.exists():
        return [path]
    present = {p.name for p in path.parent.glob("*-shard*.pt")}
    shards = []
    while f"{stem}-shard{len(shards)}.pt" in present:
        shards.append(path.with_name(f"{stem}-shard{len(shards)}.pt"))
    if match and path not in shards:
        raise InputError(f"{path}: {stem}-shard{len(shards)}.pt is not next to it; copy all shards")
    return shards or [path]


def load(path: Path) -> Any:
    """As `torch_pickle.load`, with `model` joined from all shards.

    Raises:
        InputError: also if the shards are incomplete.
    """
    shards = [torch_pickle.load(shard) for shard in shard_paths(path)]
    if not isinstance(shards[0], dict) or "fsdp_metadata" not in shards[0]:
        return shards[0]
    try:
        return {**shards[0], "model": _join_shards(shards)}
    except InputError:
        raise
    except Exception as error:  # nested metadata, which may hold anything in a forged file
        raise InputError(
            f"{path}: its {len(shards)} shards do not fit together ({error!r:.200}); copy them all"
        ) from None


def _join_shards(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    weights = [shard["model"] for shard in shards]
    metadata = [shard["fsdp_metadata"] for shard in shards]
    joined = {}
    for i, module in enumerate(metadata[0]["param_metadata"]):
        prefix = module["fsdp_path"] + "." if module["fsdp_path"] else ""
        # A parameter that is not sharded is whole in the file of the first rank.
        ranks = 1 if module["no_broadcast_optim_state"] else len(shards)
        for flat_name, layout in module["params"].items():
            parts = []
            for rank in range(ranks):
                part = np.asarray(weights[rank][prefix + flat_name]).reshape(-1)
                padding = metadata[rank]["param_metadata"][i]["params"][flat_name]["padding"]
                parts.append(part[: part.size - padding])
            for name, tensor in _split(np.concatenate(parts), layout, prefix + flat_name):
                joined[prefix + name] = tensor
    for module in metadata[0]["param_metadata"]:
        joined |= {copy: joined[source] for source, copy in module["shared_param_info"]}
    for name in metadata[0]["buffer_names"]:
        joined[name] = weights[0][name]
    return joined


def _split(
    flat: np.ndarray, layout: Mapping[str, Any], flat_name: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Cuts a flat parameter into (name, tensor)."""
    if flat.size != sum(map(math.prod, layout["shapes"])):
        raise ValueError(f"{flat.size} numbers for {flat_name}")
    begin = 0
    for name, shape in zip(layout["names"], layout["shapes"], strict=True):
        end = begin + math.prod(shape)
        yield name, flat[begin:end].reshape(shape)
        begin = end

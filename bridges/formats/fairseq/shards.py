"""fairseq's files -> one checkpoint: the parts that fully sharded training writes are joined.

`--use-sharded-state` leaves `NAME-shard0.pt`, `NAME-shard1.pt`, ...; each holds a part of every
flat parameter and the metadata to cut the whole apart again (fairscale's
FullyShardedDataParallel: `local_metadata_dict` and `consolidate_shard_weights`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridges.formats import torch_pickle
from prelnroberta.errors import InputError

_SHARD = re.compile(r"(?P<stem>.+)-shard\d+\.pt")


def shards_of(path: Path) -> list[Path]:
    """The files that belong to this one: itself, or all shards in order."""
    match = _SHARD.fullmatch(path.name)
    stem = match["stem"] if match else path.stem
    if not match and path.exists():
        return [path]
    found = {p.name for p in path.parent.glob("*-shard*.pt")}
    shards = []
    while f"{stem}-shard{len(shards)}.pt" in found:
        shards.append(path.with_name(f"{stem}-shard{len(shards)}.pt"))
    if match and path not in shards:
        raise InputError(f"{path}: {stem}-shard{len(shards)}.pt is not beside it; copy all shards")
    return shards or [path]


def load(path: Path) -> Any:
    """What `torch_pickle.load` gives for a file, with `model` joined from its shards.

    Raises:
        InputError: also for shards that do not make a whole.
    """
    parts = [torch_pickle.load(shard) for shard in shards_of(path)]
    if not isinstance(parts[0], dict) or "fsdp_metadata" not in parts[0]:
        return parts[0]
    try:
        return {**parts[0], "model": _joined(parts)}
    except InputError:
        raise
    except Exception as error:  # the metadata is nested, and forged ones may hold anything
        raise InputError(
            f"{path}: its {len(parts)} shards do not make a whole ({error!r:.200}); are all there?"
        ) from None


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    weights = [part["model"] for part in parts]
    metadata = [part["fsdp_metadata"] for part in parts]
    joined = {}
    for i, wrapped in enumerate(metadata[0]["param_metadata"]):
        prefix = wrapped["fsdp_path"] + "." if wrapped["fsdp_path"] else ""
        # Parameters of one rank alone are whole in its file.
        ranks = 1 if wrapped["no_broadcast_optim_state"] else len(parts)
        for flat_name, cuts in wrapped["params"].items():
            pieces = []
            for rank in range(ranks):
                piece = np.asarray(weights[rank][prefix + flat_name]).reshape(-1)
                own = metadata[rank]["param_metadata"][i]["params"][flat_name]
                pieces.append(piece[: piece.size - own["padding"]])
            flat = np.concatenate(pieces)
            if flat.size != sum(map(math.prod, cuts["shapes"])):
                raise ValueError(f"{flat.size} numbers for {prefix + flat_name}")
            begin = 0
            for name, shape in zip(cuts["names"], cuts["shapes"], strict=True):
                end = begin + math.prod(shape)
                joined[prefix + name] = flat[begin:end].reshape(shape)
                begin = end
    for wrapped in metadata[0]["param_metadata"]:
        joined |= {copy: joined[source] for source, copy in wrapped["shared_param_info"]}
    for name in metadata[0]["buffer_names"]:
        joined[name] = weights[0][name]
    return joined

"""Checkpoints of a training state: asynchronous, whole or not at all, and verified when read.

orbax writes them, every host its own part; a step's directory appears by one rename and goes by
another, so a killed process leaves either a complete step or none. orbax alone would load a flipped
byte without a word (measured, 6 times in 6), so every checkpoint carries a manifest of each leaf's
shape, dtype and digest. A digest is a sum over elements, the same however a leaf is cut over
devices and hosts: what one mesh saved, another verifies.

    <directory>/<step>/params      the parameter tree, alone, for whoever needs no optimizer
    <directory>/<step>/training    step, optimizer state and report window
    <directory>/<step>/manifest    leaves, and the caller's own JSON (`extra`)
    <directory>/removed            steps no longer kept, until the next save
    <directory>/damaged            steps that were set aside
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prelnroberta.errors import InputError
from prelnroberta.params import check_leaves
from prelnroberta.training.train_step import TrainState

# orbax empties a directory file by file: a process killed meanwhile would leave part of a step in
# its place. It renames into this one instead, and we delete there.
_REMOVED = "removed"
_DAMAGED = "damaged"


class CheckpointError(InputError):
    """A checkpoint could not be written or read; the message says which and what still stands."""


class CorruptCheckpointError(CheckpointError):
    """What is on the disk is not what was saved."""


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """orbax logs the traceback of each of its threads; their errors reach us as exceptions."""
    return "orbax" not in record.pathname and "never retrieved" not in record.getMessage()


class CheckpointManager:
    """The checkpoints of one run: the latest `keep` and the one with the lowest loss.

    Args:
        directory: made if it does not exist.
        keep: how many of the latest to keep, 1 or more.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        import orbax.checkpoint as ocp

        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_orbax)
        self.directory = Path(directory).absolute()
        self._ocp = ocp
        self._keep = keep
        self._manager = self._open()

    def _open(self) -> Any:
        from orbax.checkpoint import checkpoint_managers as policies

        ocp = self._ocp
        best = policies.BestN(
            n=1,
            get_metric_fn=lambda metrics: metrics["loss"],
            reverse=True,
            keep_checkpoints_without_metrics=False,
        )
        latest = policies.LatestN(self._keep)
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([latest, best]),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                todelete_subdir=_REMOVED,
            ),
        )

    def latest_step(self) -> int | None:
        """The last complete step, or None."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """The complete steps that are there, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, extra: dict[str, Any], loss: float | None = None) -> None:
        """Begins to write `state` and returns once its values are safe to change.

        Args:
            extra: JSON-able, given back by `restore`.
            loss: validation loss at this step, if it is known: the lowest is kept for good.

        Raises:
            CheckpointError: if this write or the one before it failed, on a full disk for one. The
                next call tries anew.
        """
        ocp, step = self._ocp, int(state.step)
        if step == self.latest_step():
            return
        self._empty_removed()
        params, training = _split(state)
        manifest = {"leaves": _describe({"params": params, "training": training}), "extra": extra}
        self._reporting(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    training=ocp.args.StandardSave(training),
                    manifest=ocp.args.JsonSave({**manifest, "crc32": _json_checksum(manifest)}),
                ),
                metrics=None if loss is None else {"loss": loss},
                force=True,
            )
        )

    def wait_until_finished(self) -> None:
        """Returns when everything begun is on disk. Raises CheckpointError if a write failed."""
        self._reporting(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits as `wait` does, and lets go. Raises CheckpointError if a write failed."""
        self._reporting(self._manager.close)
        self._empty_removed()

    def restore(
        self, like: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads a step (the latest by default) into the structure and shardings of `like`.

        Raises:
            CheckpointError: naming each leaf that is missing, unexpected, or of another shape or
                dtype.
            CorruptCheckpointError: naming each leaf whose values are not those that were saved, or what
                could not be read at all.
        """
        ocp = self._ocp
        step = self.latest_step() if step is None else step
        where = f"{self.directory}/{step}"
        params, training = _split(like)
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore())
            )
            manifest = dict(restored["manifest"])
            if manifest.pop("crc32", None) != _json_checksum(manifest):
                raise ValueError("checksum of the manifest")
            leaves = manifest["leaves"]
        except Exception as error:
            raise _damaged(where, error) from error
        try:
            check_leaves(
                _named(_abstract({"params": params, "training": training})),
                {
                    path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
                    for path, leaf in leaves.items()
                },
                where,
            )
        except InputError as error:
            raise CheckpointError(f"{error} (another model or optimizer made it)") from None
        try:
            values = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(_abstract(params)),
                    training=ocp.args.StandardRestore(_abstract(training)),
                ),
            )
        except Exception as error:
            raise _damaged(where, error) from error
        found = _describe({"params": values["params"], "training": values["training"]})
        changed = [path for path, leaf in leaves.items() if found[path] != leaf]
        if changed:
            raise _damaged(where, ValueError(f"digest of {', '.join(changed)}"))
        state = TrainState(params=values["params"], **values["training"])
        return state, manifest["extra"]

    def move_aside(self, step: int) -> None:
        """Moves a damaged step out of the way: the one before it is the latest from now on."""
        (self.directory / _DAMAGED).mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another host was faster
            (self.directory / str(step)).rename(self.directory / _DAMAGED / str(step))
        self._manager.reload()

    def _empty_removed(self) -> None:
        if jax.process_index() == 0:
            for step in self.directory.glob(f"{_REMOVED}/*"):
                shutil.rmtree(step, ignore_errors=True)

    def _reporting(self, action: Any) -> None:
        try:
            action()
        except Exception as error:
            reason = _system_error(error)
            if reason is None:
                raise
            # orbax would tell of the same failure again and again.
            self._manager = self._open()
            step = self.latest_step()
            stands = "no checkpoint stands yet" if step is None else f"that of step {step} is whole"
            raise CheckpointError(
                f"a checkpoint could not be saved below {self.directory}: {reason}; {stands}: "
                "make room there and run the same command again"
            ) from error


def _split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    return state.params, {
        "step": state.step,
        "opt_state": state.opt_state,
        "window": state.window,
        "gradient_norm": state.gradient_norm,
    }


def _abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings alone: nothing is guessed from what a file says."""

    def describe(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(describe, tree)


def _named(tree: Any) -> dict[str, Any]:
    """path -> leaf, for any pytree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _describe(tree: Any) -> dict[str, dict[str, Any]]:
    """path -> shape, dtype and digest, for every leaf."""
    leaves = _named(tree)
    digests = jax.device_get(_digests(leaves))
    return {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": int(digests[path])}
        for path, leaf in leaves.items()
    }


@jax.jit
def _digests(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _digest(leaf) for path, leaf in leaves.items()}


def _digest(x: jax.Array) -> jax.Array:
    """[] uint32: the sum of each element's bits, times an odd number drawn from its place.

    Whatever one element is changed to, the sum changes, as its factor has no divisor in common with
    2^32; changes of several go unseen once in 2^32. The numbers are murmur3's finalizer of the
    index (Appleby, 2011).
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        place = (place ^ (place >> shift)) * np.uint32(factor)
    return (bits.astype(jnp.uint32) * (place ^ (place >> 16) | 1)).sum(dtype=jnp.uint32)


def _json_checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _damaged(where: str, error: Exception) -> CorruptCheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return CorruptCheckpointError(
        f"{where}: the checkpoint is damaged ({reason}); move that directory away, or run with "
        "--set_damaged_aside, to go on from the one before it"
    )


def _system_error(error: BaseException | None) -> str | None:
    """What the operating system said, if it is behind this error: its own word, as "No space left
    on device". tensorstore gives it in the text of a ValueError."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if found := re.search(r"([^:]+) \[os_error_code='", str(error)):
            return found[1].strip()
        error = error.__cause__ or error.__context__
    return None

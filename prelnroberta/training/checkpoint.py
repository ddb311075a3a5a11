"""Checkpoints of a training state: asynchronous, atomic, and verified when read.

orbax writes them; each host writes its own shards. The directory of a step appears by one rename
and is removed by another, so a killed process leaves either a complete step or none. orbax alone
loads a flipped byte without an error (measured, 6 times in 6), so every checkpoint carries a
manifest of the shape, dtype and digest of each leaf. A digest is a sum over elements and does not
depend on how a leaf is sharded: a checkpoint that was saved on one mesh is verified on another.

    <directory>/<step>/params      the parameter tree alone, to be read without an optimizer
    <directory>/<step>/training    step, optimizer state, report window and gradient norm
    <directory>/<step>/manifest    leaves, and the caller's own JSON (`extra`)
    <directory>/removed            steps that are no longer kept, until the next save
    <directory>/corrupt            corrupt steps that were moved aside
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prelnroberta.errors import InputError
from prelnroberta.params import check_leaves
from prelnroberta.training.train_step import TrainState

# orbax deletes a directory file by file, and a process that is killed meanwhile would leave part of
# a step. So orbax renames the step into this directory instead, and we delete it there.
_REMOVED_DIR = "removed"
_CORRUPT_DIR = "corrupt"


class CheckpointError(InputError):
    """A checkpoint could not be written or read. The message says which is still complete."""


class CorruptCheckpointError(CheckpointError):
    """The data on disk differs from what was saved."""


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    """orbax logs the tracebacks of its threads, although their errors reach us as exceptions."""
    return "orbax" not in record.pathname and "never retrieved" not in record.getMessage()


class CheckpointManager:
    """The checkpoints of one run: the latest `max_to_keep` and the one with the lowest loss.

    Args:
        directory: created if it does not exist.
        max_to_keep: how many of the latest checkpoints to keep, 1 or more.
    """

    def __init__(self, directory: str | Path, max_to_keep: int = 2):
        import orbax.checkpoint as ocp

        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_from_orbax)
        self.directory = Path(directory).absolute()
        self._ocp = ocp
        self._max_to_keep = max_to_keep
        self._manager = self._make_manager()

    def _make_manager(self) -> Any:
        from orbax.checkpoint import checkpoint_managers as policies

        ocp = self._ocp
        best = policies.BestN(
            n=1,
            get_metric_fn=lambda metrics: metrics["loss"],
            reverse=True,
            keep_checkpoints_without_metrics=False,
        )
        latest = policies.LatestN(self._max_to_keep)
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([latest, best]),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                todelete_subdir=_REMOVED_DIR,
            ),
        )

    def latest_step(self) -> int | None:
        """The last complete step, or None."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """The complete steps, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, extra: dict[str, Any], loss: float | None = None) -> None:
        """Starts to write `state`. Returns once its buffers may be donated or changed.

        Args:
            extra: JSON-serializable; `restore` returns it.
            loss: validation loss at this step, if known. The checkpoint with the lowest loss is
                always kept.

        Raises:
            CheckpointError: this write or the previous one failed, for example on a full disk. The
                next call tries again.
        """
        ocp, step = self._ocp, int(state.step)
        if step == self.latest_step():
            return
        self._delete_removed()
        params, training = _split(state)
        manifest = {"leaves": _describe({"params": params, "training": training}), "extra": extra}
        self._raise_system_errors(
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
        """Waits until all writes are on disk. Raises CheckpointError if a write failed."""
        self._raise_system_errors(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for all writes, then closes. Raises CheckpointError if a write failed."""
        self._raise_system_errors(self._manager.close)
        self._delete_removed()

    def restore(
        self, target: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads a step (the latest by default). Returns the state and the `extra` of `save`.

        Args:
            target: gives the structure, shapes, dtypes and shardings; arrays or ShapeDtypeStructs.

        Raises:
            CheckpointError: names each leaf that is missing, unexpected, or of another shape or
                dtype.
            CorruptCheckpointError: names each leaf whose values differ from those that were saved,
                or what could not be read.
        """
        step = self.latest_step() if step is None else step
        source = f"{self.directory}/{step}"
        params, training = _split(target)
        leaves, extra = self._restore_manifest(step, source)
        _check_same_leaves({"params": params, "training": training}, leaves, source)
        args = self._ocp.args
        restored = self._restore(
            step,
            source,
            params=args.StandardRestore(_abstract(params)),
            training=args.StandardRestore(_abstract(training)),
        )
        found = _describe({"params": restored["params"], "training": restored["training"]})
        if changed := [path for path, leaf in leaves.items() if found[path] != leaf]:
            raise _corrupt(source, ValueError(f"digest of {', '.join(changed)}"))
        state = TrainState(params=restored["params"], **restored["training"])
        return state, extra

    def _restore_manifest(self, step: int, source: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """`leaves` and `extra` of a step's manifest."""
        restored = self._restore(step, source, manifest=self._ocp.args.JsonRestore())
        try:
            manifest = dict(restored["manifest"])
            if manifest.pop("crc32", None) != _json_checksum(manifest):
                raise ValueError("checksum of the manifest")
            return manifest["leaves"], manifest["extra"]
        except Exception as error:
            raise _corrupt(source, error) from error

    def _restore(self, step: int, source: str, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=self._ocp.args.Composite(**items))
        except Exception as error:
            raise _corrupt(source, error) from error

    def move_aside(self, step: int) -> None:
        """Moves a corrupt step to another directory, so that the previous step is the latest."""
        (self.directory / _CORRUPT_DIR).mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another host has moved it already
            (self.directory / str(step)).rename(self.directory / _CORRUPT_DIR / str(step))
        self._manager.reload()

    def _delete_removed(self) -> None:
        if jax.process_index() == 0:
            for step in self.directory.glob(f"{_REMOVED_DIR}/*"):
                shutil.rmtree(step, ignore_errors=True)

    def _raise_system_errors(self, action: Callable[[], Any]) -> None:
        """Runs `action`; an error of the operating system becomes a CheckpointError."""
        try:
            action()
        except Exception as error:
            reason = _system_error(error)
            if reason is None:
                raise
            # The old manager would raise the same failure again in every later call.
            self._manager = self._make_manager()
            step = self.latest_step()
            complete = (
                "no checkpoint is complete yet"
                if step is None
                else f"the checkpoint of step {step} is complete"
            )
            raise CheckpointError(
                f"a checkpoint could not be saved in {self.directory}: {reason}; {complete}. "
                "Free disk space there and run the same command again"
            ) from error


def _split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    return state.params, {
        "step": state.step,
        "opt_state": state.opt_state,
        "window": state.window,
        "gradient_norm": state.gradient_norm,
    }


def _abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings, so that orbax takes none of them from the files."""

    def abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(abstract, tree)


def _check_same_leaves(target: Any, leaves: dict[str, dict[str, Any]], source: str) -> None:
    """Raises CheckpointError if the leaves of a manifest are not those of `target`."""
    saved = {
        path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for path, leaf in leaves.items()
    }
    try:
        check_leaves(_flatten_paths(_abstract(target)), saved, source)
    except InputError as error:
        raise CheckpointError(f"{error} (another model or optimizer made it)") from None


def _flatten_paths(tree: Any) -> dict[str, Any]:
    """path -> leaf, for any pytree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _describe(tree: Any) -> dict[str, dict[str, Any]]:
    """path -> shape, dtype and digest, for every leaf."""
    leaves = _flatten_paths(tree)
    digests = jax.device_get(_digests(leaves))
    return {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": int(digests[path])}
        for path, leaf in leaves.items()
    }


@jax.jit
def _digests(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _digest(leaf) for path, leaf in leaves.items()}


def _digest(x: jax.Array) -> jax.Array:
    """[] uint32: the sum over elements of their bits times an odd number hashed from their index.

    A change of one element always changes the sum, because an odd factor has no divisor in common
    with 2^32. Changes of several elements go undetected with probability 2^-32. The hash is the
    finalizer of murmur3 (Appleby, 2011).
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = (index ^ (index >> shift)) * np.uint32(factor)
    return (bits.astype(jnp.uint32) * (index ^ (index >> 16) | 1)).sum(dtype=jnp.uint32)


def _json_checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _corrupt(source: str, error: Exception) -> CorruptCheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return CorruptCheckpointError(
        f"{source}: the checkpoint is corrupt ({reason}); to resume from the previous one, move "
        "that directory away or pass --skip_corrupt_checkpoints"
    )


def _system_error(error: BaseException | None) -> str | None:
    """The operating system's message behind an error, such as "No space left on device", or None.

    tensorstore gives it in the text of a ValueError.
    """
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if found := re.search(r"([^:]+) \[os_error_code='", str(error)):
            return found[1].strip()
        error = error.__cause__ or error.__context__
    return None

"""Checkpoints of a training state: asynchronous, whole or not at all, and verified when read.

orbax writes them; a step's directory appears by one rename and goes by another, so a killed process
leaves either a complete step or none. orbax alone would load a flipped byte without a word
(measured, 6 times in 6), so every checkpoint carries a manifest of each leaf's shape, dtype and
checksum.

    <directory>/<step>/params      the parameter tree, alone, for whoever needs no optimizer
    <directory>/<step>/training    step, optimizer state and report window
    <directory>/<step>/manifest    leaves, and the caller's own JSON (`extra`)
    <directory>/removed            steps no longer kept, until the next save
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prelnroberta.errors import InputError
from prelnroberta.params import check_leaves
from prelnroberta.train import TrainState

# orbax empties a directory file by file: a process killed meanwhile would leave part of a step in
# its place. It renames into this one instead, and we delete there.
_REMOVED = "removed"


class CheckpointError(InputError):
    """A checkpoint could not be written or read; the message says which and what still stands."""


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """orbax logs the traceback of each of its threads; their errors reach us as exceptions."""
    return "orbax" not in record.pathname and "never retrieved" not in record.getMessage()


class Checkpoints:
    """The checkpoints of one run: the latest `keep` and the one with the lowest loss.

    Args:
        directory: made if it does not exist.
        keep: how many of the latest to keep, 1 or more.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_orbax)
        self.directory = Path(directory).absolute()
        self._ocp = ocp
        best = policies.BestN(
            n=1,
            get_metric_fn=lambda metrics: metrics["loss"],
            reverse=True,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                todelete_subdir=_REMOVED,
            ),
        )

    def latest(self) -> int | None:
        """The last complete step, or None."""
        return self._manager.latest_step()

    def kept(self) -> list[int]:
        """The complete steps that are there, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, extra: dict[str, Any], loss: float | None = None) -> None:
        """Begins to write `state` and returns once its values are safe to change.

        Args:
            extra: JSON-able, given back by `restore`.
            loss: validation loss at this step, if it is known: the lowest is kept for good.

        Raises:
            CheckpointError: if this write or the one before it failed, on a full disk for one.
        """
        ocp, step = self._ocp, int(state.step)
        if step == self.latest():
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

    def wait(self) -> None:
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
            CheckpointError: naming each leaf that is missing, unexpected, of another shape or
                dtype, or whose bytes are not those that were saved.
        """
        ocp = self._ocp
        step = self.latest() if step is None else step
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
            raise _damaged(where, ValueError(f"checksum of {', '.join(changed)}"))
        state = TrainState(params=values["params"], **values["training"])
        return state, manifest["extra"]

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
            step = self.latest()
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
    """path -> shape, dtype and CRC-32 of the bytes, for every leaf."""
    return {
        path: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "crc32": zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)),
        }
        for path, leaf in _named(tree).items()
    }


def _json_checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _damaged(where: str, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return CheckpointError(
        f"{where}: the checkpoint is damaged ({reason}); move that directory away and run again to "
        "go on from the one before it"
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

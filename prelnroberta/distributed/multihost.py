"""Several processes as one job: who is who, waiting for each other, agreeing, and losing one.

One process a host, each with its own devices; everything here is a no-op for a single one.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prelnroberta.errors import InputError

# A first host may tokenize a corpus for hours while the others wait; its death ends them at once.
_PATIENCE_SECONDS = 7 * 24 * 3600


def initialize(
    coordinator: str | None = None,
    hosts: int | None = None,
    host: int | None = None,
    lost_after_seconds: int = 100,
) -> None:
    """Joins the other hosts; before any device is asked for.

    Args:
        coordinator: address:port of host 0, for a job started by hand. None: jax finds it, and the
            rest, in the environment of TPU pods, SLURM, Kubernetes or Open MPI.
        hosts, host: how many there are, and which one this is, with `coordinator`.
        lost_after_seconds: a host that was silent for so long is lost, and ends the others.

    Raises:
        InputError: the environment tells of no job, or the others could not be reached.
    """
    try:
        jax.distributed.initialize(
            coordinator, hosts, host, heartbeat_timeout_seconds=lost_after_seconds
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the job's hosts could not be joined: {str(error).splitlines()[0]}; give "
            "--coordinator=address:port, --hosts and --host, or start it under SLURM, Kubernetes, "
            "Open MPI or on a TPU pod"
        ) from error


def is_primary_host() -> bool:
    """Whether this host speaks for all: it alone prints, and writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all hosts are here. `name` is the place's own, and passed once."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        # The coordinator's barrier: one of the devices would time out within minutes.
        wait = multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
        wait(key=name, timeout_ms=_PATIENCE_SECONDS * 1000)


@contextlib.contextmanager
def primary_host_first(name: str) -> Iterator[None]:
    """The first host runs the body alone, then the others do, and find what it made on the disk;
    or fail as it failed."""
    if not is_primary_host():
        barrier(name)
    try:
        yield
    finally:
        if is_primary_host():
            barrier(name)


def sum_over_hosts(values: Sequence[float]) -> list[float]:
    """The sums over hosts, in float64, the same on every host."""
    if jax.process_count() == 1:
        return list(values)
    from jax.experimental import multihost_utils

    # As words: jax would round to float32.
    words = np.asarray(values, np.float64).view(np.uint32)
    found = multihost_utils.process_allgather(words).view(np.float64)
    return [math.fsum(column) for column in found.T]


class AsyncMaxOverHosts:
    """The largest number that any host has said, the same for all at the same call.

    Each call tells this host's number, and returns the outcome of the last call's: by then it is
    there, so nobody waits for a vote. A host alone is answered at once.
    """

    def __init__(self) -> None:
        mesh = Mesh(np.array(jax.devices()), "devices")
        self._cut = NamedSharding(mesh, PartitionSpec("devices"))
        self._largest = jax.jit(
            lambda votes: votes.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._last: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        here = np.full(jax.local_device_count(), number, np.int32)
        votes = jax.make_array_from_process_local_data(self._cut, here)
        last, self._last = self._last, self._largest(votes)
        return 0 if last is None else int(last)


# What jax's runtime says when another process of the job has gone: gloo (CPU), the coordination
# service, and the network below them.
_LOST = ("Gloo", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "Connection reset", "coordination")


def is_lost_host_error(error: BaseException) -> bool:
    """Whether an error of jax's runtime means that another host is gone."""
    return (
        jax.process_count() > 1
        and isinstance(error, jax.errors.JaxRuntimeError)
        and any(word in str(error) for word in _LOST)
    )


# What a launcher starts again (sysexits.h: EX_TEMPFAIL).
RETRY_EXIT_CODE = 75


def exit_immediately(code: int) -> None:
    """Ends this process at once: jax's own end waits for hosts that are not there any more."""
    os._exit(code)

"""Multi-host jobs: start-up, barriers, agreement between hosts, and detection of a lost host.

Each host runs one process with its own devices. All functions are no-ops in a single process.
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

# The primary host may tokenize a corpus for hours while the others wait. If it dies, the heartbeat
# ends them long before this timeout.
_BARRIER_TIMEOUT_SECONDS = 7 * 24 * 3600


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout_seconds: int = 100,
) -> None:
    """Connects this process to the other hosts. Call it before JAX initializes any device.

    Args:
        coordinator_address: address:port of process 0, for a job that was started by hand. With
            None, JAX reads it and the numbers below from the environment of TPU pods, SLURM,
            Kubernetes or Open MPI.
        num_processes, process_id: number of hosts and index of this one; required with
            `coordinator_address`.
        heartbeat_timeout_seconds: a host that sends no heartbeat for this long is considered lost,
            and the other hosts stop.

    Raises:
        InputError: the environment describes no job, or the other hosts could not be reached.
    """
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"could not connect to the other hosts of the job: {str(error).splitlines()[0]}; pass "
            "--coordinator_address=address:port, --num_processes and --process_id, or start the "
            "job under SLURM, Kubernetes, Open MPI or on a TPU pod"
        ) from error


def is_primary_host() -> bool:
    """Whether this is host 0, the only one that prints and writes shared files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all hosts have reached it. `name` must be unique to this call."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        # This barrier is the coordination service's. A barrier of devices times out within minutes.
        wait = multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
        wait(key=name, timeout_ms=_BARRIER_TIMEOUT_SECONDS * 1000)


@contextlib.contextmanager
def primary_host_first(name: str) -> Iterator[None]:
    """The primary host runs the body first; then the others do, and find its files on the disk.

    If the body fails on the primary host, the others still run it, and fail the same way.
    """
    if not is_primary_host():
        barrier(name)
    try:
        yield
    finally:
        if is_primary_host():
            barrier(name)


def sum_over_hosts(values: Sequence[float]) -> list[float]:
    """Returns the sum of each value over all hosts, in float64, the same on every host."""
    if jax.process_count() == 1:
        return list(values)
    from jax.experimental import multihost_utils

    # Sent as pairs of uint32, because JAX would round float64 to float32.
    bits = np.asarray(values, np.float64).view(np.uint32)
    gathered = multihost_utils.process_allgather(bits).view(np.float64)
    return [math.fsum(column) for column in gathered.T]


class AsyncMaxOverHosts:
    """The maximum over hosts of an int, returned one call later.

    All hosts must call it together. A call passes this host's number and returns the maximum of the
    previous call (0 in the first). The previous reduction has finished by then, so no host waits.
    In a single process it returns its own number immediately.
    """

    def __init__(self) -> None:
        mesh = Mesh(np.array(jax.devices()), "devices")
        self._per_device = NamedSharding(mesh, PartitionSpec("devices"))
        self._max = jax.jit(
            lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._previous: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        local = np.full(jax.local_device_count(), number, np.int32)
        numbers = jax.make_array_from_process_local_data(self._per_device, local)
        previous, self._previous = self._previous, self._max(numbers)
        return 0 if previous is None else int(previous)


# Parts of the errors that JAX's runtime raises when another process of the job is gone. They come
# from gloo (CPU), the coordination service and the network below them.
_LOST_HOST_MESSAGES = (
    "Gloo",
    "UNAVAILABLE",
    "ABORTED",
    "DEADLINE_EXCEEDED",
    "Connection reset",
    "coordination",
)


def is_lost_host_error(error: BaseException) -> bool:
    """Whether an error of JAX's runtime means that another host is gone."""
    return (
        jax.process_count() > 1
        and isinstance(error, jax.errors.JaxRuntimeError)
        and any(message in str(error) for message in _LOST_HOST_MESSAGES)
    )


# Exit code that asks a launcher to start the job again (EX_TEMPFAIL of sysexits.h).
RETRY_EXIT_CODE = 75


def exit_immediately(code: int) -> None:
    """Ends this process without JAX's shutdown, which waits for hosts that are gone."""
    os._exit(code)

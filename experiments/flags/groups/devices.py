"""Devices and hosts: the mesh, how hosts find each other, and what is measured on the way."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any

from experiments.flags.checks import check_positive
from experiments.flags.field import flag
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    from prelnroberta.config import RobertaPreLayerNormConfig
    from prelnroberta.distributed.sharding import Layout, Parallelism


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    parallelism: str = flag(
        "jit",
        "jit: arrays are sharded over the mesh. pmap: every device holds the whole model.",
        choices=["jit", "pmap"],
        on_resume="free",
    )
    mesh_data: int = flag(
        -1,
        "Size of the mesh axis that shards the batch only; -1: the remaining devices.",
        on_resume="free",
    )
    mesh_fsdp: int = flag(
        1,
        "Size of the mesh axis that shards the batch, parameters and optimizer state.",
        on_resume="free",
    )
    mesh_tensor: int = flag(
        1, "Size of the mesh axis that shards heads, MLP and vocabulary.", on_resume="free"
    )
    dcn_axis: str = flag(
        "data",
        "Mesh axis that spans TPU slices or GPU hosts.",
        choices=["data", "fsdp"],
        on_resume="free",
    )
    multihost: bool = flag(
        False,
        "Join the hosts of this job, found through the TPU pod, SLURM, Kubernetes or Open MPI.",
        on_resume="unsaved",
    )
    coordinator_address: str | None = flag(
        None,
        "address:port of host 0, for hosts that are started by hand; requires --num_processes and "
        "--process_id.",
        on_resume="unsaved",
    )
    num_processes: int | None = flag(
        None, "Number of hosts; requires --coordinator_address.", on_resume="unsaved"
    )
    process_id: int | None = flag(
        None, "Index of this host, from 0; requires --coordinator_address.", on_resume="unsaved"
    )
    heartbeat_timeout_seconds: int = flag(
        100,
        "Seconds after which a silent host counts as lost and the others stop.",
        on_resume="unsaved",
    )
    compile_topology: str | None = flag(
        None,
        "Compile the training step for this TPU topology, for example v5e:16x16, print the memory "
        "and time that it needs, and exit. No TPU is required.",
        on_resume="unsaved",
    )
    compilation_cache_dir: str | None = flag(
        None, "Directory of JAX's persistent compilation cache.", on_resume="unsaved"
    )
    profile_steps: tuple[int, ...] = flag(
        (),
        "First and last step to trace for xprof or Perfetto, for example 10,15.",
        on_resume="unsaved",
    )

    def start_hosts(self) -> None:
        """Sets the compilation cache, before anything is compiled, and joins the job's hosts, if
        there are several. Only the first host prints.

        Raises:
            InputError: flags that require each other are not all given.
        """
        if self.compilation_cache_dir:
            import jax

            jax.config.update("jax_compilation_cache_dir", self.compilation_cache_dir)
        by_hand = [self.coordinator_address, self.num_processes, self.process_id]
        if any(x is not None for x in by_hand) and None in by_hand:
            raise InputError(
                "--coordinator_address, --num_processes and --process_id require each other: give "
                "all three"
            )
        if not self.multihost and not self.coordinator_address:
            return
        check_positive(self, "heartbeat_timeout_seconds")
        from prelnroberta.distributed import multihost

        multihost.initialize(*by_hand, self.heartbeat_timeout_seconds)
        if not multihost.is_primary_host():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends

    def layout(
        self,
        config: RobertaPreLayerNormConfig,
        model: str,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        devices: list[Any] | None = None,
    ) -> Layout:
        """The mesh and the shardings, checked against model and batch, and printed.

        Args:
            devices: None: all that JAX finds.
        """
        from prelnroberta.distributed.sharding import Layout

        made = Layout(self.parallelism_config(), config, model, devices)
        made.check_batch(batch_size, gradient_accumulation_steps)
        print("\n".join([made.describe(), *made.notes]), flush=True)
        return made

    def parallelism_config(self) -> Parallelism:
        from prelnroberta.distributed.sharding import Parallelism

        return Parallelism(
            strategy=self.parallelism,
            data=self.mesh_data,
            fsdp=self.mesh_fsdp,
            tensor=self.mesh_tensor,
            dcn_axis=self.dcn_axis,
        )

    def check_profile_steps(self) -> tuple[int, int] | None:
        """The first and the last step to trace, or None.

        Raises:
            InputError: not two steps in order.
        """
        if not self.profile_steps:
            return None
        first, last = self.profile_steps if len(self.profile_steps) == 2 else (0, 0)
        if not 1 <= first <= last:
            raise InputError(
                f"--profile_steps={','.join(map(str, self.profile_steps))}, expected a first and a "
                "last step, for example 10,15"
            )
        return first, last

"""Start-up of ``jax.distributed``, and the little that processes say to each other outside of jit."""

from __future__ import annotations

import os

import jax

from lawcat_jax.errors import UserError

# Each of these means that a launcher or a pod has set up several processes. One-host runs have none of them.
_CLUSTER_HINTS = ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")


def initialize(mode: str) -> None:
    """Start ``jax.distributed``; call before anything asks for a device.

    ``mode`` is ``off``, ``on`` (start, and fail loudly if that is impossible) or ``auto`` (start when the
    environment describes several processes: a coordinator address, a Slurm step or an Open MPI job of more than
    one task, or a TPU pod slice with several workers). With JAX_COORDINATOR_ADDRESS, the number of processes and
    the id are read from JAX_NUM_PROCESSES and JAX_PROCESS_ID; otherwise jax detects the cluster.

    Raises:
      UserError: the processes did not find each other.
    """
    if mode == "off" or (mode == "auto" and not _several_processes()) or jax.distributed.is_initialized():
        return
    arguments: dict = {}
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        arguments["coordinator_address"] = address
        for name, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
            if value := os.environ.get(variable):
                if not value.isdigit():
                    raise UserError(f"{variable}={value!r} is not a number")
                arguments[name] = int(value)
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as problem:
        raise UserError(
            f"config.mesh.distributed={mode}: jax.distributed could not start ({problem}); set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or config.mesh.distributed=off"
        ) from problem


def _several_processes() -> bool:
    if any(os.environ.get(name) for name in _CLUSTER_HINTS):
        return True
    if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 or int(os.environ.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return True
    return len([name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]) > 1


def is_primary() -> bool:
    """Whether this process writes files, bars and lines."""
    return jax.process_index() == 0


def agree(value: bool) -> bool:
    """The value of process 0, in every process (clocks differ, decisions must not)."""
    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def barrier(name: str) -> None:
    """Wait for every process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)

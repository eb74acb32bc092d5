"""Start-up of ``jax.distributed``, and the little that processes say to each other outside of jit."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from typing import Any

import jax
import numpy as np

from lawcat_jax.errors import UserError

# Each of these means that a launcher or a pod has set up several processes. One-host runs have none of them.
_CLUSTER_HINTS = ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")


# Where a failing process leaves word for the others, and how often they look.
_FAILED, _LOOK_SECONDS = "lawcat_jax/failed", 1.0
_leaving = threading.Event()


def initialize(mode: str, *, heartbeat_seconds: int = 30) -> None:
    """Start ``jax.distributed``; call before anything asks for a device.

    From then on no process outlives another: when one is killed or its machine is lost, jax ends the others after
    ``heartbeat_seconds`` without a heartbeat (SIGABRT, status 134 in a shell); when one fails (:func:`leave`), the
    others end within seconds with status 1. Either is at most ``heartbeat_seconds`` + 30 s.

    ``mode`` is ``off``, ``on`` (start, and fail loudly if that is impossible) or ``auto`` (start when the
    environment describes several processes: a coordinator address, a Slurm step or an Open MPI job of more than
    one task, or a TPU pod slice with several workers). With JAX_COORDINATOR_ADDRESS, the number of processes and
    the id are read from JAX_NUM_PROCESSES and JAX_PROCESS_ID; otherwise jax detects the cluster.

    Raises:
      UserError: the processes did not find each other.
    """
    if mode == "off" or (mode == "auto" and not _several_processes()) or jax.distributed.is_initialized():
        return
    logging.getLogger("jax").setLevel(logging.WARNING)  # absl shows its lines about the coordinator
    arguments: dict = {}
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        arguments["coordinator_address"] = address
        for name, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
            if value := os.environ.get(variable):
                if not re.fullmatch("[0-9]{1,9}", value):
                    raise UserError(f"{variable}={value!r} is not a number")
                arguments[name] = int(value)
    try:
        jax.distributed.initialize(
            **arguments, heartbeat_timeout_seconds=heartbeat_seconds, shutdown_timeout_seconds=60
        )
    except (RuntimeError, ValueError) as problem:
        raise UserError(
            f"config.mesh.distributed={mode}: jax.distributed could not start ({problem}); set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or config.mesh.distributed=off"
        ) from problem
    if jax.process_count() > 1:
        threading.Thread(target=_watch, name="lawcat_jax.runtime.distributed", daemon=True).start()


def _client() -> Any:
    from jax._src import distributed  # the key-value store of the coordination service has no public name

    return distributed.global_state.client


def _watch() -> None:
    """End this process when another has failed: it may be waiting in a collective that will never complete."""
    while (client := _client()) is not None and not _leaving.is_set():
        try:
            said = client.key_value_try_get(_FAILED)
        except Exception as problem:
            if "NOT_FOUND" not in str(problem):
                return  # the coordinator is gone: jax's heartbeats end this process
        else:
            # If this process fails by itself, it says so itself.
            if not _leaving.wait(_LOOK_SECONDS):
                _exit(1, f"error: ending, because {said}")
            return
        time.sleep(_LOOK_SECONDS)


def leave(status: int) -> None:
    """End a process of several that failed, at once and without jax's farewell, which waits for the others.

    Returns when there is nothing to do: one process, or ``status`` is 0 or 75, with which all end together.
    """
    if status in (0, 75) or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    _leaving.set()
    try:
        _client().key_value_set(
            _FAILED, f"process {jax.process_index()} failed with status {status}", allow_overwrite=True
        )
        if is_primary():  # the coordinator lives here: the others must have read it
            time.sleep(3 * _LOOK_SECONDS)
    except Exception as problem:  # a second failure, or no coordinator: the heartbeats tell the others
        print(f"the other processes are not told: {problem}", file=sys.stderr)
    _exit(status)


def _exit(status: int, text: str | None = None) -> None:
    if text:
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _several_processes() -> bool:
    if any(os.environ.get(name) for name in _CLUSTER_HINTS):
        return True
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        value = os.environ.get(name) or "1"
        if not re.fullmatch("[0-9]{1,9}", value):
            raise UserError(f"{name}={value[:40]!r} is not a number")
        if int(value) > 1:
            return True
    return len([name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]) > 1


def avoid_cached_collectives(devices: int) -> None:
    """Turn the persistent compilation cache off for meshes of several CPU devices.

    XLA's CPU programs with collectives, read back from that cache, run independent collectives in an order of each
    device's own, and the devices wait for each other until XLA aborts (seen with jaxlib 0.10.2).
    """
    if jax.default_backend() == "cpu" and devices > 1 and getattr(jax.config, "jax_compilation_cache_dir", None):
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()


def is_primary() -> bool:
    """Whether this process writes files, bars and lines."""
    return jax.process_index() == 0


def agree(value: bool) -> bool:
    """The value of process 0, in every process (clocks differ, decisions must not)."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def on_host(leaf: Any) -> np.ndarray:
    """The whole of an array in this host's memory, also of one that is split over processes; all of them call this."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def barrier(name: str) -> None:
    """Wait until every process has come to the call of this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)

"""Compiled programs kept on disk, so that a command that runs again does not compile again (jax's persistent cache)."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from lawcat_jax.errors import UserError
from lawcat_jax.files import user_cache

SWITCH = "LAWCAT_JAX_COMPILATION_CACHE"
"""Environment variable: ``off``, or another directory than the default one."""


def programs_directory(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where compiled programs are kept: the directory that :data:`SWITCH` names, else ``programs`` in the user's cache
    directory. None where the switch is ``off``, or where jax's own variables say what to do.

    Below it each kind of processor has its own folder: programs use the instructions of the machine that compiled them,
    and home directories are shared by machines.
    """
    switch = environ.get(SWITCH, "").strip()
    if switch.lower() in ("off", "0", "false", "no") or environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    if environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("0", "false"):
        return None
    base = Path(switch).expanduser() if switch else user_cache(environ) / "programs"
    return base / _processor()


def keep_programs() -> None:
    """Turn jax's persistent compilation cache on, in :func:`programs_directory`.

    jax is not imported for it. A directory that cannot be written, and a cache that a program has chosen already, change
    nothing. Several CPU devices must not use it, see :func:`lawcat_jax.runtime.distributed.avoid_cached_collectives`.
    """
    try:
        directory = programs_directory()
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, UserError):  # UserError: there is no home directory
        return
    jax = sys.modules.get("jax")
    if jax is None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)  # read when jax is imported
    elif not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(directory))


def _processor() -> str:
    """The architecture, and a digest of the instruction sets that this processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"

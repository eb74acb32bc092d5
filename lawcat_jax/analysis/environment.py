"""What the environment of a command must not spoil: variables that jax reads, standard output, the home directory.

Uses the standard library only, and is called before jax is imported, which reads most of its variables then.
"""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import re
import sys
from collections.abc import MutableMapping

from lawcat_jax.analysis.installation import detect_machine
from lawcat_jax.errors import UserError

_COUNTS = {
    "JAX_NUM_CPU_DEVICES": 1,
    "JAX_NUM_PROCESSES": 1,
    "JAX_PROCESS_ID": 0,
    "SLURM_STEP_NUM_TASKS": 1,
    "SLURM_NTASKS": 1,
    "SLURM_PROCID": 0,
    "OMPI_COMM_WORLD_SIZE": 1,
    "OMPI_COMM_WORLD_RANK": 0,
}
_PLATFORMS = ("cpu", "cuda", "gpu", "rocm", "tpu", "metal", "proxy", "mock_tpu", "")


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Check the variables that jax and the launchers read, and set what a command relies on.

    Raises:
      UserError: a variable whose value cannot be.
    """
    for name, least in _COUNTS.items():
        value = environ.get(name, "")
        if value and not (re.fullmatch(r"[0-9]{1,9}", value) and int(value) >= least):
            raise UserError(f"{name}={_shown(value)}: must be a whole number of at least {least}; mend or unset it")
    platforms = environ.get("JAX_PLATFORMS", "")
    unknown = [name for name in platforms.lower().split(",") if name.strip() not in _PLATFORMS]
    if unknown:
        raise UserError(
            f"JAX_PLATFORMS={_shown(platforms)}: {_shown(unknown[0])} is not one of cpu, cuda, tpu; mend or unset it"
        )
    if environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true", "on", "yes", "t", "y"):
        print("JAX_ENABLE_X64 is ignored: everything here is computed in 32 bits or less", file=sys.stderr)
    environ.pop("JAX_ENABLE_X64", None)
    environ["MPLBACKEND"] = "Agg"  # figures are written to files; another name may be one that is not installed
    if not platforms and importlib.util.find_spec("libtpu") is not None:
        machine = detect_machine()
        if not machine.tpus and not machine.gpus:  # libtpu would look for a TPU and print a page about finding none
            environ["JAX_PLATFORMS"] = "cpu"


def foreign_error(problem: BaseException) -> str | None:
    """One line for an error that jax or a library raises because of the environment; None for any other."""
    text = " ".join(str(problem).split())
    if isinstance(problem, RuntimeError) and "Could not determine home directory" in text:
        return "there is no home directory; set HOME to a directory that can be written"
    if isinstance(problem, RuntimeError) and "Unable to initialize backend" in text:
        return f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {text[:300]}; see python -m lawcat_jax.doctor"
    named = re.search(r"\b(JAX_[A-Z0-9_]+)\b", text)
    if isinstance(problem, ValueError) and named and named[1] in os.environ:
        return f"{named[1]}={_shown(os.environ[named[1]])}: {text[:300]}; mend or unset it"
    if isinstance(problem, MemoryError):
        return f"out of memory ({text[:200]})" if text else "out of memory"
    return None


def lenient_output() -> None:
    """Let standard output replace what its encoding does not have, instead of failing in the midst of a text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def output_problem(problem: OSError | None = None) -> int | None:
    """None while standard output works; else what the process should end with: 141 after a reader has gone away, which
    needs no word, or 2 after a line about a full disk or the like.

    ``problem`` is an error that may have come from writing to it.
    """
    if problem is not None and (problem.filename is not None or problem.errno not in _OF_OUTPUT):
        return None
    try:
        if sys.stdout is None or sys.stdout.closed:
            return None
        sys.stdout.flush()
        if problem is None:
            return None
        raise problem  # the stream has dropped what it could not write, and works again
    except OSError as found:
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, 1)  # or the interpreter would try once more, and complain
        os.close(handle)
        if found.errno == errno.EPIPE:
            return 141
        print(f"error: standard output cannot be written ({found.strerror})", file=sys.stderr, flush=True)
        return 2


_OF_OUTPUT = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT)  # of errors that name no file


def _shown(value: str) -> str:
    return repr(value[:40])

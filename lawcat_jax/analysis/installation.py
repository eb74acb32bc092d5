"""What is wrong with this installation, and what to do about it: the checks of ``lawcat_jax.doctor``.

Uses the standard library only, and asks jax in a second process with a time limit, since an installation that is broken
is what these checks are for.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.metadata as metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from lawcat_jax.analysis import packages
from lawcat_jax.analysis.packages import CUDA_PLUGINS, Problem, installed, release

PROBE_SECONDS = 120
ROOT = pathlib.Path(__file__).resolve().parents[2]
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "torch", "libtpu")
# NVIDIA's minimal driver of each CUDA major version, on Linux.
OLDEST_DRIVER = {"jax-cuda12-plugin": 525, "jax-cuda13-plugin": 580}
REQUIREMENTS = ROOT / "requirements.txt"
# PCI device numbers of TPUs; the vendor's number is on Google's virtual disks and network cards as well.
TPU_DEVICES = {
    "0x0027": "v2 or v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "tpu7x",
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Accelerators as the operating system shows them. ``driver`` is NVIDIA's, "" when none is loaded."""

    gpus: tuple[str, ...] = ()
    driver: str = ""
    tpus: tuple[str, ...] = ()


# The machine


def detect_machine(root: str = "/") -> Machine:
    """What is plugged in, whatever jax sees."""
    gpus, driver = [], ""
    if smi := shutil.which("nvidia-smi"):
        command = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
            rows = [line.rsplit(",", 1) for line in answer.splitlines() if "," in line]
            gpus, driver = [row[0].strip() for row in rows], rows[0][1].strip() if rows else ""
        except (OSError, subprocess.SubprocessError):
            pass
    tpus = []
    for path in sorted(glob.glob(f"{root}/sys/bus/pci/devices/*/vendor")):
        folder = pathlib.Path(path).parent
        try:
            vendor, device, kind = ((folder / name).read_text().strip() for name in ("vendor", "device", "class"))
        except OSError:
            continue
        if vendor == "0x1ae0" and device in TPU_DEVICES:
            tpus.append(TPU_DEVICES[device])
        if vendor == "0x10de" and kind.startswith("0x03") and not driver:
            gpus.append(f"NVIDIA {device}")
    if not tpus:  # a container may show the device files only
        tpus = ["unknown"] * len(glob.glob(f"{root}/dev/accel[0-9]*"))
    return Machine(tuple(gpus), driver, tuple(tpus))


def device_problems(
    machine: Machine, probe: Mapping[str, Any], versions: Mapping[str, str], platforms: str
) -> tuple[list[Problem], list[str]]:
    """Problems and notes about what jax makes of the machine; ``platforms`` is JAX_PLATFORMS."""
    problems, notes = [], []
    if error := probe.get("error"):
        remedy = "see the versions above; another process may hold the accelerator"
        if machine.gpus and machine.driver:
            remedy = "pip install -U -r requirements-cuda.txt, and look at nvidia-smi"
        elif machine.tpus:
            remedy = "pip install -U -r requirements-tpu.txt; end other processes on the TPU; use all hosts of a slice"
        if "flag" in error.lower():  # an option that XLA or libtpu does not know
            remedy = "mend or unset XLA_FLAGS and LIBTPU_INIT_ARGS"
        elif "JAX_" in error or (platforms and "Unable to initialize backend" in error):
            remedy = "mend or unset the variable; JAX_PLATFORMS is one of cpu, cuda, tpu"
        problems.append(Problem(error, remedy))
        return problems, notes
    if probe.get("platform") != "cpu":
        return problems, notes
    kind = f"{len(machine.gpus)} NVIDIA GPU(s)" if machine.gpus else f"{len(machine.tpus)} TPU chip(s)"
    if not (machine.gpus or machine.tpus):
        return problems, notes
    if "cpu" in platforms.split(","):
        notes.append(f"JAX_PLATFORMS={platforms} keeps jax off the {kind} of this machine; unset it to use them")
        return problems, notes
    what = f"jax runs on the CPU of a machine with {kind}"
    if not machine.gpus:
        remedy = "pip install -r requirements-tpu.txt"
        if "libtpu" in versions:
            remedy += " -U; then JAX_PLATFORMS=tpu python -c 'import jax; jax.devices()' gives the reason"
        return [Problem(what, remedy)], notes
    plugin = next((name for name in CUDA_PLUGINS if name in versions), None)
    major = (release(machine.driver) or (0,))[0]
    if not machine.driver:
        remedy = "install the NVIDIA driver (nvidia-smi does not work), version 580 or newer"
    elif plugin is None and major >= OLDEST_DRIVER["jax-cuda13-plugin"]:
        remedy = "pip install -r requirements-cuda.txt"
    elif plugin is None or major < OLDEST_DRIVER[plugin]:
        remedy = f"update the NVIDIA driver {machine.driver} to 580 or newer, or pip install 'jax[cuda12]' (driver 525)"
    else:
        remedy = f"{plugin} is installed: JAX_PLATFORMS=cuda python -c 'import jax; jax.devices()' gives the reason"
    return [Problem(what, remedy)], notes


# Devices and kernels as jax sees them


def run_probe(seconds: float = PROBE_SECONDS) -> dict[str, Any]:
    """:func:`lawcat_jax.analysis.probe.probe` in a process that may crash or hang."""
    command = [sys.executable, "-m", "lawcat_jax.analysis.probe"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    # Not the memory of a whole GPU, which others may be using.
    env = {**os.environ, "PYTHONPATH": paths, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=env, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"jax did not answer within {seconds:g} s"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"jax ended with status {done.returncode}: {last[:300]}"}


# Caches and tokens


def cache_directories(environ: Mapping[str, str]) -> dict[str, str]:
    """Directories that a run writes to, by what they are for."""
    home = os.path.expanduser("~")
    cache = environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    hub = environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    found = {
        "Hugging Face (HF_HOME)": hub,
        "tfds (TFDS_DATA_DIR)": environ.get("TFDS_DATA_DIR") or f"{home}/tensorflow_datasets",
        "temporary files (TMPDIR)": tempfile.gettempdir(),
    }
    if compilation := environ.get("JAX_COMPILATION_CACHE_DIR"):
        found["compilations (JAX_COMPILATION_CACHE_DIR)"] = compilation
    return {name: path for name, path in found.items() if "://" not in path}


def cache_problems(directories: Mapping[str, str], *, least_free: int = 2**30) -> list[Problem]:
    """Directories that cannot be written or made, or are on a full disk. Leaves nothing behind."""
    problems = []
    for name, path in directories.items():
        variable = name.split("(")[-1].rstrip(")")
        remedy = f"set {variable} to a directory that you can write to"
        existing = pathlib.Path(path).absolute()
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
            free = shutil.disk_usage(existing).free
        except OSError as problem:
            problems.append(Problem(f"{path} for {name} cannot be written: {problem.strerror or problem}", remedy))
            continue
        if free < least_free:
            what = f"{path} for {name} is on a disk with {free / 2**30:.2f} GiB left"
            problems.append(Problem(what, f"free some space, or {remedy}"))
    return problems


def has_hf_token(environ: Mapping[str, str]) -> bool:
    """Whether a Hugging Face token is set or stored; its value is not looked at."""
    if environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    hub = environ.get("HF_HOME") or os.path.join(
        environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    path = environ.get("HF_TOKEN_PATH") or os.path.join(hub, "token")
    return os.path.isfile(path) and os.path.getsize(path) > 0


# Report


def examine() -> dict[str, Any]:
    """Everything, as plain values: versions, machine, devices, kernels, notes and problems."""
    if REQUIREMENTS.is_file():
        lines = REQUIREMENTS.read_text().splitlines()
    else:
        lines = metadata.requires("lawcat-jax") or [] if installed(["lawcat-jax"]) else []
    wanted = packages.requirements([line for line in lines if not line.startswith(("#", "-"))])
    runtimes = [name.replace("plugin", "pjrt") for name in CUDA_PLUGINS]
    versions = installed([*SHOWN, *CUDA_PLUGINS, *runtimes, *(name for name, _, _ in wanted)])
    jax_wants = packages.requirements(metadata.requires("jax") or []) if "jax" in versions else []
    machine = detect_machine()
    problems = packages.version_problems(versions, wanted, jax_wants, has_tpu=bool(machine.tpus))
    seen = run_probe()
    found, notes = device_problems(machine, seen, versions, os.environ.get("JAX_PLATFORMS", ""))
    problems += found
    problems += [Problem(text, "pip install -U -r requirements.txt") for text in seen.get("warnings", [])]
    problems += cache_problems(cache_directories(os.environ))
    for device in seen.get("devices", []):
        capability = device.get("compute_capability")
        if capability and release(capability) < (8,):
            notes.append(f"GPU {device['id']} has compute capability {capability}: bfloat16 kernels need 8.0 (Ampere)")
    token = has_hf_token(os.environ)
    if not token:
        notes.append("no Hugging Face token: gated models (Llama) need one (hf auth login)")
    return {
        "ok": not problems,
        "python": platform.python_version(),
        "versions": {name: versions.get(name) for name in (*SHOWN, *(p for p in CUDA_PLUGINS if p in versions))},
        "machine": dataclasses.asdict(machine),
        "platform": seen.get("platform"),
        "devices": seen.get("devices", []),
        "kernels": seen.get("kernels", []),
        "hf_token": token,
        "notes": notes,
        "problems": [dataclasses.asdict(problem) for problem in problems],
    }


def render(report: Mapping[str, Any]) -> str:
    """The report as text, one line a fact or finding."""
    versions = {"python": report["python"], **report["versions"]}
    lines = ["versions:  " + ", ".join(f"{name} {version or '-'}" for name, version in versions.items())]
    for device in report["devices"]:
        memory = f", {device['bytes_limit'] / 2**30:.1f} GiB for jax" if device.get("bytes_limit") else ""
        lines.append(f"device:    {report['platform']} {device['id']}, {device['kind']}{memory}")
    alike: dict[tuple, list[str]] = {}  # operation, choice and reasons -> cases
    for row in report["kernels"]:
        alike.setdefault((row["operation"], row["uses"], *row["not"].items()), []).append(row["case"])
    for (operation, uses, *refused), cases in alike.items():
        reasons = "".join(f"; not {name}: {why}" for name, why in refused)
        lines.append(f"kernel:    {operation} ({', '.join(cases)}): {uses}{reasons}")
    lines.append(f"hf token:  {'yes' if report['hf_token'] else 'no'}")
    lines += [f"note:      {note}" for note in report["notes"]]
    lines += [f"problem:   {problem['what']} -> {problem['remedy']}" for problem in report["problems"]]
    lines.append("nothing is wrong" if report["ok"] else f"{len(report['problems'])} problem(s)")
    return "\n".join(lines)

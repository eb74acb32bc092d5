"""Versions of the installed packages: which are there, which are asked for, and combinations known to fail.

Uses the standard library only, so that it works where jax does not.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import sys
from collections.abc import Mapping, Sequence

CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is wrong, and what to do about it."""

    what: str
    remedy: str


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without trailing zeros: ``0.12.0.dev1`` is (0, 12)."""
    numbers = [int(part) for part in re.split(r"[^0-9.]", version)[0].split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def satisfies(version: str, specifiers: str) -> bool:
    """Whether a version meets comma-separated specifiers such as ``>=0.10.2,<0.13`` or ``==0.0.42.*``."""
    have = release(version)
    for specifier in filter(None, (part.strip() for part in specifiers.split(","))):
        wanted = specifier.lstrip("<>=!~")
        operator, wanted = specifier.removesuffix(wanted), wanted.strip()
        if wanted.endswith(".*"):
            prefix = tuple(int(part) for part in wanted[:-2].split("."))
            fits = (have + (0,) * len(prefix))[: len(prefix)] == prefix
        else:
            want = release(wanted)
            fits = {"<=": have <= want, ">=": have >= want, "~=": have >= want, "<": have < want, ">": have > want}.get(
                operator or "==", have == want
            )
        if fits == (operator == "!="):
            return False
    return True


def installed(names: Sequence[str]) -> dict[str, str]:
    """Versions of the packages among ``names`` that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def requirements(lines: Sequence[str]) -> list[tuple[str, str, str]]:
    """(name, specifiers, extra) of requirement lines."""
    parsed = []
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?\s*\(?([^;#)]*)\)?\s*(?:;(.*))?", line.strip())
        if match:
            extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", match[4] or "")
            parsed.append((match[1].lower().replace("_", "-"), match[3].strip(), extra[1] if extra else ""))
    return parsed


def jax_wheels(extra: str, jax: str) -> str:
    """The command that installs what belongs to ``jax`` for "tpu" or "cuda13": libtpu or the plugins of its version."""
    return f"pip install 'jax[{extra}]=={jax}'"


def version_problems(
    versions: Mapping[str, str],
    wanted: Sequence[tuple[str, str, str]],
    jax_wants: Sequence[tuple[str, str, str]],
    *,
    python: tuple[int, ...] = sys.version_info[:2],
    has_tpu: bool = False,
) -> list[Problem]:
    """Missing packages, versions out of range, and combinations known to fail.

    Args:
      versions: of the installed packages.
      wanted: this project's requirements; jax_wants: those in jax's metadata, extras included.
    """
    problems = []
    if python < (3, 11):
        problems.append(Problem(f"Python {'.'.join(map(str, python))} is too old", "use Python 3.11 or newer"))
    install = "pip install -r requirements.txt"
    missing = [name for name, _, extra in wanted if not extra and name not in versions]
    if missing:
        problems.append(Problem(f"not installed: {', '.join(missing)}", install))
    for name, specifiers, extra in wanted:
        if not extra and name in versions and not satisfies(versions[name], specifiers):
            problems.append(Problem(f"{name} {versions[name]} is not {specifiers}", install))
    jax, flax = versions.get("jax", ""), versions.get("flax", "")
    if jax and flax and satisfies(flax, "<=0.12.9") and satisfies(jax, ">=0.11"):
        problems.append(
            Problem(f"flax {flax} cannot import nnx with jax {jax}", "pip install 'flax>=0.12.10,!=0.12.11'")
        )
    for name, specifiers, extra in jax_wants:
        if name not in versions or satisfies(versions[name], specifiers):
            continue
        file = {"": "requirements.txt", "tpu": "requirements-tpu.txt", "cuda13": "requirements-cuda.txt"}.get(extra)
        if name == "jaxlib" and extra == "":
            problems.append(Problem(f"jaxlib {versions[name]} does not fit jax {jax} ({specifiers})", install))
        elif name == "libtpu" and extra == "tpu":
            remedy = f"pip install -U -r {file}" if has_tpu else jax_wheels("tpu", jax)
            problems.append(Problem(f"libtpu {versions[name]} does not fit jax {jax} ({specifiers})", remedy))
        elif name in CUDA_PLUGINS and extra == name.split("-")[1]:
            remedy = f"pip install -U -r {file}" if file else jax_wheels(extra, jax)
            problems.append(Problem(f"{name} {versions[name]} does not fit jax {jax} ({specifiers})", remedy))
    if all(name in versions for name in CUDA_PLUGINS):
        remedy = (
            "pip uninstall jax-cuda12-plugin jax-cuda12-pjrt (keep CUDA 12 instead if the driver is older than 580)"
        )
        problems.append(Problem("jax plugins for CUDA 12 and CUDA 13 are both installed", remedy))
    for name in CUDA_PLUGINS:
        runtime = name.replace("plugin", "pjrt")
        if name in versions and versions.get(runtime) != versions[name]:
            what = f"{name} {versions[name]} with {runtime} {versions.get(runtime, 'missing')}"
            problems.append(Problem(what, f"pip install -U {runtime}=={versions[name]}"))
    return problems

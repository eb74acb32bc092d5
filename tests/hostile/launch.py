"""Hostile arguments and environments of the launch scripts. Everything is run with ``--print``, or cannot start anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hostile.driver import EITHER, ROOT, Case

VALUES = (
    "", "x", "-1", "0", "1.5", "9" * 30, ",,", "²", "a b", "a\nb", "*", "/", "..", "$(touch made)", "`touch made`",
    "';touch made;'", "\"", "\\", "--print", "\udcff",
)  # fmt: skip
TRAINING = ["--", "--config=configs/tiny.py", "--workdir=gs://bucket/run"]
# A line that each script prints commands for, and the options whose values are spoilt, one after the other.
LINES: dict[str, tuple[list[str], list[str]]] = {
    "restart.sh": (["--restarts=1", "--delay=0", "--", "true"], ["restarts", "delay"]),
    "multi_gpu.sh": (TRAINING, ["gpus", "restarts", "config", "workdir"]),
    "local_multiprocess.sh": (
        ["--processes=2", *TRAINING],
        ["processes", "cpu-devices", "gpus", "port", "grace", "config", "workdir"],
    ),
    "cloud_tpu.sh": (
        ["--name=lawcat", "--zone=us-west4-a", "--type=v5litepod-16", *TRAINING],
        ["name", "zone", "type", "version", "project", "repo", "ref", "restarts", "poll", "config", "workdir"],
    ),
    "gke.sh": (
        ["--name=lawcat", "--topology=4x4", "--repo=https://example.com/lawcat.git", *TRAINING],
        [
            "name",
            "type",
            "topology",
            "chips-per-host",
            "repo",
            "ref",
            "image",
            "service-account",
            "namespace",
            "restarts",
        ],
    ),
    "slurm.sbatch": (TRAINING[1:], ["config", "workdir"]),
}
ENVIRONMENTS: tuple[dict[str, str], ...] = (
    {"PYTHON": "/nowhere/python"},
    {"PYTHON": "$(touch made)"},
    {"CUDA_VISIBLE_DEVICES": "nonsense"},
    {"SLURM_SUBMIT_DIR": "/nowhere"},
    {"SLURM_SUBMIT_DIR": "$(touch made)"},
    {"SLURM_JOB_ID": "x; touch made"},
    {"HOME": "/nowhere"},
    {"TMPDIR": "/nowhere"},
    {"IFS": "x"},
    {"LC_ALL": "nonsense"},
)


def _fixed(argv: list[str]) -> Callable:
    def arrange(folder: Path, models: Path) -> list[str]:
        """The scripts look for the configuration in their own repository, SLURM's in the folder of the job."""
        (folder / "lawcat_jax").mkdir()
        (folder / "configs").mkdir()
        shutil.copy(ROOT / "configs" / "tiny.py", folder / "configs" / "tiny.py")
        return argv

    return arrange


def launch_cases() -> Iterator[Case]:
    """Every option with every value, options alone, stray words, and the environment."""
    for script, (line, options) in LINES.items():
        path = f"launch/{script}"
        for option in options:
            for value in VALUES:
                given = f"--{option}={value}"
                spoilt = [item for item in line if not item.startswith(f"--{option}=")]
                at = spoilt.index("--") if "--" in spoilt and option not in ("config", "workdir") else len(spoilt)
                argv = [path, "--print", *spoilt[:at], given, *spoilt[at:]]
                yield Case("launch", f"{script} {option}={ascii(value)[:20]}", _fixed(argv), EITHER)
            yield Case("launch", f"{script} --{option} alone", _fixed([path, "--print", f"--{option}"]), EITHER)
        for words in ([], ["--"], ["stray"], ["--nothing"], ["--print"], ["--", "--"], [""]):
            argv = [path, *words] if words else [path]
            codes = (
                (*EITHER, 127) if script == "restart.sh" else EITHER
            )  # the status of the command, which may not be there
            yield Case("launch", f"{script} {words}", _fixed(argv), codes)
        for variables in ENVIRONMENTS:
            name = ", ".join(f"{key}={value}" for key, value in variables.items())
            yield Case(
                "launch", f"{script} with {name}", _fixed([path, "--print", *line]), EITHER, environment=variables
            )

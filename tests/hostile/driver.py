"""What every command owes to every input: one line and an exit code, no traceback, nothing half-written, nothing destroyed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "lawcat_jax" / "assets" / "tiny_llama"
EITHER = (0, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One hostile input.

    ``arrange(folder, models)`` makes the files and returns the command (``["generate", "--prompt=x", ...]``); relative
    paths are those of ``folder``, and ``models`` holds a Hugging Face directory ``hf`` and a finished run ``run`` to copy.
    ``codes`` are the exit codes it may end with: 0 where a value can be right as well. Files that it may write are those
    below ``out``.
    """

    area: str
    name: str
    arrange: Callable[[Path, Path], list[str]]
    codes: tuple[int, ...] = (2,)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    stdin: bytes | None = None
    fresh: bool = False  # needs a process of its own: what it spoils is read when jax is imported

    def __str__(self) -> str:
        return f"{self.area}-{self.name}"


class Commands:
    """Runs commands; see ``zygote.py``. Close it."""

    def __init__(self) -> None:
        self._environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "XLA_FLAGS": "",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment,
        )  # fmt: skip

    def run(self, argv: list[str], cwd: Path, case: Case, stdin: Path | None, seconds: float = 120.0) -> dict:
        """``{rc, out, err}``; ``rc`` None after ``seconds``. ``launch/...`` is a script of that folder."""
        script = argv[0].startswith("launch/")
        if case.fresh or script:
            command = ["bash", str(ROOT / argv[0])] if script else [sys.executable, "-m", f"lawcat_jax.{argv[0]}"]
            try:
                done = subprocess.run(
                    [*command, *argv[1:]], cwd=cwd, env=self._environment | case.environment, stdin=subprocess.DEVNULL,
                    capture_output=True, timeout=seconds, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return {"rc": None, "out": "", "err": ""}
            said = {"out": done.stdout, "err": done.stderr}
            return {
                "rc": done.returncode,
                **{name: text.decode(errors="backslashreplace") for name, text in said.items()},
            }
        request = {
            "argv": argv, "env": case.environment, "cwd": str(cwd), "stdin": stdin and str(stdin), "seconds": seconds,
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=30)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below ``folder`` but for those below ``out``; links by where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] == "out" or path.name == ".lock":
            continue
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def check(case: Case, folder: Path, models: Path, commands: Commands) -> None:
    """Run one case and assert what it owes."""
    argv = case.arrange(folder, models)
    stdin = None
    if case.stdin is not None:
        stdin = folder / "stdin"
        stdin.write_bytes(case.stdin)
    before = contents(folder)
    done = commands.run(argv, folder, case, stdin)
    told = f"{case}: {argv}\nrc {done['rc']}\n--- out\n{done['out'][-1500:]}\n--- err\n{done['err'][-3000:]}"
    assert done["rc"] is not None, f"hangs: {told}"
    assert done["rc"] in case.codes, told
    assert "Traceback" not in done["out"] + done["err"], told
    errors = [line for line in done["err"].splitlines() if line.strip() and not line.startswith(NOTES)]
    if done["rc"] == 2:
        assert len(errors) == 1, told
        assert errors[0].startswith("error: "), told
        assert len(errors[0]) < 1500, told
        assert len(errors[0]) > len("error: ") + 10, told
        assert not (folder / "out").exists() or not list((folder / "out").iterdir()), f"half-written: {told}"
    assert contents(folder) == before, f"destroyed or left: {told}"


# What commands tell beside the error.
NOTES = ("--prompt: ", "standard input: ", "this model has a chat template", "JAX_ENABLE_X64 is ignored", "loading ")

"""Commands as forks of a process that has imported what they import, so that they start at once and can be killed by the dozen.

Run as a script it reads a JSON object a line, ``{argv, env, cwd, log}``, and answers with two lines: ``{pid}`` at once, ``{status}``
(negative: by a signal) when that process has ended. Nothing is computed before a fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forked import run_as_main


class Forks:
    """Starts commands one after the other; ends its process when left."""

    def __init__(self, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._rest = b""

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def run(
        self,
        argv: list[str],
        cwd: Path,
        log: Path,
        number: int = signal.SIGKILL,
        when: Callable[[float], bool] | None = None,
    ) -> int:
        """Exit status of ``python -m`` ``argv``, which gets the signal ``number`` as soon as ``when(seconds since its
        start)`` holds, once."""
        assert self._process.stdin is not None
        request = {"argv": argv, "cwd": str(cwd), "log": str(log)}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        pid, started = self._answer(60.0)["pid"], time.monotonic()
        while (answer := self._answer(0.002)) is None:
            if when is not None and when(time.monotonic() - started):
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, number)
                when = None
        return answer["status"]

    def _answer(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                return None
            self._rest += os.read(self._process.stdout.fileno(), 1 << 16)
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)


def _become(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    module, *_ = sys.argv = request["argv"]
    run_as_main(module)


def _serve() -> None:
    import flax.nnx  # noqa: F401
    import grain  # noqa: F401
    import jax  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import transformers  # noqa: F401
    from ml_collections import config_flags  # noqa: F401

    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        answers.write(json.dumps({"pid": child}).encode() + b"\n")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.write(json.dumps({"status": status}).encode() + b"\n")


if __name__ == "__main__":
    _serve()

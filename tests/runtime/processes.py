"""Processes on this machine that ``jax.distributed`` joins over loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from doubles import ROOT

TRAIN = ["-m", "lawcat_jax.train", f"--config={Path(__file__).with_name('tiny.py')}"]


class Processes:
    """Python commands, all started at once; their output goes to ``<folder>/<index>.log``. Ends them when left."""

    def __init__(self, folder: Path, commands: Sequence[Sequence[str]], *, devices: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.logs = [folder / f"{index}.log" for index in range(len(commands))]
        self.children: list[subprocess.Popen] = []
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
        if len(commands) > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(len(commands)),
            }
        for index, command in enumerate(commands):
            with self.logs[index].open("w") as log:
                self.children.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        cwd=ROOT,
                        env=environment | {"JAX_PROCESS_ID": str(index)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()

    def output(self, index: int) -> str:
        """What a process has printed."""
        return self.logs[index].read_text(errors="replace")

    def until(self, condition, seconds: float = 150.0) -> None:
        """Wait for ``condition()`` while all processes run."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.report("waited in vain")
            assert all(child.poll() is None for child in self.children), self.report("ended early")
            time.sleep(0.02)

    def kill(self, index: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one process."""
        self.children[index].send_signal(number)

    def wait(self, seconds: float = 150.0) -> list[int]:
        """Exit statuses (negative: by a signal)."""
        deadline = time.monotonic() + seconds
        for child in self.children:
            try:
                child.wait(timeout=max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                raise AssertionError(self.report(f"not over after {seconds} s")) from None
        return [child.returncode for child in self.children]

    def report(self, what: str) -> str:
        """For messages of assertions."""
        tails = "\n".join(f"--- {index}\n{self.output(index)[-2000:]}" for index in range(len(self.children)))
        return f"{what}\n{tails}"

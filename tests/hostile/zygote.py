"""Runs commands in forks of one process that has imported what they import: hundreds of them in minutes.

Reads one JSON object a line, ``{argv, env, cwd, stdin, seconds}``, and answers with ``{rc, out, err, seconds}``. Nothing is
computed before a fork, so a fork holds no locks of threads that it does not have.
"""

import json
import os
import signal
import sys
import tempfile
import time

import flax.nnx  # noqa: F401
import jax  # noqa: F401
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401
import transformers  # noqa: F401
from absl import flags  # noqa: F401

from tests.forked import run_as_main


def command(request: dict) -> None:
    """In the child: become the command."""
    for descriptor, name in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(request["stdin"] or os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    module, *arguments = [os.fsdecode(item.encode("utf-8", "surrogateescape")) for item in request["argv"]]
    sys.argv = [module, *arguments]
    run_as_main(f"lawcat_jax.{module}")


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    folder = tempfile.mkdtemp()
    for line in sys.stdin:
        request = json.loads(line)
        request |= {name: os.path.join(folder, name) for name in ("out", "err")}
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            command(request)
        status = None
        while status is None and time.monotonic() - started < request["seconds"]:
            ended, found = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(found) if ended else None
            time.sleep(0.005)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        said = {}
        for name in ("out", "err"):
            with open(request[name], errors="backslashreplace") as file:
                said[name] = file.read()[:20000]
        answers.write(json.dumps({"rc": status, "seconds": time.monotonic() - started, **said}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

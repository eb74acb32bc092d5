"""One of several processes that do nothing but meet, until one of them fails: ``python peer.py [fails|user-error]``."""

from __future__ import annotations

import sys

from doubles import ROOT  # noqa: F401  (makes the packages importable)

from lawcat_jax.command_line import run_main
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import distributed

HEARTBEAT = 6


def main(argv: list[str]) -> int:
    """Meet the others for ever."""
    distributed.initialize("on", heartbeat_seconds=HEARTBEAT)
    for meeting in range(1_000_000):
        distributed.barrier(f"meeting {meeting}")
        if meeting == 3:
            print("ready", flush=True)
            if argv[1:] == ["user-error"]:
                raise UserError("this process found a mistake")
            if argv[1:] == ["fails"]:
                raise RuntimeError("this process failed")
    return 0


if __name__ == "__main__":
    run_main(main)
    sys.exit(0)

"""What a forked process does to become a command."""

from __future__ import annotations

import os
import runpy
import sys
from typing import NoReturn


def run_as_main(module: str) -> NoReturn:
    """Run a module as ``python -m`` does, with the arguments in ``sys.argv``, and end this process with its status."""
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

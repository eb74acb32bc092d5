"""What orbax and tensorstore say when a save or a read fails, made fit for one line of output."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Any


def unraisable_hook(arguments: Any) -> None:
    """A ``sys.unraisablehook`` that swallows one known complaint and passes everything else on.

    At the first error of a save or a read orbax closes its event loop while tensorstore still reports to it. Python
    would print a traceback for each such report, beside the one line that says what is wrong.
    """
    if not (isinstance(arguments.exc_value, RuntimeError) and str(arguments.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(arguments)


def only_one_report() -> None:
    """Leave out asyncio's traceback for each read of an array that failed after the first: the first one is reported."""
    logging.getLogger("asyncio").addFilter(_is_no_echo)


def _is_no_echo(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def is_disk_full(problem: BaseException) -> bool:
    """Whether an error of the operating system or of tensorstore says that a disk, or the user's quota on it, is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(problem, OSError) and problem.errno in full:
        return True
    return any(os.strerror(number) in str(problem) for number in full)

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
    """From now on orbax says nothing by itself: it logs a dozen lines for every save, and a traceback in each of its threads
    for an error that it raises as well. Of asyncio's tracebacks for reads that failed only the first, which is raised, is left.
    """
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_is_no_echo)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _is_no_echo(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def is_disk_full(problem: BaseException) -> bool:
    """Whether an error of the operating system or of tensorstore says that a disk, or the user's quota on it, is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(problem, OSError) and problem.errno in full:
        return True
    return any(os.strerror(number) in str(problem) for number in full)

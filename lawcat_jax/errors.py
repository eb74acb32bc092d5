"""Errors meant for the user, and the wrapper that prints them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

from lawcat_jax.config import ConfigError


class UserError(ValueError):
    """Something the user can mend. The message says what is wrong, where, and what to do."""


def unraisable(arguments: Any) -> None:
    """A ``sys.unraisablehook`` that leaves out what tensorstore tells an event loop that orbax closed at the first error of
    a save or of a read: a traceback beside the one line that says what is wrong."""
    if not (isinstance(arguments.exc_value, RuntimeError) and str(arguments.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(arguments)


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Run an absl main; a user's error becomes ``error: ...`` on stderr and exit status 2, no traceback."""
    from absl import app

    def guarded(argv: list[str]) -> int | None:
        try:
            return main(argv)
        except (UserError, ConfigError) as problem:
            print(f"error: {problem}", file=sys.stderr, flush=True)
            status = 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            status = 130
        except Exception:
            if not _several_processes():
                raise
            traceback.print_exc()
            status = 1
        if _several_processes():  # the others must not wait for this one
            from lawcat_jax.runtime import distributed

            distributed.leave(status)
        return status

    def parse(argv: list[str]) -> list[str]:
        from lawcat_jax.command_line import parse_flags

        try:
            return parse_flags(argv)
        except UserError as problem:
            print(f"error: {problem}", file=sys.stderr, flush=True)
            sys.exit(2)

    app.run(guarded, flags_parser=parse)


def _several_processes() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()

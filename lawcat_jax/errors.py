"""The errors that are meant for the user; :func:`lawcat_jax.command_line.run_main` prints them as one line."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend. The message says what is wrong, where, and what to do."""

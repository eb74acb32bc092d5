"""What the command lines share: the ``--config`` flag, one line for each mistake of the user, and exit codes."""

from __future__ import annotations

import dataclasses
import linecache
import pathlib
import re
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from lawcat_jax.config import Config, ConfigError
from lawcat_jax.config.tree import field_names, nearest, unshare
from lawcat_jax.errors import UserError

EXIT_USER_ERROR, EXIT_CRASH, EXIT_KEYBOARD = 2, 1, 130


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Run ``main`` as the program; ends the process with what ``main`` returns as its exit code (None is 0).

    A :class:`UserError` or :class:`ConfigError`, also one about the flags, is printed as ``error: ...`` without a
    traceback and ends with 2; Ctrl-C ends with 130; any other exception keeps its traceback and ends with 1. Where
    ``jax.distributed`` runs, the other processes are told of a failure and end as well.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            return parse_flags(argv)
        except UserError as problem:
            print(f"error: {problem}", file=sys.stderr, flush=True)
            sys.exit(EXIT_USER_ERROR)

    app.run(lambda argv: _exit_code(main, argv), flags_parser=parse)


def _exit_code(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    try:
        return main(argv)
    except (UserError, ConfigError) as problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        status = EXIT_KEYBOARD
    except Exception:
        if not _distributed_is_running():
            raise
        traceback.print_exc()
        status = EXIT_CRASH
    if _distributed_is_running():  # the others must not wait for this one
        from lawcat_jax.runtime import distributed

        distributed.leave(status)
    return status


def _distributed_is_running() -> bool:
    """Answers without importing jax, which a command may never have needed."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


class _OrNone(flags.ArgumentParser):
    """Lets optional fields be set to None; ``Config.validate`` rejects None where a field needs a value."""

    def __init__(self, inner: flags.ArgumentParser):
        self._inner = inner
        self.syntactic_help = inner.syntactic_help

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self._inner.parse(argument)

    def flag_type(self) -> str:
        return self._inner.flag_type()


class _ConfigFile(flags.ArgumentParser):
    """Reads a config file so that no two fields share an object: an override changes the field that it names."""

    def __init__(self, inner: flags.ArgumentParser):
        self._inner = inner

    def parse(self, argument: Any) -> Any:
        config = self._inner.parse(argument)
        if isinstance(config, Config):
            unshare(config)
        return config

    def flag_type(self) -> str:
        return self._inner.flag_type()


class _Tuple(tuple_parser.TupleParser):
    """Also takes names without quotes: ``passkey,perplexity``."""

    def parse(self, argument: Any) -> Any:
        if isinstance(argument, str) and re.fullmatch(r"[A-Za-z]\w*(,[A-Za-z]\w*)+", argument):
            return tuple(argument.split(","))
        return super().parse(argument)


def define_config(default: str | None = None, *, flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Define ``--config=<file.py>[:variant]`` with ``--config.<field>=<value>`` overrides."""
    for kind, parser in (
        (float, flags.FloatParser()),
        (int, flags.IntegerParser()),
        (str, flags.ArgumentParser()),
        (typing.Literal, flags.ArgumentParser()),  # Config.validate says which names there are
    ):
        config_flags.register_flag_parser_for_type(kind, _OrNone(parser))
    config_flags.register_flag_parser_for_type(tuple, _Tuple())
    holder = config_flags.DEFINE_config_file(
        "config",
        default,
        "Experiment file, e.g. configs/tiny.py. Any field is overridden with --config.<field>=<value>; docs/config.md "
        "lists all fields with types, units and defaults.",
        lock_config=False,
        flag_values=flag_values,
    )
    flag = flag_values["config"]
    flag.parser = _ConfigFile(flag.parser)
    return holder


def parse_flags(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """absl's flag parsing, with every mistake of the user as one line.

    Raises:
      UserError: unknown flag or field, a value of the wrong type, a config file that is missing or broken.
    """
    try:
        return flag_values(list(argv))
    except OSError as problem:  # from config_flags, at the first override of a file that is not there
        raise UserError("--config: no such file, or it cannot be read") from problem
    except KeyError as problem:  # config_flags: a field that the dataclass does not have
        raise UserError(_unknown_field(problem)) from problem
    except (
        flags.Error,
        ValueError,
        TypeError,
        IndexError,
        SyntaxError,
        ImportError,
        AttributeError,
    ) as problem:
        raise UserError(_misspelt_in_file(problem) or _one_line(problem)) from problem


def load_config(holder: flags.FlagHolder) -> Config:
    """The parsed, overridden and validated configuration.

    Raises:
      UserError: no ``--config``, or a file that does not return a :class:`Config`.
      ConfigError: values that cannot run.
    """
    config = holder.value
    if config is None:
        raise UserError("--config: name an experiment file, for example --config=configs/tiny.py")
    if type(config).__name__ == "_ErrorConfig":  # config_flags keeps a missing file until its first use
        raise UserError("--config: no such file, or it cannot be read")
    if not isinstance(config, Config):
        raise UserError(f"--config: get_config() must return a lawcat_jax.config.Config, not {type(config).__name__}")
    config.validate()
    return config


def no_arguments(argv: Sequence[str]) -> None:
    """Refuse stray words on the command line (a forgotten ``--``, usually)."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")


def not_empty(flag: str, items: Sequence[str] | None) -> None:
    """Refuse a list that was given and names nothing (``--tasks=``)."""
    if items is not None and not any(item.strip() for item in items):
        raise UserError(f"{flag}: names nothing; leave it out for its default")


def config_name(default: str = "run") -> str:
    """A name for the run's folder: the config file's stem and its variant."""
    name = getattr(flags.FLAGS["config"], "_config_filename", None) or default
    path, _, variant = str(name).partition(":")
    return pathlib.Path(path).stem + (f"_{variant}" if variant else "")


def _unknown_field(problem: KeyError) -> str:
    fields = [argument.split("=", 1)[0].lstrip("-") for argument in sys.argv if argument.startswith("--config.")]
    detail = str(problem.args[0]) if problem.args else str(problem)
    guilty = [(field, hint) for field in fields if (hint := _hint(field)) is not None]
    if guilty:
        names = ", ".join(f"{field}{hint}" for field, hint in guilty)
        return f"unknown configuration field {names} (docs/config.md lists all fields)"
    return _one_line(detail)


def _hint(field: str) -> str | None:
    """None for ``config.<...>`` that exists; else the nearest name, if there is one, as an addition to a message."""
    kind: Any = Config
    for name in field.split(".")[1:]:
        options = [option for option in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(option)]
        if not options:
            return ""
        hints = typing.get_type_hints(options[0])
        if name not in hints:
            return nearest(name, field_names(typing.cast(type, options[0])))
        kind = hints[name]
    return None


def _misspelt_in_file(problem: BaseException | None) -> str | None:
    """If the config file set or passed a field that does not exist: the file, the line, the field and the nearest one."""
    while problem is not None:
        if isinstance(problem, ConfigError) and "Traceback" not in str(
            problem
        ):  # config_flags raises such a copy of it
            where, trace = "", problem.__traceback__
            while trace is not None:  # the innermost frame outside this package is the user's line
                if not trace.tb_frame.f_globals.get("__name__", "").startswith("lawcat_jax"):
                    file, number = trace.tb_frame.f_code.co_filename, trace.tb_lineno
                    where = f"{file}, line {number} ({linecache.getline(file, number).strip()}): "
                trace = trace.tb_next
            return f"{where}{problem}"
        problem = problem.__cause__ or problem.__context__
    return None


def _one_line(problem: Any) -> str:
    lines = [line.strip() for line in str(problem).strip().splitlines() if line.strip()]
    if len(lines) > 1 and "Traceback" in str(problem):  # config_flags pastes the traceback into the message
        return f"{lines[0]} {lines[-1]}"
    return " ".join(lines) or type(problem).__name__

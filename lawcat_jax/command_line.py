"""What the command lines share: the ``--config`` flag, one line for each mistake of the user, and exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import signal
import sys
import sysconfig
import threading
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from lawcat_jax.analysis import environment
from lawcat_jax.config import Config, ConfigError
from lawcat_jax.config.tree import field_names, nearest, type_problems, unshare
from lawcat_jax.errors import UserError
from lawcat_jax.runtime.programs import keep_programs

flags.disclaim_key_flags()  # --config is a flag of the command that defines it, and stands in its --help

EXIT_USER_ERROR, EXIT_CRASH, EXIT_KEYBOARD = 2, 1, 130
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the command again
GRACE_SECONDS = 3.0  # for threads that still work when a command has failed
CONFIG_SECONDS = 120  # a config file that has not returned after this is taken to hang


def run_main(main: Callable[[list[str]], int | None], *, cache_programs: bool = True) -> None:
    """Run ``main`` as the program; ends the process with what ``main`` returns as its exit code (None is 0).

    Programs that jax compiles are kept for the next time (:mod:`lawcat_jax.runtime.programs`); ``cache_programs`` False
    is for commands that look into programs, which one read back from a file does not allow.

    A :class:`UserError` or :class:`ConfigError`, also one about the flags, is printed as ``error: ...`` without a
    traceback and ends with 2; Ctrl-C ends with 130; any other exception is printed with its traceback and ends with 1. Where
    ``jax.distributed`` runs, the other processes are told of a failure and end as well. A reader of standard output that
    goes away ends the process with 141, without a word. ``--help`` ends with 0.
    """

    def parse(argv: list[str]) -> list[str]:
        environment.lenient_output()
        logging.set_verbosity(logging.ERROR)  # orbax and tfds write about every step; --verbosity=0 brings that back
        try:
            environment.prepare()
            return parse_flags(argv)
        except UserError as problem:
            print(f"error: {problem}", file=sys.stderr, flush=True)
            sys.exit(EXIT_USER_ERROR)
        except SystemExit as ended:  # --help and its kin end with 1 in absl
            sys.exit(0 if ended.code == 1 else ended.code)

    if cache_programs:
        keep_programs()
    app.run(lambda argv: _exit_code(main, argv), flags_parser=parse)


def _exit_code(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    try:
        status = main(argv)
        return environment.output_problem() or status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        status = EXIT_KEYBOARD
    except Exception as problem:
        status = environment.output_problem(problem) if isinstance(problem, OSError) else None
        told = str(problem) if isinstance(problem, UserError | ConfigError) else environment.foreign_error(problem)
        if status is None and told is None:
            traceback.print_exc()
            status = EXIT_CRASH
        elif status is None:
            if not isinstance(problem, ConfigError):  # which lists its problems, one a line
                told = " ".join(str(told).split())
            print(f"error: {told}", file=sys.stderr, flush=True)
            status = EXIT_USER_ERROR
    if _distributed_is_running():  # the others must not wait for this one
        from lawcat_jax.runtime import distributed

        distributed.leave(status)
    _leave_threads_behind(status)
    return status


def _leave_threads_behind(status: int) -> None:
    """End the process although threads of libraries still wait: orbax' do so for minutes after a save that failed."""
    deadline = time.monotonic() + GRACE_SECONDS
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.daemon:
            continue
        thread.join(max(deadline - time.monotonic(), 0.0))
        if thread.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def end_when_terminated() -> None:
    """From now on SIGTERM ends the process with one line and 75: for the time in which a command has nothing to save.

    What is half done is removed on the way out, as after Ctrl-C.
    """

    def end(*_: Any) -> None:
        print("interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        # Where the exception is swallowed, as in a callback of the garbage collector, the process must end all the same.
        watchdog = threading.Timer(GRACE_SECONDS, os._exit, (EXIT_INTERRUPTED,))
        watchdog.daemon = True
        watchdog.start()
        raise SystemExit(EXIT_INTERRUPTED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def readable(text: str, what: str) -> str:
    """``text`` with U+FFFD for bytes that are no UTF-8 (Python keeps them as lone surrogates), which is said once."""
    clean = re.sub("[\ud800-\udfff]", "\ufffd", text)
    if count := sum(a != b for a, b in zip(text, clean, strict=True)):
        print(f"{what}: {count} byte(s) that are no UTF-8 are read as U+FFFD", file=sys.stderr, flush=True)
    return clean


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
        path = pathlib.Path(str(argument).partition(":")[0])
        with _time_limit(path):
            try:
                config = self._inner.parse(argument)
            except SystemExit as problem:
                raise UserError(f"--config={path}: the file ends the program ({problem.code!r})") from problem
            except (SyntaxError, ValueError) as problem:
                if "null bytes" not in str(problem):
                    raise
                raise UserError(f"--config={path}: {problem}") from None  # Python names no file here
        if type(config).__name__ == "_ErrorConfig":  # config_flags keeps an OSError until the first use
            if path.is_file() and os.access(path, os.R_OK):  # of something else, which the file opens
                _raise_kept(config)
            raise UserError(f"--config={argument}: no such file, or it cannot be read")
        if not isinstance(config, Config):
            raise UserError(f"--config={path}: {_WRONG_RESULT}, not {type(config).__name__}")
        if problems := [problem for problem in type_problems(config, "config") if _is_structural(problem, config)]:
            raise UserError(f"--config={path}: {'; '.join(problems)}")
        unshare(config)
        return config

    def flag_type(self) -> str:
        return self._inner.flag_type()


def _raise_kept(config: Any) -> None:
    """Raise the error that config_flags keeps instead of a configuration."""
    try:
        config.anything  # noqa: B018
    except OSError as problem:
        raise problem.__cause__ or problem from None


_WRONG_RESULT = "get_config() must return a lawcat_jax.config.Config"


def _is_structural(problem: str, config: Config) -> bool:
    """Whether a problem of types stands where a part of the tree should be: no field below it can be set."""
    hint, names = Config, problem.partition(":")[0].split(".")[1:]
    for name in names:
        hint = typing.get_type_hints(hint).get(name)
        if not dataclasses.is_dataclass(hint):
            return False
    return bool(names)


@contextlib.contextmanager
def _time_limit(path: pathlib.Path) -> Iterator[None]:
    """An error instead of waiting for ever for a config file that does not return."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, frame: types.FrameType | None) -> None:
        while frame is not None and not path.samefile(frame.f_code.co_filename):
            frame = frame.f_back
        where = f", line {frame.f_lineno}" if frame is not None else ""
        raise UserError(f"{path}{where}: get_config() has not returned after {CONFIG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, CONFIG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
        rest = flag_values(list(argv))
    except UserError:
        raise
    except Exception as problem:  # absl, config_flags and the config file itself raise all kinds
        told = _in_config_file(problem, flag_values)
        if told is None and isinstance(problem, KeyError):  # config_flags: a field that the dataclass does not have
            told = _unknown_field(problem)
        elif told is None and isinstance(problem, OSError):  # at the first override of a file that is not there
            told = "--config: no such file, or it cannot be read"
        # absl puts the name of the file before a message that has it.
        raise UserError(told or re.sub(r"^flag --config=\S*: (?=--config)", "", _one_line(problem))) from problem
    for name in flag_values:
        value = flag_values[name].value
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise UserError(f"--{name}={str(value)[:20]}...: this number is too large")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value}: must be a finite number")
    return rest


def load_config(holder: flags.FlagHolder) -> Config:
    """The parsed, overridden and validated configuration.

    Raises:
      UserError: no ``--config``, or a file that does not return a :class:`Config`.
      ConfigError: values that cannot run.
    """
    config = holder.value
    if config is None:
        raise UserError("--config: name an experiment file, for example --config=configs/tiny.py")
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


def _in_config_file(problem: BaseException, flag_values: flags.FlagValues) -> str | None:
    """If the config file raised the error: the file, the line and what was raised there; else None."""
    name = getattr(flag_values["config"], "_config_filename", None) if "config" in flag_values else None
    path = str(name or "").partition(":")[0]
    found: BaseException | None = problem
    while found is not None:
        copied = "Traceback" in str(found)  # config_flags raises such a copy of an error
        if isinstance(found, SyntaxError) and found.filename and not copied:
            return f"{found.filename}, line {found.lineno}: {found.msg}"
        frames = [frame for frame in traceback.extract_tb(found.__traceback__) if not _is_library(frame.filename)]
        if frames and not copied:  # the innermost is the user's line
            where = f"{frames[-1].filename}, line {frames[-1].lineno} ({(frames[-1].line or '').strip()})"
            named = isinstance(found, UserError | ConfigError)
            return f"{where}: {found if named else _described(found)}"
        found = found.__cause__ or found.__context__
    if isinstance(problem, AttributeError) and "get_config" in str(problem):
        return f"--config={path}: the file has no get_config(), which must return a lawcat_jax.config.Config"
    return None


def _is_library(file: str) -> bool:
    return file.startswith(_LIBRARIES) or file.startswith("<")


_LIBRARIES = tuple(
    {
        str(pathlib.Path(__file__).parent) + os.sep,
        *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        str(pathlib.Path(flags.__file__).parents[2]) + os.sep,
    }
)


def _described(problem: BaseException) -> str:
    text = " ".join(str(problem).split())[:300]
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


_RAW = (
    (re.compile(r"invalid literal for int\(\) with base \d+: .*"), "must be a whole number"),
    (re.compile(r"could not convert string to float: .*"), "must be a number"),
    (re.compile(r"\('Non-boolean argument to boolean flag', .*\)"), "must be true or false"),
)
"""Python's own words for a value of the wrong type, and plain ones."""


def _one_line(problem: Any) -> str:
    if isinstance(problem, flags.IllegalFlagValueError):
        for raw, plain in _RAW:
            problem = raw.sub(plain, str(problem))
    lines = [line.strip() for line in str(problem).strip().splitlines() if line.strip()]
    if len(lines) > 1 and "Traceback" in str(problem):  # config_flags pastes the traceback into the message
        return f"{lines[0]} {lines[-1]}"
    return " ".join(lines) or type(problem).__name__

"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lawcat_jax.errors import UserError

_LOST = "lost+found"  # which a fresh file system has at its root


@contextlib.contextmanager
def new_directory(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary directory beside ``target``; on success it becomes ``target``, else it is removed.

    An empty ``target`` counts as absent. With ``overwrite`` an existing directory is replaced only after
    the new one is complete. A link stays and what it leads to is written. A mount point cannot be renamed: the temporary
    directory lies in it, and its entries move up at the end.

    Raises:
      UserError: ``target`` exists with content and ``overwrite`` is off, is a file, or cannot be written.
    """
    check_target(target, overwrite=overwrite)
    shown, target = target, Path(os.path.realpath(target))
    mounted = os.path.ismount(target)
    parent = target if mounted else target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=parent))
    except OSError as problem:
        where = f"{'into' if mounted else 'beside'} {shown}"
        raise UserError(f"cannot write {where}: {problem.strerror or problem}") from None
    try:
        try:
            yield temporary
        except OSError as problem:
            if problem.errno is None:
                raise
            raise UserError(f"cannot write {shown}: {problem.strerror or problem}") from problem
        try:
            _put_in_place(temporary, target, overwrite=overwrite, mounted=mounted)
        except OSError as problem:
            raise UserError(f"cannot write {shown}: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, target: Path, *, overwrite: bool, mounted: bool) -> None:
    """Make a finished directory the target; what was there before goes last, and comes back when a step fails."""
    temporary.chmod(0o777 & ~_umask())  # mkdtemp makes 0700: others could not read the result
    if not target.exists():
        os.rename(temporary, target)
        return
    check_target(target, overwrite=overwrite, ignore=temporary.name)  # it may have been filled in the meantime
    if not mounted and not any(target.iterdir()):
        target.rmdir()
        os.rename(temporary, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=temporary.parent))
    done: list[tuple[Path, Path]] = []

    def move(source: Path, to: Path) -> None:
        os.rename(source, to)
        done.append((source, to))

    try:
        if mounted:
            for entry in sorted(target.iterdir()):
                if entry not in (temporary, old) and entry.name != _LOST:
                    move(entry, old / entry.name)
            for entry in sorted(temporary.iterdir()):
                move(entry, target / entry.name)
        else:
            move(target, old / "d")
            move(temporary, target)
    except OSError:
        for source, to in reversed(done):
            os.rename(to, source)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Write a file that appears under ``path`` only when it is complete; text is UTF-8.

    Raises:
      UserError: when the file or its directory cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as problem:
        raise UserError(f"cannot write {path}: {problem.strerror or problem}") from problem
    try:
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp makes 0600: others could not read the result
        try:
            with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as out:
                yield out
            os.replace(partial, path)
        except OSError as problem:
            if problem.errno is None:
                raise
            raise UserError(f"cannot write {path}: {problem.strerror or problem}") from problem
    finally:
        Path(partial).unlink(missing_ok=True)


def check_target(target: str | os.PathLike, *, overwrite: bool, ignore: str = "") -> None:
    """Refuse a target that would be destroyed, before any work is done.

    Raises:
      UserError: ``target`` is a file, or a directory with content (other than ``ignore``) while ``overwrite`` is off, or
        it cannot be looked into.
    """
    target = Path(target)
    if "\0" in str(target):
        raise UserError(f"{str(target)!r} is no name for a directory")
    try:
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} is a file; name a directory to write to")
        content = [entry.name for entry in target.iterdir()] if target.is_dir() else []
    except OSError as problem:
        raise UserError(f"cannot write {target}: {problem.strerror or problem}") from None
    if {*content} - {ignore, _LOST} and not overwrite:
        raise UserError(f"{target} exists and is not empty; pass --overwrite to replace it")


@contextlib.contextmanager
def read_in_one_line(what: str) -> Iterator[None]:
    """Errors of the operating system in the block (no permission, a name that is too long) as ``cannot read <what>: why``.

    Raises:
      UserError: for an OSError, or a ValueError about a NUL character.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as problem:
        if isinstance(problem, ValueError) and "null" not in str(problem):
            raise
        raise UserError(f"cannot read {what!r}: {getattr(problem, 'strerror', None) or problem}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """One JSON object from a file.

    Raises:
      UserError: the file is missing, unreadable, not JSON, nested too deeply, or not an object.
    """
    try:
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):  # a pipe would never end
            raise UserError(f"{path} is not a regular file")
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror or problem}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read as JSON") from None
    except UserError:
        raise
    except ValueError as problem:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path} is not valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def write_json(path: str | os.PathLike, value: dict[str, Any]) -> None:
    """Write a JSON object, indented, keys in the given order; see :func:`atomic_file`."""
    with atomic_file(path) as out:
        out.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

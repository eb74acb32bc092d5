"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lawcat_jax.errors import UserError

MARK = "lawcat_jax"
"""Stands in the metadata of every safetensors file that this project writes: such a directory may be replaced."""

_MODEL_PARTS = re.compile(  # everything that a written model consists of
    r"model\.json|params|tokenizer|README\.md|\.DS_Store|(adapter_|generation_)?config\.json|[\w-]+\.py|__pycache__"
    r"|(adapter_)?model[\w.-]*\.safetensors(\.index\.json)?"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template|vocab)\.json"
    r"|tokenizer\.model|chat_template\.jinja|merges\.txt"
)


def user_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of this package in the user's cache: ``$XDG_CACHE_HOME/lawcat_jax``, else ``~/.cache/lawcat_jax``.

    Raises:
      UserError: there is no home directory.
    """
    try:
        return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lawcat_jax"
    except RuntimeError:
        raise UserError(
            "there is no home directory; set HOME, or XDG_CACHE_HOME, to a directory that can be written"
        ) from None


@contextlib.contextmanager
def new_directory(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary directory beside ``target``; on success it becomes ``target``, else it is removed.

    An empty ``target`` counts as absent, and a link stands for what it leads to. With ``overwrite`` an existing model
    is replaced only after the new one is complete. A mount point cannot be renamed: the temporary directory lies in it,
    and its entries move up at the end.

    Raises:
      UserError: as :func:`check_target`, or ``target`` cannot be written.
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
        check_target(shown, overwrite=overwrite)  # it may have been filled in the meantime
        try:
            temporary.chmod(0o777 & ~_umask())  # mkdtemp makes 0700: others could not read the result
            _put_in_place(temporary, target, mounted=mounted)
        except OSError as problem:
            raise UserError(f"cannot write {shown}: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _entries(directory: Path) -> list[Path]:
    """What lies in a directory, without what is being written there and what file systems put at their root."""
    own = (f".{directory.name}.tmp-", f".{directory.name}.old-")
    return [entry for entry in directory.iterdir() if not entry.name.startswith(own) and entry.name != "lost+found"]


def _put_in_place(temporary: Path, target: Path, *, mounted: bool) -> None:
    """Make a finished directory the target; what was there before goes last, and comes back when a step fails."""
    if not target.exists():
        os.rename(temporary, target)
        return
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
            for entry in sorted(_entries(target)):
                move(entry, old / entry.name)
            # What readers look for comes last.
            for entry in sorted(temporary.iterdir(), key=lambda entry: (entry.suffix == ".json", entry.name)):
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
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """The path of a temporary file beside ``path`` to fill; on success it becomes ``path``, else it is removed.

    Raises:
      UserError: the file or its directory cannot be written (a full disk, say).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as problem:
        raise UserError(f"cannot write {path}: {problem.strerror or problem}") from problem
    partial = Path(name)
    try:
        partial.chmod(0o666 & ~_umask())  # mkstemp makes 0600: others could not read the result
        yield partial
        os.replace(partial, path)
    except OSError as problem:
        if problem.errno is None:
            raise
        raise UserError(f"cannot write {path}: {problem.strerror or problem}") from problem
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(directory: str | os.PathLike) -> None:
    """Remove what :func:`new_directory` and :func:`new_file` left beside the entries of a directory when their process was
    killed. Only for a directory that nobody else writes to now.
    """
    entries = list(Path(directory).iterdir()) if Path(directory).is_dir() else []
    for entry in entries:
        named = re.fullmatch(r"\.(?P<name>.+)\.((tmp|old)-)?[a-z0-9_]{8}", entry.name)  # as tempfile draws them
        if not named or not Path(directory, named["name"]).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Write a file that appears under ``path`` only when it is complete; text is UTF-8, in which half a character (of a file name
    that is none, say) is an escape as in JSON.

    Raises:
      UserError: when the file or its directory cannot be written.
    """
    encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
    with new_file(path) as partial, open(partial, mode, encoding=encoding, errors=errors) as out:
        yield out


def check_target(target: str | os.PathLike, *, overwrite: bool, sources: Iterable[str | os.PathLike] = ()) -> None:
    """Refuse a target that would be destroyed, before any work is done; links are followed first.

    Args:
      target: the directory to write.
      overwrite: whether an existing model may be replaced. Anything else never is: only a directory whose every entry
        belongs to a model that this project wrote.
      sources: what is read to make it.

    Raises:
      UserError: ``target`` is a file, or cannot be looked into; or it has content and ``overwrite`` is off, or it may not
        be replaced.
    """
    if "\0" in os.fspath(target):
        raise UserError(f"{os.fspath(target)!r} is no name for a directory")
    path = Path(os.path.realpath(target))
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{target} is a file; name a directory to write to")
        if not path.is_dir() or not _entries(path):
            return
        _check_replaceable(
            target, path, overwrite=overwrite, sources=[Path(os.path.realpath(each)) for each in sources]
        )
    except OSError as problem:
        raise UserError(f"cannot write {target}: {problem.strerror or problem}") from None


def _check_replaceable(target: str | os.PathLike, path: Path, *, overwrite: bool, sources: Iterable[Path]) -> None:
    """The part of :func:`check_target` about a directory with content; ``path`` and ``sources`` are without links."""
    for source in sources:
        if source == path:
            raise UserError(f"source and target are the same directory: {target}")
        if path in source.parents:
            raise UserError(f"{target} holds the source {source}; name another target")
        if source in path.parents:
            raise UserError(f"{target} lies inside the source {source}; name another target")
    if not overwrite:
        raise UserError(f"{target} exists and is not empty; pass --overwrite to replace it")
    here = Path.cwd()
    if path == here or path in here.parents:
        raise UserError(f"--overwrite does not replace {target}, which is or holds the current directory")
    reason = _not_a_model(path)
    if reason:
        raise UserError(
            f"--overwrite replaces only a model that this program wrote, and {target} {reason}; remove it yourself, "
            "or name another target"
        )


def _not_a_model(directory: Path) -> str | None:
    """Why a directory is not, with everything in it, a model written here; None if it is."""
    strangers = sorted(entry.name for entry in _entries(directory) if not _MODEL_PARTS.fullmatch(entry.name))
    if strangers:
        return f"has {', '.join(strangers[:3])}{' and more' if len(strangers) > 3 else ''} in it"
    if (directory / "model.json").is_file():
        return None
    weights = [*directory.glob("model*.safetensors"), *directory.glob("adapter_model*.safetensors")]
    if any((directory / name).is_file() for name in ("config.json", "adapter_config.json")) and weights:
        if all(file.is_file() and _has_mark(file) for file in weights):
            return None
        return "has weights of another program in it"
    return "is none"


def _has_mark(file: Path) -> bool:
    with open(file, "rb") as stream:
        return f'"{MARK}"'.encode() in stream.read(256)


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


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of ``json.loads`` for what users write: of a key that stands twice one value would be lost.

    Raises:
      ValueError: naming the key.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


def write_json(path: str | os.PathLike, value: dict[str, Any]) -> None:
    """Write a JSON object, indented, keys in the given order; see :func:`atomic_file`."""
    with atomic_file(path) as out:
        out.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

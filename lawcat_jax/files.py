"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
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


@contextlib.contextmanager
def new_directory(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary directory beside ``target``; on success it becomes ``target``, else it is removed.

    An empty ``target`` counts as absent, and a link stands for what it points to. With ``overwrite`` an existing model
    is replaced only after the new one is complete. A mount point cannot be renamed: there the parts are moved into it,
    one after another.

    Raises:
      UserError: as :func:`check_target`, or ``target`` cannot be written.
    """
    check_target(target, overwrite=overwrite)
    target = Path(target).resolve()
    try:
        room = target if os.path.ismount(target) else target.parent
        room.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=room))
    except OSError as problem:
        raise UserError(f"cannot write beside {target}: {problem.strerror or problem}") from None
    try:
        try:
            yield temporary
        except OSError as problem:
            if problem.errno is None:
                raise
            raise UserError(f"cannot write {target}: {problem.strerror or problem}") from problem
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes 0700: others could not read the result
        check_target(target, overwrite=overwrite)  # it may have been filled in the meantime
        try:
            _put_in_place(temporary, target)
        except OSError as problem:
            raise UserError(f"cannot replace {target}: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _entries(directory: Path) -> list[Path]:
    """What lies in a directory, without what is being written there and what file systems put at their root."""
    own = f".{directory.name}.tmp-"
    return [entry for entry in directory.iterdir() if not entry.name.startswith(own) and entry.name != "lost+found"]


def _put_in_place(temporary: Path, target: Path) -> None:
    if temporary.parent == target:  # a mount point
        for entry in _entries(target):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        for entry in sorted(
            temporary.iterdir(), key=lambda entry: entry.suffix == ".json"
        ):  # what readers look for: last
            os.rename(entry, target / entry.name)
        return
    if target.exists() and any(target.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        try:
            os.rename(target, old / "d")
            os.rename(temporary, target)
        finally:
            shutil.rmtree(old, ignore_errors=True)
        return
    if target.exists():
        target.rmdir()
    os.rename(temporary, target)


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """The path of a temporary file beside ``path`` to fill; on success it becomes ``path``, else it is removed.

    Raises:
      UserError: the directory cannot be written, or the file cannot (a full disk).
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
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Write a file that appears under ``path`` only when it is complete; text is UTF-8.

    Raises:
      UserError: when the directory cannot be written.
    """
    with new_file(path) as partial, open(partial, mode, encoding=None if "b" in mode else "utf-8") as out:
        yield out


def check_target(target: str | os.PathLike, *, overwrite: bool, sources: Iterable[str | os.PathLike] = ()) -> None:
    """Refuse a target that would be destroyed, before any work is done; links are followed first.

    Args:
      target: the directory to write.
      overwrite: whether an existing model may be replaced. Anything else never is: only a directory whose every entry
        belongs to a model that this project wrote.
      sources: what is read to make it.

    Raises:
      UserError: ``target`` is a file; or it has content and ``overwrite`` is off, or it may not be replaced.
    """
    path = Path(target).resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"{target} is a file; name a directory to write to")
    if not path.is_dir() or not _entries(path):
        return
    for source in (Path(source).resolve() for source in sources):
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
        if all(_has_mark(file) for file in weights):
            return None
        return "has weights of another program in it"
    return "is none"


def _has_mark(file: Path) -> bool:
    with open(file, "rb") as stream:
        return f'"{MARK}"'.encode() in stream.read(256)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """One JSON object from a file.

    Raises:
      UserError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror or problem}") from None
    except ValueError as problem:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path} is not valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def write_json(path: str | os.PathLike, value: dict[str, Any]) -> None:
    """Write a JSON object, indented, keys in the given order; see :func:`atomic_file`."""
    with atomic_file(path) as out:
        out.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

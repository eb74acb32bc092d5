"""The files of text sources: where they are, and digests of what they hold, which tell a source from a changed one."""

from __future__ import annotations

import concurrent.futures
import functools
import glob
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lawcat_jax.config.choices import TEXT_SUFFIXES
from lawcat_jax.errors import UserError

_FRESH_SECONDS = 2.0  # a file changed so recently may change again without another time, where clocks tick slowly
_THREADS = 8
_known: dict[tuple[str | int, ...], str] = {}  # digests by path and what a file system says of a file


def is_remote(source: str) -> bool:
    """Whether ``source`` is read through a dataset library rather than from plain files."""
    return source.startswith(("hf:", "tfds:"))


def local_files(source: str) -> list[Path]:
    """Files of a local source (a file, a directory searched recursively, or a glob), sorted by path.

    Of a directory, hidden files and folders (``.ipynb_checkpoints`` holds copies) are left out, and so are files of other
    kinds. Links are followed, and a file that is reached twice is read once. What is left out is counted in a line on standard
    error. Upper and lower case of a suffix are the same. Folders of a pattern that exist as they are written are no patterns.

    Raises:
      UserError: when nothing matches, a file has an unknown suffix, or a link of a directory leads nowhere.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _of_directory(path, source)
        if path.is_file():
            return [_with_suffix(path)]
        found = sorted(Path(name) for name in glob.glob(_pattern(path), recursive=True))
        files = [_with_suffix(file) for file in found if file.is_file()]
        if not files:
            raise UserError(f"text source {source!r}: no such file, and no file matches it as a pattern")
        return _once(files, source)
    except (OSError, ValueError) as problem:  # ValueError: a NUL character
        if isinstance(problem, UserError):
            raise
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"text source {source!r}: cannot be looked up ({reason})") from None


def _with_suffix(file: Path) -> Path:
    if not _is_text(file):
        raise UserError(f"text source {str(file)!r}: unknown suffix, expected one of {', '.join(TEXT_SUFFIXES)}")
    return file


def _pattern(path: Path) -> str:
    """For glob, with the leading folders escaped that are there as they are written (``data[1]``)."""
    parts, literal = list(path.parts), Path()
    while parts and (literal / parts[0]).is_dir():
        literal /= parts.pop(0)
    return os.path.join(glob.escape(str(literal)), *parts)


def _once(files: Sequence[Path], source: str, linked: int = 0) -> list[Path]:
    """The files without those that are an earlier one under another name; ``linked`` links were left out before."""
    kept: dict[Any, Path] = {}
    for file in files:
        stat = file.stat()
        kept.setdefault((stat.st_dev, stat.st_ino) if stat.st_nlink > 1 else os.path.realpath(file), file)
    if linked := linked + len(files) - len(kept):
        say_once(f"text source {source!r}: {linked} link(s) to what is read already are passed over")
    return list(kept.values())


def _walk(folder: Path) -> tuple[list[Path], int]:
    """(everything in a folder and those below it but folders, sorted; how many links to folders lead to one that was seen
    already). Hidden names are left out.

    Raises:
      OSError: a folder cannot be read.
    """

    def fail(problem: OSError) -> None:
        raise problem

    found, seen, again = [], {os.path.realpath(folder)}, 0
    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        kept = []
        for name in sorted(name for name in folders if not name.startswith(".")):
            real = os.path.realpath(os.path.join(place, name))
            again += real in seen
            if real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found), again


def _of_directory(path: Path, source: str) -> list[Path]:
    found, linked = _walk(path)
    lost = [file for file in found if file.is_symlink() and not file.exists() and _is_text(file)]
    if lost:
        raise UserError(f"text source {source!r}: {lost[0].relative_to(path)} is a link to nothing; mend or remove it")
    found = [file for file in found if file.is_file()]
    texts = [file for file in found if _is_text(file)]
    # Beside other files .md usually describes them; a directory of nothing else is a text.
    files = [file for file in texts if file.suffix.lower() != ".md"] or texts
    if not files:
        raise UserError(f"text source {source!r}: the directory holds no {', '.join(TEXT_SUFFIXES)} file")
    if len(files) < len(found):
        kept = set(files)
        passed = [file for file in found if file not in kept]
        count = "1 file is" if len(passed) == 1 else f"{len(passed)} files are"
        say_once(
            f"text source {source!r}: {count} passed over (for example {passed[0].relative_to(path)}); read are "
            f"{', '.join(TEXT_SUFFIXES)}, .md only where there is nothing else"
        )
    return _once(files, source, linked)


@functools.cache
def say_once(line: str) -> None:
    """Print a line on standard error, unless it was printed before: a source is opened several times in a run."""
    print(line, file=sys.stderr, flush=True)


def _is_text(file: Path) -> bool:
    return file.suffix.lower() in TEXT_SUFFIXES


def files_here(source: str) -> list[Path]:
    """The files on this machine that a source is read from, sorted by path; [] of a remote source. Where ``hf:`` or ``tfds:``
    names a directory, all of its files count, but for hidden ones.

    Raises:
      UserError: as :func:`local_files`.
    """
    if not is_remote(source):
        return local_files(source)
    name = source.split(":")[1]
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        return []
    try:
        return [file for file in _walk(folder)[0] if file.is_file()]
    except OSError as problem:
        raise UserError(f"text source {source!r}: cannot be looked up ({problem.strerror or problem})") from None


def digests(files: Sequence[Path]) -> list[str]:
    """Of the bytes of each file, the first 32 hex digits of their SHA-256.

    However large, a file is read whole: at 0.6 GB/s and more, several files at once, that is little beside making tokens of
    it. A process reads it once, unless it has just been changed. Digests are not kept beyond the process, since size and
    times do not prove that a file is the same.

    Raises:
      UserError: a file cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_digest, files))


def keeps_returns(file: Path) -> bool:
    """Whether a text file has carriage returns, which versions before the third of the token cache read as ``\\n``.

    Raises:
      UserError: it cannot be read.
    """
    if file.suffix.lower() not in (".txt", ".md"):
        return False
    try:
        with file.open("rb") as stream:
            return any(b"\r" in block for block in iter(lambda: stream.read(1 << 24), b""))
    except OSError as problem:
        raise UserError(f"{file}: cannot be read ({problem.strerror or problem})") from problem


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            stat = os.fstat(stream.fileno())
            facts = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            key = (os.path.realpath(file), *facts)
            if key not in _known or time.time() - max(stat.st_mtime, stat.st_ctime) < _FRESH_SECONDS:
                _known[key] = hashlib.file_digest(stream, "sha256").hexdigest()[:32]
            return _known[key]
    except OSError as problem:
        raise UserError(f"{file}: cannot be read ({problem.strerror or problem})") from problem

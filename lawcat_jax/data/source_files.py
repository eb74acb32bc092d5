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
    kinds, which are counted in a line on standard error. Upper and lower case of a suffix are the same.

    Raises:
      UserError: when nothing matches, or a file has an unknown suffix.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _of_directory(path, source)
        if path.is_file():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    except (OSError, ValueError) as problem:  # ValueError: a NUL character
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"text source {source!r}: cannot be looked up ({reason})") from None
    if not files:
        raise UserError(f"text source {source!r}: no such file, and no file matches it as a pattern")
    for file in files:
        if not _is_text(file):
            raise UserError(f"text source {str(file)!r}: unknown suffix, expected one of {', '.join(TEXT_SUFFIXES)}")
    return files


def _of_directory(path: Path, source: str) -> list[Path]:
    found = sorted(
        file
        for file in path.rglob("*")
        if not any(part.startswith(".") for part in file.relative_to(path).parts) and file.is_file()
    )
    texts = [file for file in found if _is_text(file)]
    # Beside other files .md usually describes them; a directory of nothing else is a text.
    files = [file for file in texts if file.suffix.lower() != ".md"] or texts
    if not files:
        raise UserError(f"text source {source!r}: the directory holds no {', '.join(TEXT_SUFFIXES)} file")
    if len(files) < len(found):
        kept = set(files)
        passed = [file for file in found if file not in kept]
        _say_passed_over(source, len(passed), str(passed[0].relative_to(path)))
    return files


@functools.cache  # once for each directory, which is listed several times in a run
def _say_passed_over(source: str, count: int, example: str) -> None:
    files = "1 file is" if count == 1 else f"{count} files are"
    print(
        f"text source {source!r}: {files} passed over (for example {example}); read are {', '.join(TEXT_SUFFIXES)}, "
        ".md only where there is nothing else",
        file=sys.stderr,
        flush=True,
    )


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
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts))


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

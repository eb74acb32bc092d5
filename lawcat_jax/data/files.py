"""The files of a text source on this machine."""

from __future__ import annotations

import functools
import glob
import sys
from pathlib import Path

from lawcat_jax.config.choices import TEXT_SUFFIXES
from lawcat_jax.errors import UserError


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

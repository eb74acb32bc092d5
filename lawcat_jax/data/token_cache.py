"""Files of token ids that are checked whenever they are opened.

A file is a header of 64 bytes and the ids, uint16 or int32, in the machine's byte order::

    16 bytes  "lawcat tokens 1\\n"
     8 bytes  number of ids, little-endian
     8 bytes  largest id, little-endian
    32 bytes  SHA-256 of the two numbers and the ids

The cache lies in ``$LAWCAT_CACHE``, else in ``tokens/`` of :func:`lawcat_jax.files.user_cache`.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lawcat_jax.files import user_cache

_MAGIC = b"lawcat tokens 1\n"
_NUMBERS = struct.Struct("<QQ")
_HEADER = len(_MAGIC) + _NUMBERS.size + hashlib.sha256().digest_size
_BLOCK = 16 << 20  # bytes read at once when a file is checked


class DamagedCacheError(Exception):
    """A cache file that must not be used; the message says why."""


def directory() -> Path:
    """The folder of the cache; it need not exist."""
    if os.environ.get("LAWCAT_CACHE"):
        return Path(os.environ["LAWCAT_CACHE"]).expanduser()
    return user_cache() / "tokens"


def open_tokens(path: Path, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """(ids, the largest of them): the memory-mapped content of a file, after its size and fingerprint were checked.

    Raises:
      DamagedCacheError: another size, another fingerprint, or no such header.
      OSError: there is no file, or it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER)
        if len(header) < _HEADER or not header.startswith(_MAGIC):
            raise DamagedCacheError("its header is not that of a token cache")
        numbers = header[len(_MAGIC) : len(_MAGIC) + _NUMBERS.size]
        count, largest = _NUMBERS.unpack(numbers)
        if size != _HEADER + count * dtype.itemsize:
            raise DamagedCacheError(f"{size} bytes instead of {_HEADER + count * dtype.itemsize}")
        digest = hashlib.sha256(numbers)
        while block := stream.read(_BLOCK):
            digest.update(block)
    if digest.digest() != header[-digest.digest_size :]:
        raise DamagedCacheError("its contents have changed since it was written")
    return np.memmap(path, dtype, mode="r", offset=_HEADER, shape=(count,)), largest


def write_tokens(path: Path, dtype: np.dtype, chunks: Iterable[np.ndarray]) -> None:
    """Write arrays of ids one after another; the file appears when it is complete.

    Without any id, or when ``chunks`` raises an error, no file is left.

    Raises:
      OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=path.name + ".", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as out:
            out.write(b"\0" * _HEADER)
            count = largest = 0
            for chunk in chunks:
                out.write(chunk.astype(dtype).tobytes())
                count, largest = count + len(chunk), max(largest, int(chunk.max(initial=0)))
            numbers = _NUMBERS.pack(count, largest)
            digest = hashlib.sha256(numbers)
            out.seek(_HEADER)
            while block := out.read(_BLOCK):
                digest.update(block)
            out.seek(0)
            out.write(_MAGIC + numbers + digest.digest())
        if count:
            os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)

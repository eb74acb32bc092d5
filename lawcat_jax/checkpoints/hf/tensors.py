"""The safetensors format with bounded memory: read slices of a tensor, write a file tensor by tensor.

Layout: u64 little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, raw data. Plain
reads instead of a memory map, because mapped pages count as resident memory of the process.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from lawcat_jax.checkpoints.fingerprints import (
    SWITCH,
    array_digest,
    digest,
    fingerprint_part,
    hash_digits,
    hash_part,
    wanted,
)
from lawcat_jax.errors import UserError
from lawcat_jax.files import MARK

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# In the metadata: a digest of names, dtypes and shapes in 32 hex digits, then 16 for each tensor, in the order of their names.
_HASHES = "lawcat_hashes"
_SUMS = "lawcat_fingerprints"  # of earlier versions: 8 hex digits for each tensor
_HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors library
BLOCK_BYTES = 32 << 20  # of one read: small beside any large tensor, large enough for full disk speed


class StoredTensor(Protocol):
    """A tensor in a file of any format, as :class:`Tensor` and the GGUF reader's give it."""

    file: Path
    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype | None:
        """What reads give; None for a dtype that cannot be read."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of what reads give."""
        ...

    def part(self, start: int, stop: int) -> StoredTensor:
        """Rows [start, stop) of axis 0 as a tensor of their own."""
        ...

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [start, stop) of axis 0, read into ``out`` (C-contiguous, same dtype) when given."""
        ...

    def blocks(self, start: int, stop: int) -> Iterable[tuple[int, np.ndarray]]:
        """(first row, rows) of [start, stop) in pieces of about :data:`BLOCK_BYTES`."""
        ...


class Stated:
    """The fingerprint that a file states of a tensor: 16 hex digits of a hash or, of an earlier version, 8 of a sum. None where
    names, dtypes or shapes are not those that were written, and so nothing of the tensor is sure.

    A fingerprint is compared as soon as all rows have been read, in whatever order and pieces; a file that is read in part is not.
    """

    def __init__(self, digits: str | None):
        self._digits, self._parts = digits, {}

    def differs(self, start: int, stop: int, rows: np.ndarray, total: int) -> bool:
        """Whether rows [start, stop) of ``total``, of 1 element at least, complete a tensor with another fingerprint."""
        if self._digits is None:
            return True
        first = start * math.prod(rows.shape[1:])
        words = hash_part(rows, first) if len(self._digits) == 16 else (fingerprint_part(rows, first),)
        self._parts[start] = stop, words
        done, found = 0, [0] * len(words)
        while done in self._parts and done < total:
            done, words = self._parts[done]
            found = [a + b for a, b in zip(found, words, strict=True)]
        if done < total:
            return False
        self._parts.clear()
        return hash_digits(found) != self._digits


class Tensor:
    """One tensor in a file: ``shape``, ``dtype`` (None if not one of :data:`DTYPES`), and reads of rows.

    Where its fingerprint is stated (:func:`write_tensors` does) it is checked when all rows have been read, also as
    several :meth:`part`.
    """

    def __init__(
        self, file: Path, name: str, code: str, shape: tuple[int, ...], offset: int, stated: Stated | None = None
    ):
        self.file, self.name, self.code, self.shape, self._offset = file, name, code, shape, offset
        self.dtype = DTYPES.get(code)
        self._stated, self._first, self._total = stated, 0, shape[0] if shape else 0

    @property
    def nbytes(self) -> int:
        assert self.dtype is not None
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of axis 0 as a tensor of their own."""
        if (start, stop) == (0, self.shape[0]):
            return self
        assert self.dtype is not None
        offset = self._offset + start * math.prod(self.shape[1:]) * self.dtype.itemsize
        part = Tensor(self.file, self.name, self.code, (stop - start, *self.shape[1:]), offset, self._stated)
        part._first, part._total = self._first + start, self._total
        return part

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [start, stop) of axis 0, read into ``out`` (C-contiguous, same dtype) when given."""
        assert self.dtype is not None
        width = math.prod(self.shape[1:])
        if out is None:
            out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        buffer = out.reshape(-1).view(np.uint8).data
        try:
            with open(self.file, "rb", buffering=0) as stream:
                stream.seek(self._offset + start * width * self.dtype.itemsize)
                done = 0
                while done < len(buffer):
                    count = stream.readinto(buffer[done:])
                    if not count:
                        raise UserError(f"{self.file}: ends within tensor {self.name} (truncated)")
                    done += count
        except OSError as problem:
            raise UserError(f"cannot read {self.file}: {problem.strerror or problem}") from None
        if self._stated is None or start == stop or not wanted():
            return out
        if self._stated.differs(self._first + start, self._first + stop, out, self._total):
            raise UserError(
                f"{self.file}: the contents of {self.name} have changed since they were written; get a fresh copy or convert "
                f"again ({SWITCH}=off in the environment reads them unchecked)"
            )
        return out

    def blocks(self, start: int, stop: int) -> Iterable[tuple[int, np.ndarray]]:
        """(first row, rows) of [start, stop) in pieces of about :data:`BLOCK_BYTES`, one buffer for all."""
        assert self.dtype is not None
        row_bytes = max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)
        step = max(1, min(stop - start, BLOCK_BYTES // row_bytes))
        buffer = np.empty((step, *self.shape[1:]), self.dtype)
        for first in range(start, stop, step):
            yield first, self.rows(first, min(first + step, stop), buffer[: min(step, stop - first)])


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, bytes before the data, size of the file)."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
            raise UserError(f"{path}: not a file")
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or not 2 <= length <= _HEADER_LIMIT:
                raise UserError(f"{path}: not a safetensors file")
            if 8 + length > size:
                raise UserError(f"{path}: truncated within the header ({size} bytes); download it again")
            header = json.loads(stream.read(length))
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror or problem}") from None
    except (ValueError, RecursionError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"{path}: not a safetensors file (bad header)") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a safetensors file (bad header)")
    return header, 8 + length, size


def read_metadata(path: Path) -> dict[str, str]:
    """The free text that a safetensors file carries beside its tensors; {} if there is none.

    Raises:
      UserError: missing, or not a safetensors file.
    """
    metadata = _read_header(path)[0].get("__metadata__")
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return {name: text for name, text in texts if isinstance(text, str)}


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, from its header alone; nothing is read beyond it.

    Raises:
      UserError: missing, not a safetensors file, truncated, or with an inconsistent header (overlapping tensors, say).
    """
    header, start, size = _read_header(path)
    stated = _stated(header)
    tensors: dict[str, Tensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
            sound = sound and isinstance(code, str)
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{path}: bad header entry for tensor {name!r}") from None
        if not sound:
            raise UserError(f"{path}: bad header entry for tensor {name!r}")
        if start + end > size:
            raise UserError(f"{path}: truncated, {size} of at least {start + end} bytes; download it again")
        if code in DTYPES and end - begin != math.prod(shape) * DTYPES[code].itemsize:
            raise UserError(
                f"{path}: tensor {name!r} of shape {list(shape)} {code} does not fill its {end - begin} bytes"
            )
        tensors[name] = Tensor(path, name, code, shape, start + begin, stated.get(name))
        ranges.append((begin, end, name))
    ranges.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(ranges):
        if begin < end:
            raise UserError(f"{path}: tensors {name!r} and {other!r} overlap in the file; it is damaged")
    return tensors


def _stated(header: Mapping[str, Any]) -> dict[str, Stated]:
    """The fingerprint of each tensor by name, where this program wrote the file."""
    names = sorted(name for name in header if name != "__metadata__")
    metadata = header.get("__metadata__")
    metadata = metadata if isinstance(metadata, dict) else {}
    text, width = metadata.get(_HASHES), 16
    if isinstance(text, str):
        layout, text = text[:32], text[32:]
        if layout != _layout(header):
            return dict.fromkeys(names, Stated(None))
    else:
        text, width = metadata.get(_SUMS), 8
    if not isinstance(text, str) or not re.fullmatch(rf"[0-9a-f]{{{width * len(names)}}}", text):
        return {}
    return {name: Stated(text[width * index : width * (index + 1)]) for index, name in enumerate(names)}


def _layout(header: Mapping[str, Any]) -> str:
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return digest({n: [e.get("dtype"), e.get("shape")] if isinstance(e, dict) else e for n, e in entries.items()})


def write_tensors(
    path: Path,
    entries: list[tuple[str, np.dtype, tuple[int, ...], Callable[[], Any]]],
    on_bytes: Callable[[int], object] = lambda count: None,
    metadata: Mapping[str, str] | None = None,
    *,
    hashes: bool = True,
) -> None:
    """Write one safetensors file, holding one tensor in memory at a time.

    Args:
      path: the file.
      entries: (name, dtype, shape, function that returns the array when it is its turn).
      on_bytes: called with the bytes of every tensor written (progress).
      metadata: free text for the header; see :func:`read_metadata`.
      hashes: put the hash of each tensor into the metadata, which reads are compared with.
    """
    header: dict[str, Any] = {}
    offset, found = 0, {}
    for name, dtype, shape, _ in entries:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    stated = {_HASHES: _layout(header) + "0" * 16 * len(entries)} if hashes else {}  # filled in at the end
    header = {"__metadata__": {"format": "pt", MARK: "1", **stated, **(metadata or {})}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the library pads too: aligned data can be mapped
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape, make in entries:
            array = np.ascontiguousarray(make())
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype}{array.shape}, announced as {dtype}{shape}")
            stream.write(array.reshape(-1).view(np.uint8).data)
            if hashes:
                found[name] = array_digest(array)
            on_bytes(array.nbytes)
        if hashes:
            stream.seek(8 + text.index(_HASHES.encode()) + len(f'{_HASHES}":"') + 32)
            stream.write("".join(found[name] for name in sorted(found)).encode())
        stream.flush()
        os.fsync(stream.fileno())

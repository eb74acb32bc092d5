"""The GGUF container with bounded memory: metadata and tensor table from the header, rows of a tensor dequantised.

Layout (little-endian): ``GGUF``, u32 version, u64 tensors, u64 metadata entries; the entries (key, type, value); the
tensor table (name, dimensions, type, offset); padding; data. The header is parsed here and not by ``gguf.GGUFReader``,
which maps the whole file (mapped pages count as memory of the process), takes seconds for a large vocabulary, and
answers a damaged file with whatever NumPy raises. What is quantised how comes from the ``gguf`` package alone.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lawcat_jax.errors import UserError

MAGIC = b"GGUF"
BLOCK_BYTES = 8 << 20  # of one dequantised piece: the gguf package needs about four times as much for a while
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_STRUCT_LIMIT = 1 << 40  # dimensions and counts beyond this are damage


class GgufFile:
    """The header of a GGUF file.

    Attributes: ``path``; ``metadata`` (key -> int, float, bool, str or list); ``tensors`` (name -> :class:`GgufTensor`).

    Raises:
      UserError: the ``gguf`` package is missing, or the file is not GGUF, truncated, damaged, of another version, one
        part of several, or holds a tensor of a type that the package does not dequantise.
    """

    def __init__(self, path: Path):
        self.path = path
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"{path}: reading GGUF files needs the gguf package: pip install gguf")
        try:
            size = path.stat().st_size
            with open(path, "rb") as stream:
                reader = _Reader(path, stream, size)
                self.metadata: dict[str, Any] = {}
                entries = self._head(reader)
                self._read_metadata(reader, entries[1])
                table = [self._read_entry(reader) for _ in range(entries[0])]
                start = reader.position
        except OSError as problem:
            raise UserError(f"cannot read {path}: {problem.strerror or problem}") from None
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise UserError(
                f"{path}: one part of {self.metadata['split.count']}; join them first with llama.cpp's "
                "llama-gguf-split --merge"
            )
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise UserError(f"{path}: damaged (general.alignment is {alignment!r})")
        start += -start % alignment
        self.tensors: dict[str, GgufTensor] = {}
        known: dict[int, Kind] = {}
        for name, shape, code, offset in table:
            if name in self.tensors:
                raise UserError(f"{path}: damaged (tensor {name!r} is listed twice)")
            tensor = GgufTensor(path, name, shape, _kind(path, name, code, known), start + offset)
            if tensor.end > size:
                raise UserError(
                    f"{path}: truncated, {size} of at least {tensor.end} bytes (ends within {name}); download it again"
                )
            self.tensors[name] = tensor

    def _head(self, reader: _Reader) -> tuple[int, int]:
        if reader.size < 24 or reader.read(4) != MAGIC:
            raise UserError(f"{self.path}: not a GGUF file")
        version = reader.scalar("I")
        if version not in _VERSIONS:
            other = " (big-endian)" if version & 0xFFFF == 0 else ""
            raise UserError(f"{self.path}: GGUF version {version}{other}; supported: 2 and 3, little-endian")
        return reader.scalar("Q"), reader.scalar("Q")

    def _read_metadata(self, reader: _Reader, count: int) -> None:
        for _ in range(count):
            key = reader.string()
            self.metadata[key] = reader.value(reader.scalar("I"))

    def _read_entry(self, reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
        name = reader.string()
        dimensions = reader.scalar("I")
        if not 1 <= dimensions <= 4:
            raise UserError(f"{self.path}: damaged (tensor {name!r} has {dimensions} dimensions)")
        shape = tuple(reader.scalar("Q") for _ in range(dimensions))[::-1]  # GGUF lists the fastest axis first
        code, offset = reader.scalar("I"), reader.scalar("Q")
        if not 0 < math.prod(shape) < _STRUCT_LIMIT or offset > reader.size:
            raise UserError(
                f"{self.path}: damaged or truncated (tensor {name!r}: shape {list(shape)}, offset {offset})"
            )
        return name, shape, code, offset


class GgufTensor:
    """One tensor in a GGUF file, with the interface of :class:`lawcat_jax.checkpoints.hf.tensors.Tensor`.

    ``dtype`` is what reads give: that of the file for F32, F16 and BF16, float32 for everything quantised. ``heads`` is
    the number of heads whose rows llama.cpp interleaved for its rotary embedding (None: as in Hugging Face); reads give
    rows in the order of Hugging Face.
    """

    def __init__(self, file: Path, name: str, shape: tuple[int, ...], kind: Kind, offset: int):
        self.file, self.name, self.shape, self.code = file, name, shape, kind.name
        self.dtype = kind.dtype
        self.heads: int | None = None
        self._kind, self._offset = kind, offset
        self._width = math.prod(shape[1:])  # elements of one row; a vector has rows of one element
        run = self._width if len(shape) > 1 else math.prod(shape)
        if run % kind.block:
            raise UserError(
                f"{file}: damaged (rows of {name}, {run} elements, are no multiple of {kind.block}, {kind.name})"
            )

    @property
    def nbytes(self) -> int:
        """Bytes after dequantisation."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Offset in the file of the first byte after this tensor."""
        return self._offset + math.prod(self.shape) // self._kind.block * self._kind.bytes

    def part(self, start: int, stop: int) -> GgufTensor:
        """Rows [start, stop) of axis 0 as a tensor of their own; whole heads where rows are interleaved."""
        if (start, stop) == (0, self.shape[0]):
            return self
        part = copy.copy(self)
        part.shape = (stop - start, *self.shape[1:])
        part._offset += start * self._width // self._kind.block * self._kind.bytes
        if self.heads is not None:
            part.heads = self.heads * (stop - start) // self.shape[0]
        return part

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [start, stop) of axis 0, written into ``out`` (C-contiguous, same dtype) when given."""
        if out is None:
            out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        done = 0
        for first, block in self.blocks(start, stop):
            place = out[first - start : first - start + len(block)]
            word = np.dtype(f"u{self.dtype.itemsize}")  # as raw words: NumPy moves bfloat16 element by element
            place.view(word)[...] = block.view(word)
            done += len(block)
        assert done == stop - start
        return out

    def blocks(self, start: int, stop: int) -> Iterable[tuple[int, np.ndarray]]:
        """(first row, rows) of [start, stop) in pieces of about :data:`BLOCK_BYTES`."""
        if len(self.shape) == 1:  # a vector is small, and may be quantised across its elements
            yield start, self._ordered(0, self.shape[0])[start:stop]
            return
        step = max(1, BLOCK_BYTES // max(1, self._width * 4))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            yield first, self._ordered(first, last)

    def _ordered(self, start: int, stop: int) -> np.ndarray:
        """Rows in the order of Hugging Face.

        Its rotary embedding pairs rows (i, i + d/2) of a head of d rows; llama.cpp's, for Llama, pairs (2 i, 2 i + 1).
        """
        if self.heads is None:
            return self._stored(start, stop)
        size = self.shape[0] // self.heads
        low, high = start // size * size, -(-stop // size) * size
        stored = self._stored(low, high)
        pairs = stored.reshape(-1, size // 2, 2, *self.shape[1:])
        return pairs.swapaxes(1, 2).reshape(stored.shape)[start - low : stop - low]

    def _stored(self, start: int, stop: int) -> np.ndarray:
        if len(self.shape) == 1:
            start, stop, shape = 0, 1, self.shape
            run = self.shape[0]
        else:
            shape, run = (stop - start, *self.shape[1:]), self._width
        row_bytes = run // self._kind.block * self._kind.bytes
        raw = np.empty((stop - start) * row_bytes, np.uint8)
        try:
            with open(self.file, "rb", buffering=0) as stream:
                stream.seek(self._offset + start * row_bytes)
                done = 0
                while done < raw.size:
                    count = stream.readinto(raw.data[done:])
                    if not count:
                        raise UserError(f"{self.file}: ends within tensor {self.name} (truncated)")
                    done += count
        except OSError as problem:
            raise UserError(f"cannot read {self.file}: {problem.strerror or problem}") from None
        if self._kind.plain:
            return raw.view(self.dtype).reshape(shape)
        return self._kind.dequantise(raw.reshape(stop - start, row_bytes)).reshape(shape)


class Kind(NamedTuple):
    """How the numbers of a tensor are stored: ``block`` of them in ``bytes`` bytes."""

    name: str
    block: int
    bytes: int
    code: Any  # gguf.GGMLQuantizationType

    @property
    def plain(self) -> bool:
        """True for numbers of ``dtype`` one after another."""
        return self.name in _PLAIN

    @property
    def dtype(self) -> np.dtype:
        """Of the numbers once they are read."""
        return _PLAIN.get(self.name, np.dtype(np.float32))

    def dequantise(self, raw: np.ndarray) -> np.ndarray:
        """uint8 [rows, bytes of a row] -> float32 [rows, elements of a row].

        Raises:
          NotImplementedError: the gguf package does not know how.
        """
        from gguf import quants

        return quants.dequantize(raw, self.code)


def _kind(path: Path, name: str, code: int, known: dict[int, Kind]) -> Kind:
    """The type that the tensor table calls ``code``, remembered in ``known``."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if code in known:
        return known[code]
    try:
        found = GGMLQuantizationType(code)
    except ValueError:
        raise UserError(
            f"{path}: tensor {name} has the unknown type {code}; a newer gguf package may know it"
        ) from None
    kind = Kind(found.name, *GGML_QUANT_SIZES[found], found)
    try:
        if not kind.plain:
            kind.dequantise(np.zeros((1, kind.bytes), np.uint8))
    except NotImplementedError:
        raise UserError(f"{path}: tensor {name} is {kind.name}, which the gguf package cannot dequantise") from None
    known[code] = kind
    return kind


class _Reader:
    """Numbers and strings of a header, each checked against the end of the file."""

    def __init__(self, path: Path, stream: Any, size: int):
        self.path, self.size, self.position = path, size, 0
        self._stream = stream

    def read(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise UserError(f"{self.path}: truncated within the header ({self.size} bytes); download it again")
        self.position += count
        data = self._stream.read(count)
        if len(data) < count:
            raise UserError(f"{self.path}: truncated within the header; download it again")
        return data

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.read(struct.calcsize(code)))[0]

    def string(self) -> str:
        # Some vocabularies hold pieces of characters; they can be told apart this way and written back unchanged.
        return self.read(self.scalar("Q")).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise UserError(f"{self.path}: damaged (metadata of the unknown type {kind})")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            data = self.read(count * struct.calcsize(code))
            return list(struct.unpack(f"<{count}{code}", data))
        if inner == _STRING:
            return [self.string() for _ in range(count)]  # ends at the end of the file at the latest
        raise UserError(f"{self.path}: damaged (an array of the unsupported type {inner})")

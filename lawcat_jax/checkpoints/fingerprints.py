"""Fingerprints of what is stored: of single arrays, wherever they lie, of JSON values, and of small files.

Arrays have two kinds: a hash, and a weighted sum, which earlier versions wrote. The sum sees damage, but not every exchange of
elements nor an even number of changed signs in float32.

``LAWCAT_VERIFY_WEIGHTS=off`` in the environment skips the check of arrays when they are read, which takes about two seconds a
gigabyte; it is on by default.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_jax.errors import UserError

SWITCH = "LAWCAT_VERIFY_WEIGHTS"
_BLOCK = 1 << 22  # elements summed at once on the host
_PIECE = 1 << 16  # elements hashed at once by a thread: they stay in its cache
_THREADS = min(8, os.cpu_count() or 1)


def wanted() -> bool:
    """Whether arrays are checked when they are read.

    Raises:
      UserError: the switch in the environment is neither ``on`` nor ``off``.
    """
    value = os.environ.get(SWITCH, "on")
    if value not in ("on", "off"):
        raise UserError(f"{SWITCH}={value!r} in the environment should be on or off")
    return value == "on"


def fingerprint(array: Any) -> int:
    """Of a numpy or jax array of 1, 2 or 4 bytes an element: the sum of element bits times (2 i + 1) modulo 2^32, where i
    is the element's position in C order.

    Every weight is odd, so a change of any one element changes the sum. The order of summation does not matter: an array
    split over devices has the same fingerprint as on the host. float64 and int64 are refused with TypeError.
    """
    if array.dtype.itemsize not in (1, 2, 4):
        raise TypeError(f"no fingerprint for {array.dtype}")
    return _on_host(array) if isinstance(array, np.ndarray) else int(_program()(array))


def fingerprint_part(array: np.ndarray, first: int) -> int:
    """What elements ``first``, ``first`` + 1, ... add to the fingerprint of the whole array, modulo 2^32."""
    return _on_host(array, first)


def _on_host(array: np.ndarray, first: int = 0) -> int:
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    weights = np.arange(1, 2 * min(_BLOCK, bits.size) + 1, 2, dtype=np.uint32)
    total = 0
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK].astype(np.uint32)
        total += int(np.dot(block, weights[: block.size])) + 2 * (first + start) * int(np.sum(block, dtype=np.uint32))
    return total % (1 << 32)


@functools.cache
def _program() -> Any:
    import jax
    import jax.numpy as jnp

    def summed(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        place = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size % (1 << 32)) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.jit(summed)


def array_digest(array: Any) -> str:
    """The :func:`~lawcat_jax.runtime.array_hash.array_hash` of a numpy or jax array in 16 hex digits; on the host several
    threads make it."""
    words = _hash_on_host(array) if isinstance(array, np.ndarray) else np.asarray(_hash_program()(array)).tolist()
    return hash_digits(words)


def hash_part(array: np.ndarray, first: int) -> tuple[int, int]:
    """What elements ``first``, ``first`` + 1, ... of 1, 2 or 4 bytes add to the two words of the hash of the whole array, modulo
    2^32."""
    words = _hash_on_host(array, first)
    return words[0], words[1]


def hash_digits(words: Iterable[int]) -> str:
    """The two words of a hash in 16 hex digits."""
    return "".join(f"{word % (1 << 32):08x}" for word in words)


def _hash_on_host(array: np.ndarray, first: int = 0) -> list[int]:
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{min(array.dtype.itemsize, 4)}")
    blocks = range(0, bits.size, _BLOCK)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        parts = list(threads.map(lambda start: _hash_block(bits[start : start + _BLOCK], first + start), blocks))
    return [sum(part[word] for part in parts) % (1 << 32) for word in (0, 1)]


def _hash_block(bits: np.ndarray, first: int) -> tuple[int, int]:
    """What the elements of ``bits``, the first of which is element ``first`` of the array, add to the two words."""
    from lawcat_jax.runtime.array_hash import FACTORS, GOLDEN

    totals = [0, 0]
    size = min(_PIECE, bits.size)
    places, buffers = np.arange(size, dtype=np.uint32), np.empty((3, size), np.uint32)
    start = 0
    while start < bits.size:
        high, low = divmod(first + start, 1 << 32)
        piece = bits[start : start + min(_PIECE, (1 << 32) - low)]  # up to where the upper half of the index changes
        start += piece.size
        key, word, spare = (buffer[: piece.size] for buffer in buffers)
        np.add(places[: piece.size], np.uint32((low + GOLDEN) % (1 << 32)), out=key)
        key ^= _mixed(np.full(1, high, np.uint32), np.empty(1, np.uint32))
        _mixed(key, spare)
        np.bitwise_xor(key, piece, out=word)
        totals[0] += int(np.sum(_mixed(word, spare), dtype=np.uint32))
        np.multiply(piece, np.uint32(FACTORS[0]), out=word, dtype=np.uint32)
        key *= np.uint32(FACTORS[1])
        word += key
        totals[1] += int(np.sum(_mixed(word, spare), dtype=np.uint32))
    return totals[0], totals[1]


def _mixed(x: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """As the function of this name in :mod:`lawcat_jax.runtime.array_hash`, in place."""
    from lawcat_jax.runtime.array_hash import ROUNDS

    for shift, factor in ROUNDS:
        x ^= np.right_shift(x, np.uint32(shift), out=spare)
        x *= np.uint32(factor)
    x ^= np.right_shift(x, np.uint32(16), out=spare)
    return x


@functools.cache
def _hash_program() -> Any:
    import jax

    from lawcat_jax.runtime.array_hash import array_hash

    return jax.jit(array_hash)


def same_as_stated(array: Any, stated: Mapping[str, Any]) -> bool:
    """Whether an array has the ``hash`` or, of an earlier version, the ``sum`` that is stated of it, or none is."""
    if "hash" in stated:
        return array_digest(array) == stated["hash"]
    return "sum" not in stated or fingerprint(array) == stated["sum"]


def digest(value: Any) -> str:
    """32 hex digits of JSON values, the same before they are written and after they are read."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_digests(directory: Path, but: Collection[str]) -> dict[str, str]:
    """SHA-256 of every file of a directory by name, in 64 hex digits, but for those named in ``but``; {} where there is no
    directory.

    Raises:
      OSError: a file cannot be read.
    """
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    files = [file for file in files if file.is_file() and file.name not in but]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def check_files(directory: Path, stated: Mapping[str, Any], remedy: str) -> None:
    """Compare the files of a directory with :func:`file_digests` of when they were written; further files may be there.

    Raises:
      UserError: one is missing, unreadable or has changed; the message ends with ``remedy``.
    """
    for name, digest in stated.items():
        path = directory / Path(str(name)).name
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        except OSError as problem:
            raise UserError(f"cannot read {path}: {problem.strerror or problem}") from None
        if found != digest:
            how = "is missing" if found is None else "has changed since it was written"
            raise UserError(f"{path} {how}: restore a copy or convert again; {remedy}")

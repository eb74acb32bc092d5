"""Text sources, and their tokens as one flat random-access array that is cut into training sequences.

A source is read once: its documents are tokenized in order, an eos token closes each, and the ids go to a
cache file (2 or 4 bytes a token) that is checked and memory-mapped from then on. So a sequence is read in O(1) at any
position, memory stays small whatever the size of the source, and a resumed or repeated run starts at once.
Local files are taken whole. Remote sources (``hf:``, ``tfds:``) are read in their stored order until there
are enough tokens for ``num_samples`` sequences: raise that number to see more of a large corpus.

A file of the cache (:mod:`lawcat_jax.data.token_cache`) is named by the tokenizer and the contents of the source's files, a
remote source by its name: a changed hub dataset needs an emptied cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from lawcat_jax.data import token_cache
from lawcat_jax.data.cutting import PIECE, cutter
from lawcat_jax.data.documents import documents
from lawcat_jax.data.source_files import digests, files_here, is_remote
from lawcat_jax.data.tokenize import Tokenizer, check_ids, encode_many, fingerprint
from lawcat_jax.errors import UserError

_BATCH = 32  # pieces a call, encoded in parallel
_VERSION = 3  # raised when the same text gives other tokens than before, so that the cache's are not taken for them


def token_chunks(source: str, tokenizer: Tokenizer, text_key: str) -> Iterator[np.ndarray]:
    """Token ids of a source in order, int64 arrays; an eos id (if the tokenizer has one) closes each document."""
    cut = cutter(tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pending: list[tuple[str, bool]] = []

    def drain() -> np.ndarray:
        encoded = encode_many(tokenizer, [piece for piece, _ in pending])
        ids = [ids + (eos if last else []) for ids, (_, last) in zip(encoded, pending, strict=True)]
        pending.clear()
        return np.concatenate([np.asarray(part, np.int64) for part in ids])

    for document in documents(source, text_key):
        pieces = cut(document)
        for number, piece in enumerate(pieces, 1):
            pending.append((piece, number == len(pieces)))
            if len(pending) == _BATCH or len(piece) > _BATCH * PIECE:
                yield drain()
    if pending:
        yield drain()


def load_tokens(
    source: str, tokenizer: Tokenizer, *, text_key: str = "text", max_tokens: int | None = None
) -> np.ndarray:
    """All tokens of a source (the first ``max_tokens`` of it), as a flat read-only array, uint16 or int32.

    Tokenizes at the first call and memory-maps the cached result afterwards; a damaged cache file is made again, with one
    line. Where the cache cannot be written the array is held in memory.

    Raises:
      UserError: see :func:`documents`; also when the source has no tokens, or one beyond the model's embedding, and when its files
        change while they are read.
    """
    facts: list[Any] = [_VERSION, source if is_remote(source) else "", text_key, max_tokens, fingerprint(tokenizer)]
    stamps = _stamps(source)
    facts += stamps
    largest_id = max(tokenizer.get_vocab().values(), default=0)  # a vocabulary may have gaps, so its size says less
    dtype = np.dtype(np.uint16 if largest_id < 1 << 16 else np.int32)
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:32] + f".{dtype.name}.tokens"
    cached = token_cache.directory() / name

    def chunks() -> Iterator[np.ndarray]:
        yield from _limited(token_chunks(source, tokenizer, text_key), max_tokens)
        if _stamps(source) != stamps:  # the cache would give these tokens to whoever reads the files as they were
            raise UserError(
                f"text source {source!r}: its files changed while they were read; run it again when they are written"
            )

    try:
        try:
            tokens, largest = token_cache.open_tokens(cached, dtype)
        except (token_cache.DamagedCacheError, FileNotFoundError) as problem:
            if not isinstance(problem, FileNotFoundError):
                print(f"token cache {cached} is damaged ({problem}): tokenizing {source} again", flush=True)
            token_cache.write_tokens(cached, dtype, chunks())
            if not cached.is_file():
                raise _no_text(source) from None
            tokens, largest = token_cache.open_tokens(cached, dtype)
    except (OSError, token_cache.DamagedCacheError) as problem:
        if not isinstance(problem, NotADirectoryError | PermissionError):  # a cache that nobody may write is no fault
            reason = getattr(problem, "strerror", None) or problem
            print(
                f"token cache {cached} cannot be used ({reason}): the tokens of {source} are kept in memory", flush=True
            )
        tokens = np.concatenate([chunk.astype(dtype) for chunk in chunks()] or [np.zeros(0, dtype)])
        if not len(tokens):
            raise _no_text(source) from None
        largest = int(tokens.max())
    check_ids(tokenizer, largest, f"text source {source!r}")
    return tokens


def _stamps(source: str) -> list[list[str]]:
    """[suffix, digest] of each file on this machine of a source."""
    files = files_here(source)
    return [[file.suffix, digest] for file, digest in zip(files, digests(files), strict=True)]


def _limited(chunks: Iterator[np.ndarray], limit: int | None) -> Iterator[np.ndarray]:
    left = limit
    for chunk in chunks:
        if left is None:
            yield chunk
            continue
        yield chunk[:left]
        left -= len(chunk)
        if left <= 0:
            return


def _no_text(source: str) -> UserError:
    return UserError(f"text source {source!r}: it holds no text")


class PackedText:
    """Fixed-length sequences over a flat token array: ``len()`` of them, each int32 [seq_length + 1].

    With ``bos_id`` every sequence is bos and ``seq_length`` tokens, else ``seq_length`` + 1 tokens that overlap
    by one; either way each token is predicted once. A remainder shorter than a sequence is dropped.

    Raises:
      UserError: when the tokens do not fill one sequence.
    """

    def __init__(self, tokens: np.ndarray, seq_length: int, *, bos_id: int | None, source: str = ""):
        self._tokens, self._seq_length, self._bos_id = tokens, seq_length, bos_id
        self._length = (len(tokens) - (bos_id is None)) // seq_length
        if self._length < 1:
            raise UserError(
                f"text source {source!r}: {len(tokens)} tokens do not fill one sequence of {seq_length}; "
                "give more text or a smaller seq_length"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._seq_length
        if self._bos_id is None:
            return np.asarray(self._tokens[start : start + self._seq_length + 1], np.int32)
        window = np.empty(self._seq_length + 1, np.int32)
        window[0], window[1:] = self._bos_id, self._tokens[start : start + self._seq_length]
        return window

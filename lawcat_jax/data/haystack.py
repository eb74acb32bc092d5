"""Haystacks: the text that hides a needle or facts. RULER's noise, or essays and books from any text source.

A haystack is read once into memory. Each has a name that results quote, as accuracy depends on it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lawcat_jax.data.documents import documents as read_documents
from lawcat_jax.data.sentences import split_sentences
from lawcat_jax.data.source_files import is_remote
from lawcat_jax.errors import UserError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_TEXT_KEYS = {"tfds:pg19": "book_text"}  # fields of the text where they are not called "text"
_REMOTE_CHARACTERS = 64_000_000  # of a hub or TFDS source: all of PG-19 would not fit into memory


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Documents of running text. ``name`` says which, for results.

    Raises (in :meth:`words`, :meth:`passage`):
      UserError: when there is too little text for what is asked.
    """

    name: str
    documents: tuple[str, ...]

    @functools.cached_property
    def word_list(self) -> list[str]:
        """All documents' words in order, split at white space."""
        return [word for document in self.documents for word in document.split()]

    def words(self, count: int) -> str:
        """The first ``count`` words joined by single spaces (RULER's essay haystack)."""
        if count > len(self.word_list):
            raise UserError(
                f"haystack {self.name!r} has {len(self.word_list)} words, {count} are needed: give more text"
            )
        return " ".join(self.word_list[:count])

    def passage(self, rng: np.random.Generator, characters: int) -> list[str]:
        """Whole sentences from a random place of a random document (chosen by its length), about ``characters`` long.

        White space within a sentence becomes single spaces; the first and last sentence of the window, which may be
        cut, are dropped. Where one document is too short the passage goes on in others.
        """
        if sum(self._sizes) < 200:
            raise UserError(f"haystack {self.name!r} has too little text to draw passages from")
        sentences: list[str] = []
        left = characters
        for _ in range(10_000):
            if left <= 0:
                return sentences
            document = self.documents[int(rng.choice(len(self.documents), p=self._shares))]
            start = int(rng.integers(max(1, len(document) - min(left, len(document) // 2))))
            window = document[start : start + left + 400]
            found = [" ".join(sentence.split()) for sentence in split_sentences(window)[1:-1]]
            sentences += found
            left -= sum(len(sentence) + 1 for sentence in found)
        raise UserError(f"haystack {self.name!r} gives no sentences: is it running text?")

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [len(document) for document in self.documents]

    @functools.cached_property
    def _shares(self) -> np.ndarray:
        sizes = np.asarray(self._sizes, float)
        return sizes / sizes.sum()


@functools.lru_cache(maxsize=8)
def load_haystack(source: str | tuple[str, ...], text_key: str = "") -> Haystack:
    """The haystack of a source: a directory, file or glob (several as a tuple), ``hf:<name>[:config][:split]`` or
    ``tfds:<name>[:split]`` (``tfds:pg19:test``). ``text_key`` is the field of the text, "" the usual one of the source. Of a
    remote source the first 64 million characters are taken.

    Raises:
      UserError: when the source cannot be read or holds no text.
    """
    sources: Sequence[str] = (source,) if isinstance(source, str) else source
    if not sources or not all(sources):
        raise UserError("haystack: name a text source (a directory or file, hf:..., or tfds:...)")
    documents: list[str] = []
    for one in sources:
        limit = _REMOTE_CHARACTERS if is_remote(one) else None
        taken = 0
        key = text_key or _TEXT_KEYS.get(":".join(one.split(":")[:2]), "text")
        for document in read_documents(one, key):
            documents.append(document if limit is None else document[: limit - taken])
            taken += len(documents[-1])
            if limit is not None and taken >= limit:
                break
    if not any(document.strip() for document in documents):
        raise UserError(f"haystack {source!r}: it holds no text")
    return Haystack("+".join(source_name(one) for one in sources), tuple(documents))


def source_name(source: str) -> str:
    """The name that results quote: a remote source as it is written, the stem of a file, the last two parts of the path
    of a directory."""
    if is_remote(source):
        return source
    path = Path(source)
    if path.suffix:
        return path.stem
    return re.sub(r"^[./]+", "", "/".join(path.parts[-2:])) or str(path)

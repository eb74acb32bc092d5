"""Long samples cut into pieces that follow each other from batch to batch, for training with passed states.

Row b of batch i + 1 continues row b of batch i until its sample is finished; ``continues`` [B] says so for each row.
Which piece stands where follows from the batch's number alone: a row's time is divided into cycles of ``pieces``
batches, shifted from row to row, and each cycle is filled with samples of random numbers of pieces.
"""

from __future__ import annotations

import functools

import numpy as np

from lawcat_jax.data.rows import Row, make_row
from lawcat_jax.data.samples import sample_rng
from lawcat_jax.data.sources import Document, InstructionSource, Source, TextSource
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError


def cut(document: Document, pieces: int, seq_length: int, rng: np.random.Generator) -> list[int]:
    """Where the pieces begin and the last one ends: ``pieces`` + 1 increasing token positions, at most ``seq_length``
    apart.

    A document of at most (pieces - 1) * seq_length tokens with a needle and a question has its last cut at a random place
    between the two, so that they are never in the same piece. A text is cut every ``seq_length`` tokens.
    """
    size = len(document.tokens)
    if pieces == 1:
        return [0, size]
    if not document.question_start:
        return [*range(0, size, seq_length), size]
    last = int(rng.integers(max(document.needle_end, size - seq_length), document.question_start + 1))
    last = max(last, pieces - 1)
    return [*(round(part * last / (pieces - 1)) for part in range(pieces - 1)), last, size]


class PieceStream:
    """Rows of an endless ordered stream: element ``step * batch_size + row`` is row ``row`` of batch ``step``.

    Args:
      sources: (share, source) of each kind of data.
      pieces: the most pieces of a sample, at least 2. Samples have (pieces - 1) * seq_length tokens or fewer; rows of a
        single piece occur too.

    Raises:
      UserError: when a text is shorter than ``pieces`` sequences.
    """

    def __init__(
        self,
        sources: list[tuple[float, Source]],
        tokenizer: Tokenizer,
        *,
        pieces: int,
        seq_length: int,
        batch_size: int,
        seed: int,
    ):
        for _, source in sources:
            if isinstance(source, TextSource) and len(source) < pieces:
                raise UserError(
                    f"pieces {pieces}: the text has only {len(source)} sequences of {seq_length} tokens; give more text"
                )
        shares = np.asarray([share for share, _ in sources], float)
        self._sources, self._shares = [source for _, source in sources], shares / shares.sum()
        self._tokenizer, self._pieces, self._seq_length = tokenizer, pieces, seq_length
        self._batch_size, self._seed = batch_size, seed
        self._made = functools.lru_cache(maxsize=4 * batch_size)(self._make)
        self._planned = functools.lru_cache(maxsize=4 * batch_size)(self._plan)

    def __len__(self) -> int:
        return 2**48

    def __getitem__(self, element: int) -> Row:
        """The arrays of :func:`lawcat_jax.data.pipeline.make_dataset` and ``continues``, a bool."""
        step, row = divmod(element, self._batch_size)
        start, pieces = self._sample_at(step, row)
        source, document, cuts = self._made(row, start, pieces)
        piece = step - start
        if isinstance(source, InstructionSource):  # too short to cut: every piece is a conversation of its own
            rng = sample_rng("train", self._seed, element)
            document = source.document(int(rng.integers(len(source))))
            return make_row(document, self._seq_length, self._tokenizer) | {"continues": np.asarray(False)}
        begin, end = cuts[piece], cuts[piece + 1]
        part = Document(
            document.tokens[begin : end + 1], document.weights[begin : end + 1], kl_weight=document.kl_weight
        )
        arrays = make_row(part, self._seq_length, self._tokenizer, inputs=end - begin)
        return arrays | {"continues": np.asarray(piece > 0)}

    def _sample_at(self, step: int, row: int) -> tuple[int, int]:
        """(batch in which it began, pieces) of the sample that row ``row`` shows in batch ``step``."""
        shift = row * self._pieces // self._batch_size  # rows begin new samples at different steps
        cycle, offset = divmod(step + shift, self._pieces)
        for first, pieces in self._planned(row, cycle, shift if cycle == 0 else 0):
            if first <= offset < first + pieces:
                return cycle * self._pieces + first - shift, pieces
        raise AssertionError("samples fill a cycle")

    def _plan(self, row: int, cycle: int, first: int) -> list[tuple[int, int]]:
        """(offset, pieces) of the samples of a cycle from offset ``first`` on."""
        rng = np.random.default_rng([self._seed % 2**64, 2, row, cycle])
        plan, at = [], first
        while at < self._pieces:
            left = self._pieces - at
            pieces = int(rng.integers(min(2, left), left + 1))
            plan.append((at, pieces))
            at += pieces
        return plan

    def _make(self, row: int, start: int, pieces: int) -> tuple[Source, Document, list[int]]:
        index = start * self._batch_size + row
        rng = sample_rng("train", self._seed, index)
        source = self._sources[int(rng.choice(len(self._sources), p=self._shares))]
        if isinstance(source, InstructionSource):
            return source, source.document(0), [0]
        whole = pieces if pieces == 1 or isinstance(source, TextSource) else pieces - 1
        document = source.long_document(index, whole * self._seq_length)
        return source, document, cut(document, pieces, self._seq_length, rng)

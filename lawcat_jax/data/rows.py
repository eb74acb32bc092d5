"""Rows of a batch from documents: one document a row, or several packed into it."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence

import numpy as np

from lawcat_jax.data.sources import Document
from lawcat_jax.data.tokenize import Tokenizer, pad_id

Row = dict[str, np.ndarray]
"""The arrays of a :class:`~lawcat_jax.data.batch.Batch` without its axis B, optional ones included."""

_OPEN_ROWS = 64  # rows that wait for another document while packing


def make_row(document: Document, seq_length: int, tokenizer: Tokenizer, *, inputs: int | None = None) -> Row:
    """A document padded on the right, as the arrays of :func:`lawcat_jax.data.pipeline.make_dataset` for one row.

    Its first ``inputs`` tokens (default: as many as fit) are the row's inputs; a token after them is a target only.
    """
    tokens, weights = document.tokens, document.weights
    inputs = min(len(tokens), seq_length) if inputs is None else inputs
    targets, loss_weights = tokens[1 : inputs + 1], weights[1 : inputs + 1]
    if len(targets) < inputs:  # nothing follows the last token
        targets, loss_weights = np.append(targets, pad_id(tokenizer)), np.append(loss_weights, 0.0)
    kl_weights = loss_weights * np.float32(document.kl_weight)
    return _arrays(tokens[:inputs], targets, loss_weights, kl_weights, seq_length, tokenizer)


def join_rows(documents: Sequence[Document], seq_length: int, tokenizer: Tokenizer) -> Row:
    """Several documents in a row, with ``segment_ids`` int32 [seq_length]: 1, 2, ... for them, 0 for padding.

    Where a document joins several texts each is a segment. The first token of a segment is no label.
    """
    if len(documents) == 1:
        row = make_row(documents[0], seq_length, tokenizer)
    else:
        parts = [make_row(document, len(document.tokens), tokenizer) for document in documents]
        names = ("tokens", "targets", "loss_weights", "kl_weights")
        joined = (np.concatenate([part[name] for part in parts])[:seq_length] for name in names)
        row = _arrays(*joined, seq_length=seq_length, tokenizer=tokenizer)
    length = int(row["lengths"])
    starts, first = np.zeros(seq_length, np.int32), 0
    for document in documents:
        starts[first : first + 1] = 1  # nothing where a document fell off the end
        if document.joined:
            ends = np.flatnonzero(row["tokens"][first:length] == tokenizer.eos_token_id) + first
            row["loss_weights"][ends] = row["kl_weights"][ends] = 0.0
            starts[ends[ends + 1 < length] + 1] = 1
        first += len(document.tokens)
    segments = np.zeros(seq_length, np.int32)
    segments[:length] = np.cumsum(starts[:length])
    return row | {"segment_ids": segments}


def _arrays(
    tokens: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    kl_weights: np.ndarray,
    seq_length: int,
    tokenizer: Tokenizer,
) -> Row:
    length, pad = len(tokens), pad_id(tokenizer)
    fill = functools.partial(np.pad, pad_width=(0, seq_length - length))
    mask = np.ones(length, bool)
    if tokenizer.eos_token_id is not None:
        mask = tokens != tokenizer.eos_token_id
    return {
        "tokens": fill(tokens, constant_values=pad).astype(np.int32),
        "targets": fill(targets, constant_values=pad).astype(np.int32),
        "loss_weights": fill(weights).astype(np.float32),
        "kl_weights": fill(kl_weights).astype(np.float32),
        "lengths": np.asarray(length, np.int32),
        "mask": fill(mask),
    }


def pack(bound: Callable[[int], int], count: int, seq_length: int, seed: int) -> list[list[int]]:
    """Which documents share a row: best fit with 64 open rows, over the documents in a random order that ``seed`` fixes.

    ``bound(i)`` is the most tokens that document i takes. The plan is a pure function of its arguments, so that row i can be
    made at random and a run resumes from one number; grain's packing keeps its open rows in the iterator's state.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    for document in np.random.default_rng([seed % 2**64, 1]).permutation(count).tolist():
        size = min(bound(document), seq_length)
        place = bisect.bisect_left(open_rows, (size, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = seq_length, len(rows)
            rows.append([])
        rows[row].append(document)
        if room > size:
            bisect.insort(open_rows, (room - size, row))
            if len(open_rows) > _OPEN_ROWS:
                open_rows.pop(0)  # the fullest
    return rows

"""The grain pipeline: one random-access dataset of samples, shuffled, sharded by process and batched.

Every sample is a pure function of (data config, tokenizer, seed, index), and the order is a pure function of
the seed. So the iterator's state is one number, the batches taken so far: a run resumes at any step with the
same batches, on any number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import Any

import numpy as np

from lawcat_jax.config import DataConfig
from lawcat_jax.config.data import share_problems
from lawcat_jax.data.pieces import PieceStream
from lawcat_jax.data.rows import Row, join_rows, make_row, pack
from lawcat_jax.data.sample_processes import SampleProcesses
from lawcat_jax.data.source_files import digests, files_here, say_once
from lawcat_jax.data.sources import GeneratedSource, Source, make_source
from lawcat_jax.data.sources import remote_contents as read_remotely
from lawcat_jax.data.teacher_store import TeacherStore
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError


def make_dataset(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    batch_size: int,
    seed: int,
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
    repeat: bool = True,
    teacher: TeacherStore | None = None,
):
    """Batches of one stage, as a ``grain.IterDataset``.

    A batch is a :class:`lawcat_jax.data.batch.Batch` of numpy arrays with B = ``batch_size`` / ``process_count`` and T = ``seq_length``.

    Process p of P takes every P-th sample, so that all processes together see the same global batches
    whatever P is. ``train`` is shuffled anew in each pass, ``validation`` keeps its order. With ``repeat``
    the stream is endless; without, it ends after one pass, and rows of zero weight fill up the last batch. With
    ``data.pieces`` training is an ordered, endless stream (:mod:`lawcat_jax.data.pieces`).

    Iterators have ``get_state()`` and ``set_state()``; the state does not depend on ``process_count``.
    Rows have the teacher's stored logits with ``teacher``, the store of these very samples.
    ``data.num_workers`` threads prepare batches ahead; 0 works in the caller. With ``data.num_processes`` generated
    samples of ``train`` are made in so many processes, and there are at least as many threads, which wait for them.

    Raises:
      UserError: a batch size that ``process_count`` does not divide, a length too short for its samples, or a
        source that cannot be read; while reading, ``teacher`` is of other samples.
    """
    import grain

    if split not in ("train", "validation"):
        raise UserError(f"split {split!r} is not one of 'train', 'validation'")
    if batch_size % process_count:
        raise UserError(f"batch_size {batch_size} is not divisible by the {process_count} processes")
    if data.pieces and split == "train":
        samples = _piece_stream(data, tokenizer, seq_length, batch_size, seed)
        dataset = grain.MapDataset.source(range(len(samples)))
    else:
        samples = Samples(data, tokenizer, seq_length=seq_length, seed=seed, split=split)
        for part in (data, *data.mixture) if split == "validation" else ():
            if part.validation_source:
                _say_overlap(part.source, part.validation_source)
        indices = len(samples) if repeat else math.ceil(len(samples) / batch_size) * batch_size
        dataset = grain.MapDataset.source(range(indices))
        if split == "train":
            dataset = dataset.seed(seed % 2**32).shuffle()
        if repeat:
            dataset = dataset.repeat()
    if process_count > 1:
        dataset = dataset.slice(slice(process_index, None, process_count))
    absent = {"segment_ids", "continues", "kl_weights"} - set(optional_arrays(data, split))

    def row(index: int) -> Row:
        arrays = samples[index]
        stored = {} if teacher is None else teacher.arrays(split, index, arrays)
        return stored | {name: array for name, array in arrays.items() if name not in absent}

    dataset = dataset.map(row).batch(batch_size // process_count, drop_remainder=True)
    workers = max(data.num_workers, data.num_processes)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers))


def optional_arrays(data: DataConfig, split: str = "train") -> tuple[str, ...]:
    """Names of the arrays of a :class:`~lawcat_jax.data.batch.Batch` that batches of this stream have and others do not."""
    parts = [part for _, part in mixture_parts(data)] if data.kind == "mixture" else [data]
    present = {
        "segment_ids": data.pack,
        "continues": bool(data.pieces) and split == "train",
        "kl_weights": any(part.kl_weight != 1 for part in parts),
    }
    return tuple(name for name, here in present.items() if here)


class Samples:
    """Random access to the rows of one split; an index at or beyond ``len()`` gives a row of weight zero.

    The sources follow each other: text before the passkey samples that ``passkey_fraction`` adds, the sources of a mixture
    in their order, each with its share of ``num_samples`` (of validation at most what the source holds out). A source with
    fewer documents repeats them, one with more is seen at even distances. With ``pack`` rows hold several documents.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, *, seq_length: int, seed: int, split: str):
        self._tokenizer, self._seq_length = tokenizer, seq_length
        self._parts = _parts(data, tokenizer, seq_length=seq_length, seed=seed, split=split)
        documents = sum(count for _, count in self._parts)
        if documents < 1:
            raise UserError(f"data: the {split} split has no samples (validation_samples {data.validation_samples})")
        self._plan = pack(self._bound, documents, seq_length, seed) if data.pack else None
        self._length = documents if self._plan is None else len(self._plan)

    def __len__(self) -> int:
        return self._length

    def described(self) -> str:
        """What the rows are made of, and how many there are, for people."""
        return f"{'; '.join(source.described() for source, _ in self._parts)}; a pass has {len(self):,} rows"

    def __getitem__(self, index: int) -> Row:
        if index >= len(self):
            blank = self[0]
            return blank | {name: np.zeros_like(blank[name]) for name in ("loss_weights", "kl_weights", "mask")}
        if self._plan is None:
            source, at = self._find(index)
            return make_row(source.document(at), self._seq_length, self._tokenizer)
        found = [self._find(number) for number in self._plan[index]]
        return join_rows([source.document(at) for source, at in found], self._seq_length, self._tokenizer)

    def _find(self, index: int) -> tuple[Source, int]:
        for source, count in self._parts:
            if index < count:
                size = len(source)
                return source, index * size // count if size > count else index % size
            index -= count
        raise IndexError(index)

    def _bound(self, index: int) -> int:
        source, at = self._find(index)
        return source.bound(at)


def _parts(
    data: DataConfig, tokenizer: Tokenizer, *, seq_length: int, seed: int, split: str
) -> list[tuple[Source, int]]:
    """(source, number of its documents) of a config of any kind."""
    make = functools.partial(_source, _processes(data, tokenizer, split), tokenizer, seq_length=seq_length, split=split)
    wanted = data.num_samples if split == "train" else data.validation_samples
    if data.kind == "mixture":
        if lost := share_problems(data, "data", "num_samples" if split == "train" else "validation_samples"):
            raise UserError(lost[0])
        parts = []
        for number, (share, part) in enumerate(mixture_parts(data)):
            count = round(wanted * share)
            if count:
                source = make(part, seed=_source_seed(seed, number))
                if split == "validation" and count > len(source):
                    say_once(f"validation of {part.validation_source or part.source!r}: {source.described()}")
                    count = len(source)
                parts.append((source, count))
        return parts
    if data.kind != "text":
        if not wanted:
            return []
        source = make(data, seed=seed)
        return [(source, len(source))]
    if not data.passkey_fraction:
        source = make(data, seed=seed)
        return [(source, len(source))]
    passkey = dataclasses.replace(data, kind="passkey", passkey_words=0)
    if data.passkey_fraction == 1:
        return [(make(passkey, seed=seed), wanted)] if wanted else []  # no source needed
    text = make(data, seed=seed)
    count = round(len(text) * data.passkey_fraction / (1 - data.passkey_fraction))
    if not count:
        return [(text, len(text))]
    passkey = dataclasses.replace(passkey, num_samples=count, validation_samples=count)
    return [(text, len(text)), (make(passkey, seed=seed), count)]


def _processes(data: DataConfig, tokenizer: Tokenizer, split: str) -> SampleProcesses | None:
    return SampleProcesses(tokenizer, data.num_processes) if data.num_processes and split == "train" else None


def _source(processes: SampleProcesses | None, tokenizer: Tokenizer, data: DataConfig, **options) -> Source:
    source = make_source(data, tokenizer, **options)
    return processes.of(source) if processes and isinstance(source, GeneratedSource) else source


def mixture_parts(data: DataConfig) -> list[tuple[float, DataConfig]]:
    """(share of the samples, config) of each source of a mixture; the shares sum to 1."""
    total = sum(source.weight for source in data.mixture)
    if not total > 0:
        raise UserError("data.mixture: name at least one source with a positive weight")
    parts = []
    for source in data.mixture:
        fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
        share = fields.pop("weight") / total
        counts = {name: max(1, round(share * getattr(data, name))) for name in ("num_samples", "validation_samples")}
        if not data.validation_samples:
            counts["validation_samples"] = 0
        parts.append(
            (share, dataclasses.replace(data, mixture=(), passkey_words=0, passkey_fraction=0.0, **counts, **fields))
        )
    return parts


def remote_contents(
    data: DataConfig, tokenizer: Tokenizer, *, seq_length: int, validation_length: int
) -> dict[str, list[list[Any]]]:
    """Source -> [split, size, digest] of what a stream reads of it, for the sources that are on hubs.

    Raises:
      UserError: a source that cannot be read.
    """
    if data.kind == "text" and data.passkey_fraction == 1:  # its source is not opened
        return {}
    parts = mixture_parts(data) if data.kind == "mixture" else [(1.0, data)]
    found: dict[str, list[list[Any]]] = {}
    for split, length, wanted in (
        ("train", seq_length, data.num_samples),
        ("validation", validation_length, data.validation_samples),
    ):
        for share, part in parts:
            if round(wanted * share) or (share and data.pieces and split == "train"):
                for source, size, digest in read_remotely(part, tokenizer, seq_length=length, split=split):
                    found.setdefault(source, []).append([split, size, digest])
    return found


@functools.cache  # once for each pair
def _say_overlap(source: str, validation_source: str) -> None:
    """Print a line where files on this machine are both trained on and validated on, under whatever names."""
    trained = set(digests(files_here(source)))
    files = files_here(validation_source)
    both = [file for file, digest in zip(files, digests(files), strict=True) if digest in trained]
    if both:
        print(
            f"data.validation_source {validation_source!r}: {len(both)} of {len(files)} file(s) are trained on as well (for example "
            f"{both[0]}), so that validation says nothing of other text",
            file=sys.stderr,
            flush=True,
        )


def _source_seed(seed: int, number: int) -> int:
    """Sources of a mixture draw from different seeds, or a passkey sample and a NIAH sample would have the same key."""
    return (seed + number * 0x9E3779B97F4A7C15) % 2**64


def _piece_stream(data: DataConfig, tokenizer: Tokenizer, seq_length: int, batch_size: int, seed: int) -> PieceStream:
    parts = mixture_parts(data) if data.kind == "mixture" else [(1.0, data)]
    make = functools.partial(
        _source, _processes(data, tokenizer, "train"), tokenizer, seq_length=seq_length, split="train"
    )
    sources = [
        (share, make(part, seed=_source_seed(seed, number))) for number, (share, part) in enumerate(parts) if share > 0
    ]
    return PieceStream(sources, tokenizer, pieces=data.pieces, seq_length=seq_length, batch_size=batch_size, seed=seed)

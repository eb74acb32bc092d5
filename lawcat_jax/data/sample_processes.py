"""Training samples made in other processes, for hosts with many cores.

A generated sample costs milliseconds of Python and tokenizing, and the threads of one process share one interpreter lock; a GPU that
fits a small model takes a hundred samples a second and more. The processes hold the same generators as this one, so what a
sample is does not depend on where it was made.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
import weakref
from concurrent.futures.process import BrokenProcessPool

from lawcat_jax.config import DataConfig
from lawcat_jax.data.sources import Document, GeneratedSource
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError

_PARENT_CHECK_SECONDS = 1.0

# What a worker process holds: set once when it starts, and the sources that it was asked for.
_tokenizer: Tokenizer | None = None
_sources: dict[int, GeneratedSource] = {}


class SampleProcesses:
    """A pool of ``processes`` workers that make documents of generated sources.

    The workers start with the first document, ignore SIGINT and SIGTERM (what to save is for this process to decide) and end
    with this process, whatever ends it. A script that uses them needs the usual ``if __name__ == "__main__":``.
    """

    def __init__(self, tokenizer: Tokenizer, processes: int):
        self._processes = processes
        self._settings: list[tuple[DataConfig, int, int, str]] = []
        self._pool = concurrent.futures.ProcessPoolExecutor(
            processes,
            mp_context=multiprocessing.get_context(
                "spawn"
            ),  # a fork would take over the locks of this process' threads
            initializer=_start,
            initargs=(tokenizer, os.getpid()),
        )
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def of(self, source: GeneratedSource) -> RemoteSource:
        """``source`` with its documents made by the workers."""
        self._settings.append(source.settings)
        return RemoteSource(source, self, len(self._settings) - 1)

    def document(self, number: int, index: int, max_tokens: int | None) -> Document:
        """Document ``index`` of source ``number``; with ``max_tokens`` its long form.

        Raises:
          UserError: that of the generator, or a worker has died.
        """
        try:
            return self._pool.submit(_document, number, self._settings[number], index, max_tokens).result()
        except BrokenProcessPool as problem:
            raise UserError(
                f"data.num_processes: one of the {self._processes} processes that make samples has died (out of memory?); "
                "run the same command again with fewer"
            ) from problem


class RemoteSource:
    """A :class:`~lawcat_jax.data.sources.Source` whose documents come from :class:`SampleProcesses`."""

    def __init__(self, local: GeneratedSource, processes: SampleProcesses, number: int):
        self._local, self._processes, self._number = local, processes, number

    def __len__(self) -> int:
        return len(self._local)

    def document(self, index: int) -> Document:
        return self._processes.document(self._number, index, None)

    def described(self) -> str:
        return self._local.described()

    def bound(self, index: int) -> int:
        return self._local.bound(index)

    def long_document(self, index: int, max_tokens: int) -> Document:
        return self._processes.document(self._number, index, max_tokens)


def _start(tokenizer: Tokenizer, parent: int) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A pool's worker waits for work on a pipe that it holds both ends of, so it would outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(0)


def _document(number: int, settings: tuple[DataConfig, int, int, str], index: int, max_tokens: int | None) -> Document:
    if number not in _sources:
        data, seq_length, seed, split = settings
        _sources[number] = GeneratedSource(data, _tokenizer, seq_length=seq_length, seed=seed, split=split)
    source = _sources[number]
    return source.document(index) if max_tokens is None else source.long_document(index, max_tokens)

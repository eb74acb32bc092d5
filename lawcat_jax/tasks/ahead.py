"""Work done ahead on another thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Iterates over what ``make()`` gives, which runs on a thread of its own and stays up to ``count`` items ahead.

    Tokenizers work outside Python's lock, so prompts are made while the caller waits for its device. An exception of
    ``make`` comes out of the iteration, at the item where it happened. Leaving its ``with`` block, or :meth:`close`,
    ends the thread at its next item.
    """

    def __init__(self, make: Callable[[], Iterable[T]], count: int):
        self._queue: queue.Queue[Any] = queue.Queue(count)
        self._closed = threading.Event()
        threading.Thread(target=self._run, args=(make,), name="lawcat_jax.tasks.ahead", daemon=True).start()

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        if self._closed.is_set():
            raise StopIteration
        item, problem = self._queue.get()
        if problem is not None:
            self.close()
            raise problem
        return item

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ask for no more items."""
        self._closed.set()

    def _run(self, make: Callable[[], Iterable[T]]) -> None:
        try:
            for item in make():
                if not self._put((item, None)):
                    return
        except BaseException as problem:
            self._put((None, problem))
        else:
            self._put((None, StopIteration()))

    def _put(self, pair: tuple[T | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(pair, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

"""Triton's tuning of fla's kernels, faster: ``chunk_gla`` with its gradient has some 300 candidates.

Triton compiles and times them one after another, which takes minutes on one core. Here the candidates of a kernel are
compiled together in threads, and each is timed for a shorter while; the candidates, and the choice of the fastest, stay
Triton's. Where this Triton has no asynchronous compilation, everything stays as it is.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

WARMUP_MS, MEASURED_MS = 5, 20
"""Time a candidate runs before and while it is timed; Triton's defaults are 25 and 100."""


@contextlib.contextmanager
def parallel_tuning(workers: int | None = None) -> Iterator[bool]:
    """Inside, autotuned kernels tune in parallel; yields whether they do. ``workers``: threads, default one a core."""
    try:
        # Comes with PyTorch for CUDA only.
        from triton import AsyncCompileMode  # pyright: ignore[reportMissingImports]
        from triton.runtime.autotuner import Autotuner  # pyright: ignore[reportMissingImports]
        from triton.testing import do_bench  # pyright: ignore[reportMissingImports]
    except ImportError:
        yield False
        return
    original = Autotuner._bench
    pool = concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count())

    def bench(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        # Candidates by identity, until all have had their turn; holding on to the arguments would keep their memory.
        waiting = self.__dict__.setdefault("_waiting", set())
        if not waiting:
            candidates = self.prune_configs(meta)
            waiting.update(map(id, candidates))
            self.__dict__["do_bench"] = functools.partial(do_bench, warmup=WARMUP_MS, rep=MEASURED_MS)
            options = {name: value for name, value in meta.items() if name != "warmup"}
            # A candidate that does not compile is found out again, and dealt with, by Triton itself.
            with contextlib.suppress(Exception), AsyncCompileMode(pool, ignore_errors=True):
                for candidate in candidates:
                    self.fn.warmup(*args, **options, **candidate.all_kwargs())
        waiting.discard(id(config))
        return original(self, *args, config=config, **meta)

    Autotuner._bench = bench
    try:
        yield True
    finally:
        Autotuner._bench = original
        pool.shutdown()

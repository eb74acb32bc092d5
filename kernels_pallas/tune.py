"""Measure block sizes of the Triton kernels on the GPU at hand and write the fastest into the table.

    python -m kernels_pallas.tune --head_dims 64,128 --out kernels_pallas/gated_linear_attention/block_sizes.json [--log candidates.json]

The table of --out is updated in place: entries of other devices and shapes stay. Every candidate is tried on its own; one that does not
compile or run is recorded in --log with its error. Candidates compile in parallel and run one after the other. Sizes that are fast but
wrong, by the float64 oracle of ``kernels_pallas.testing``, are not written, and the exit code is 1.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import inspect
import itertools
import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from kernels_pallas.benchmark import timing
from kernels_pallas.gated_linear_attention import block_sizes, triton, triton_vjp
from kernels_pallas.gated_linear_attention.block_sizes import BlockSizes
from kernels_pallas.testing import cases

_HEAD_DIMS = flags.DEFINE_list("head_dims", ["64", "128"], "Head sizes to tune (K = V).")
_HEADS = flags.DEFINE_integer("heads", 32, "Query heads.")
_TOKENS = flags.DEFINE_integer("tokens", 32768, "Tokens in all.")
_BATCHES = flags.DEFINE_list(
    "batches", ["32", "8", "1"], "Batch sizes the tokens are divided by when segments are tuned."
)
_BOUND = flags.DEFINE_float("gate_lower_bound", -1.25, "The static gate bound.")
_KERNELS = flags.DEFINE_list("kernels", ["forward", "backward", "states", "segment_dstate"], "Kernels to tune.")
_QUICK = flags.DEFINE_bool("quick", False, "Fewer candidates.")
_OUT = flags.DEFINE_string("out", str(block_sizes.TABLE), "Table to update.")
_LOG = flags.DEFINE_string("log", None, "Write every candidate's time or error to this JSON file.")


def candidates(kernel: str, d: int, quick: bool) -> Iterator[BlockSizes]:
    """Sizes to try; the first one is the default."""
    base = block_sizes.default_sizes(kernel, jnp.bfloat16, d, d)
    yield base
    chunks = (64, 32) if kernel == "forward" else (base.chunk,)
    widths = sorted({min(d, 64), d}) if kernel != "backward" else [d]
    if kernel == "forward" and d == 64 and not quick:
        widths = [32, 64]
    stages = (1, 2, 3) if kernel != "backward" else (1,)
    for chunk, width, warps, stage in itertools.product(chunks, widths, (4, 8), stages):
        sizes = BlockSizes(chunk, width, warps, stage, base.programs)
        if quick and (chunk == 32 or (warps == 8 and stage != 1)):
            continue
        if sizes != base:
            yield sizes


def inputs(batch: int, length: int, heads: int, d: int) -> tuple[jax.Array, ...]:
    """q, k, v, log_g, do with every head its own values and gates, bfloat16 (as the baselines take them)."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (batch, length, heads, d)

    @jax.jit
    def draw():
        q, k = (jax.nn.softmax(jax.random.normal(key, shape), -1).astype(jnp.bfloat16) for key in keys[:2])
        v, do = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[2:4])
        log_g = (jax.nn.log_sigmoid(jax.random.normal(keys[4], shape)) / 16).astype(jnp.bfloat16)
        return q, k, v, log_g, do

    return draw()


def _forward(q, k, v, log_g, do):
    del do
    return triton.forward(q, k, v, log_g, None, normalize=True, lower_bound=_BOUND.value, save_residuals=False)[:2]


def _backward_of(residuals: Any):
    def run(do):
        zeros = jnp.zeros((do.shape[0], do.shape[2], residuals[0].shape[3], do.shape[3]), jnp.float32)
        return triton_vjp.backward(residuals, do, (zeros, zeros[..., 0]), normalize=True, lower_bound=_BOUND.value)[:4]

    return run


def _compile(function: Any, args: tuple[Any, ...], overrides: dict[str, BlockSizes]) -> Any:
    with block_sizes.override(**overrides):
        return jax.jit(function).lower(*args).compile()


class Tuner:
    """Measures candidates, prints each, and keeps the records for --log."""

    def __init__(self, log: str | None) -> None:
        self.records: list[dict[str, Any]] = []
        self.log = log

    def record(self, **entry: Any) -> None:
        self.records.append(entry)
        time = entry.get("ms", {}).get("median")
        print(
            entry["kernel"],
            entry["shape"],
            entry["sizes"],
            f"{time:.4f} ms" if time else entry.get("error", "")[-200:],
            flush=True,
        )
        if self.log:
            timing.write_json(self.log, self.records)

    def best(
        self, kernel: str, shape: str, options: list[dict[str, BlockSizes]], function, args
    ) -> dict[str, BlockSizes]:
        """The fastest of several overrides."""
        found = []
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 4) as pool:
            jobs = [pool.submit(_compile, function, args, overrides) for overrides in options]
            for overrides, job in zip(options, jobs, strict=True):
                sizes = {name: dataclasses.asdict(s) for name, s in overrides.items()}
                try:
                    ms = timing.measure(job.result(), args)
                except Exception:
                    self.record(kernel=kernel, shape=shape, sizes=sizes, error=traceback.format_exc(limit=-2)[-1500:])
                    continue
                self.record(kernel=kernel, shape=shape, sizes=sizes, ms=ms)
                found.append((ms["median"], overrides))
        if not found:
            return options[0]
        return min(found, key=lambda pair: pair[0])[1]


def tune(d: int, tuner: Tuner) -> dict[str, BlockSizes]:
    """The best sizes per kernel for one head size."""
    heads, tokens = _HEADS.value, _TOKENS.value
    batches = [int(b) for b in _BATCHES.value]
    chosen: dict[str, BlockSizes] = {}
    batch = batches[0]
    args = inputs(batch, tokens // batch, heads, d)
    shape = f"{batch}x{tokens // batch}x{heads}x{d}"
    if "forward" in _KERNELS.value:
        options = [{"forward": s} for s in candidates("forward", d, _QUICK.value)]
        chosen |= tuner.best("forward", shape, options, _forward, args)
    others = [k for k in _KERNELS.value if k != "forward"]
    if others:
        with block_sizes.override(**chosen):
            residuals = jax.jit(
                lambda q, k, v, log_g, *_: triton.forward(
                    q, k, v, log_g, None, normalize=True, lower_bound=_BOUND.value, save_residuals=True
                )[2]
            )(*args)
        for kernel in others:
            options = [{**chosen, kernel: s} for s in candidates(kernel, d, _QUICK.value)]
            chosen = tuner.best(kernel, shape, options, _backward_of(residuals), (args[4],))
    if "forward" in chosen:
        # How far to split the sequence: the sum over the small batches decides, on the kernels just chosen.
        totals: dict[int, float] = {}
        wanted = (128, 256, 512, 1024, 2048)
        for batch in batches[1:]:
            args = inputs(batch, tokens // batch, heads, d)
            shape = f"{batch}x{tokens // batch}x{heads}x{d}"
            for programs in wanted:
                sizes = dataclasses.replace(chosen["forward"], programs=programs)
                before = len(tuner.records)
                tuner.best("segments", shape, [{**chosen, "forward": sizes}], _forward, args)
                ms = tuner.records[before].get("ms", {}).get("median", np.inf)
                totals[programs] = totals.get(programs, 0.0) + ms
        if totals:
            chosen["forward"] = dataclasses.replace(chosen["forward"], programs=min(totals, key=totals.__getitem__))
    return chosen


def wrong(d: int, chosen: dict[str, BlockSizes], *, length: int = 300, heads: int = 4) -> list[str]:
    """Outputs and gradients, of bfloat16 heads of size ``d`` with these sizes, that are off by more than their tolerance."""
    case = cases.make_case(length=length, heads=heads, K=d, V=d, dtype=jnp.bfloat16)
    options = case.options | {"implementation": "pallas_triton"}
    with block_sizes.override(**chosen):
        # Not the jitted run_vjp: its cache does not know the block sizes.
        run = jax.jit(functools.partial(inspect.unwrap(cases.run_vjp), **options))
        got = run(case.arrays, case.state, case.cotangents)
    return cases.failures(got, cases.expected(case), cases.BFLOAT16)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if jax.default_backend() != "gpu":
        raise app.UsageError(f"tune measures on a GPU; this process has {jax.default_backend()}")
    kind = jax.devices()[0].device_kind
    tuner = Tuner(_LOG.value)
    path, status = Path(_OUT.value), 0
    for d in (int(x) for x in _HEAD_DIMS.value):
        chosen = tune(d, tuner)
        if bad := wrong(d, chosen):
            sizes = {k: dataclasses.asdict(s) for k, s in chosen.items()}
            print(f"{kind} d={d}: not written, {', '.join(bad)} too far from the oracle with {sizes}", flush=True)
            status = 1
            continue
        table = json.loads(path.read_text()) if path.exists() else {}
        key = block_sizes.shape_key(jnp.bfloat16, d, d)
        for kernel, sizes in chosen.items():
            table.setdefault(kind, {}).setdefault(kernel, {})[key] = dataclasses.asdict(sizes)
        timing.write_json(path, table)
        print(f"{kind} d={d}:", {k: dataclasses.asdict(s) for k, s in chosen.items()}, flush=True)
    return status


if __name__ == "__main__":
    app.run(main)

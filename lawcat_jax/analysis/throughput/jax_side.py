"""Times the trainer's jitted steps: ``python -m lawcat_jax.analysis.throughput.jax_side REQUEST`` (a child of the command).

What is timed is the function that the training loop calls (:func:`lawcat_jax.training.stages.build`), on the mesh of
the configuration, with its shardings and its donated state; a step includes putting the host's batch on the devices.
``prefill`` is the generator's function, with a prompt that lies on the devices already.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import kernels_pallas
from lawcat_jax.analysis import generator_programs
from lawcat_jax.analysis.compile_report import needed_flops
from lawcat_jax.analysis.throughput import device, records
from lawcat_jax.analysis.throughput.records import Measurement, Request, Results
from lawcat_jax.checkpoints import model_dir
from lawcat_jax.config import Config, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.inference import generation
from lawcat_jax.models.mixers.feature_maps import feature_sizes
from lawcat_jax.runtime import distributed, sharding
from lawcat_jax.training import stages
from lawcat_jax.training.utilization import peak_flops


def main(path: str) -> int:
    """Measure what the request asks for; a stage that fails is a measurement with a problem."""
    request = records.read_request(path)
    config, results = request.settings(), Results(request.results)
    model = config.teacher.architecture
    assert model is not None  # the request states it
    try:
        devices = jax.devices()[: request.devices or None]
        mesh = sharding.make_mesh(config.mesh, devices, rows=sharding.common_rows(config))
        sharding.check_mesh(config, model, mesh, request.stages)
    except UserError as problem:
        results.refuse(str(problem))
        return records.REFUSED
    distributed.avoid_cached_collectives(mesh.size)
    failed = False
    for name in request.stages:
        if name == "prefill":
            entry = Measurement("jax", name, "", request.batch[name], request.length[name])
        else:
            stage = getattr(config, name)
            entry = Measurement("jax", name, f"remat {stage.remat}", stage.batch_size, stage.seq_length)
        entry.device, entry.devices, entry.mesh = devices[0].device_kind, mesh.size, dict(mesh.shape)
        try:
            prepare = prepare_prefill if name == "prefill" else prepare_stage
            measure(entry, prepare(entry, config, model, mesh, results), config, model, mesh, request, results)
        except Exception as problem:  # whatever the compiler or the allocator raises: the next stage may still run
            entry.problem, failed = records.one_line(problem), True
            print(f"{name}: not measured: {entry.problem}", file=sys.stderr, flush=True)
        results.put(entry)
    return 1 if failed else 0


Metrics = dict[str, jax.Array]
Run = Callable[[int], tuple[float, Metrics]]
"""Calls the program so many times, and waits for it: (seconds, metrics of the last call)."""


def measure(
    entry: Measurement, run: Run, config: Config, model: ModelConfig, mesh: Mesh, request: Request, results: Results
) -> None:
    """Warm up and time one program; ``entry`` is filled in and written as numbers come."""
    devices = list(mesh.devices.flat)
    entry.first_step_seconds, metrics = run(1)
    first = metrics.get("loss")
    run(max(1, request.warmup - 1))
    operations = needed_flops(entry.stage, config, model, entry.batch * entry.length, entry.length)
    peak = peak_flops(entry.device)
    seconds: list[float] = []
    while len(seconds) < request.repeats:
        if seconds and request.left() < seconds[-1] * request.steps:
            break
        elapsed, metrics = run(request.steps)
        seconds.append(elapsed / request.steps)
        entry.timed(seconds)
        assert entry.ms is not None  # timed() sets it
        if peak is not None:
            entry.mfu = operations / (entry.ms["median"] / 1e3 * peak * mesh.size)
        entry.peak_bytes = device.peak_bytes(devices)
        if first is not None:
            entry.losses = [float(first), float(metrics["loss"])]
            entry.notes["skipped_steps"] = int(metrics["bad_total"])
        results.put(entry)
    assert entry.ms is not None  # at least one repeat
    print(f"{entry.stage}: {entry.ms['median']:.2f} ms a step, {entry.tokens_per_second:,.0f} tokens/s", flush=True)


def prepare_stage(entry: Measurement, config: Config, model: ModelConfig, mesh: Mesh, results: Results) -> Run:
    """Compile the step of a stage, and draw its weights.

    Raises:
      UserError: a stage that cannot be built for this mesh.
    """
    name = entry.stage
    dtype = model_dir.resolve_dtype(config.teacher.dtype)
    built = stages.build(name, config, model, mesh, dtype=dtype)
    entry.trainable = sum(leaf.size for leaf in jax.tree.leaves(built.state.params))
    entry.notes = _notes(config, name, built, dtype)
    key = built.key(config.seed)
    compile_(entry, lambda: built.train_step.trace(built.state, built.frozen, built.batch, key), results)

    params = device.random_params(model, *stages.architecture(name, config), mesh, seed=config.seed, dtype=dtype)
    state, frozen = built.split(params)
    jax.block_until_ready((state, frozen))
    entry.notes["peak_bytes_before"] = device.peak_bytes(list(mesh.devices.flat))
    batches = records.example_batches(model.vocab_size, entry.batch, entry.length)

    def run(count: int) -> tuple[float, Metrics]:
        nonlocal state
        begun = time.perf_counter()
        metrics: Metrics = {}
        for _ in range(count):
            state, metrics = built.train_step(state, frozen, sharding.place_batch(next(batches), mesh), key)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begun, metrics

    return run


def prepare_prefill(entry: Measurement, config: Config, model: ModelConfig, mesh: Mesh, results: Results) -> Run:
    """Compile the generator's prefill of whole prompts at once, and draw weights; each call begins with no tokens."""
    dtype = model_dir.resolve_dtype(config.teacher.dtype)
    sizes = generator_programs.Options(prefill_length=entry.length, prefill_batch=entry.batch, padded=False)
    program = generator_programs.program("prefill", config, model, mesh, sizes, dtype)
    entry.notes = {"dtype": str(np.dtype(dtype))}
    compile_(entry, program.trace, results)
    attention, lora = generator_programs.architecture(config)
    params = device.random_params(model, attention, lora, mesh, seed=config.seed, dtype=dtype)
    jax.block_until_ready(params)
    entry.notes["peak_bytes_before"] = device.peak_bytes(list(mesh.devices.flat))
    tokens = np.random.default_rng(config.seed).integers(0, model.vocab_size, (entry.batch, entry.length), np.int32)
    placed, unread = jax.device_put((tokens, np.full(entry.batch, entry.length, np.int32)), sharding.replicated(mesh))

    def run(count: int) -> tuple[float, Metrics]:
        begun = time.perf_counter()
        out: Any = None
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            for _ in range(count):
                cache, logits = generation.empty_cache(
                    params, graphdef=program.static["graphdef"], batch=entry.batch, length=entry.length
                )
                out = program.function(params, cache, logits, placed, None, unread, **program.static)
        jax.block_until_ready(out)
        return time.perf_counter() - begun, {}

    return run


def compile_(entry: Measurement, trace: Callable[[], Any], results: Results) -> None:
    """Trace and compile a program, and enter how long it took and what it needs."""
    started = time.monotonic()
    compiled = trace().lower().compile()
    entry.compile_seconds = time.monotonic() - started
    entry.memory = device.compiled_bytes(compiled)
    # The calls that follow find the program in jax's own cache, as the trainer's do after the first.
    results.put(entry)


def _notes(config: Config, name: str, built: stages.Stage, dtype: Any) -> dict[str, Any]:
    """What else decides the speed, in words and numbers."""
    stage, model, attention = getattr(config, name), config.teacher.architecture, config.attention
    assert model is not None  # the request states it
    notes: dict[str, Any] = {"dtype": str(np.dtype(dtype)), "grad_accum": stage.grad_accum, "remat": stage.remat}
    notes["loss_chunk"] = stage.loss_chunk
    if attention.kind != "lawcat" or name == "pretrain":
        return notes
    _, channels = feature_sizes(model, attention)
    rows = stage.batch_size // stage.grad_accum

    def shape(heads: int, width: int, kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, stage.seq_length, heads, width), kind)

    q, v = shape(model.num_heads, channels, dtype), shape(model.num_kv_heads, model.head_dim, dtype)
    platform = built.mesh.devices.flat[0].platform
    notes["gated_linear_attention"] = kernels_pallas.implementation_for(
        q,
        q,
        v,
        shape(model.num_kv_heads, channels, jnp.float32),
        normalize=attention.normalize,
        gate_lower_bound=attention.gate_lower_bound,
        implementation=attention.implementation,
        platform="cuda" if platform == "gpu" else platform,
    )
    return notes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

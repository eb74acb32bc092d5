"""Times the trainer's jitted steps: ``python -m lawcat_jax.analysis.throughput.jax_side REQUEST`` (a child of the command).

What is timed is the function that the training loop calls (:func:`lawcat_jax.training.stages.build`), on the mesh of
the configuration, with its shardings and its donated state; a step includes putting the host's batch on the devices.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import kernels_pallas
from lawcat_jax import models
from lawcat_jax.analysis.throughput import records
from lawcat_jax.analysis.throughput.records import Measurement, Request, Results
from lawcat_jax.checkpoints import model_dir
from lawcat_jax.config import Config, ModelConfig
from lawcat_jax.models.mixers.feature_maps import feature_sizes
from lawcat_jax.runtime import distributed, sharding
from lawcat_jax.training import optim, stages
from lawcat_jax.training.utilization import utilization


def main(path: str) -> int:
    """Measure what the request asks for; a stage that fails is a measurement with a problem."""
    request = records.read_request(path)
    config, results = request.settings(), Results(request.results)
    mesh = sharding.make_mesh(config.mesh, rows=sharding.common_rows(config))
    distributed.avoid_cached_collectives(mesh.size)
    failed = False
    for name in request.stages:
        stage = getattr(config, name)
        entry = Measurement("jax", name, f"remat {stage.remat}", stage.batch_size, stage.seq_length)
        try:
            measure(entry, config, mesh, request, results)
        except Exception as problem:  # whatever the compiler or the allocator raises: the next stage may still run
            entry.problem, failed = records.one_line(problem), True
            print(f"{name}: not measured: {entry.problem}", file=sys.stderr, flush=True)
        results.put(entry)
    return 1 if failed else 0


def measure(entry: Measurement, config: Config, mesh: Mesh, request: Request, results: Results) -> None:
    """Compile, warm up and time one stage; ``entry`` is filled in and written as numbers come.

    Raises:
      UserError: a stage that cannot be built for this mesh.
    """
    model, name = config.teacher.architecture, entry.stage
    assert model is not None  # the request states it
    dtype = model_dir.resolve_dtype(config.teacher.dtype)
    devices = list(mesh.devices.flat)
    built = stages.build(name, config, model, mesh, dtype=dtype)
    entry.device, entry.devices, entry.mesh = devices[0].device_kind, mesh.size, dict(mesh.shape)
    entry.trainable = sum(leaf.size for leaf in jax.tree.leaves(built.state.params))
    entry.notes = _notes(config, name, built, dtype)

    key = built.key(config.seed)
    started = time.monotonic()
    compiled = built.train_step.lower(built.state, built.frozen, built.batch, key).compile()
    entry.compile_seconds = time.monotonic() - started
    entry.memory = _memory(compiled)
    del compiled  # the calls below find it in jax's own cache, as the trainer's do after the first
    results.put(entry)

    state, frozen = built.split(random_params(name, config, model, mesh, dtype))
    jax.block_until_ready((state, frozen))
    entry.notes["peak_bytes_before"] = _peak_bytes(devices)
    batches = records.example_batches(model.vocab_size, entry.batch, entry.length)

    def run(count: int) -> tuple[float, dict[str, jax.Array]]:
        nonlocal state
        begun = time.perf_counter()
        metrics: dict[str, jax.Array] = {}
        for _ in range(count):
            state, metrics = built.train_step(state, frozen, sharding.place_batch(next(batches), mesh), key)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begun, metrics

    entry.first_step_seconds, metrics = run(1)
    first = float(metrics["loss"])
    run(max(1, request.warmup - 1))
    share = utilization(name, config, model, devices)
    seconds: list[float] = []
    while len(seconds) < request.repeats:
        if seconds and request.left() < seconds[-1] * request.steps:
            break
        elapsed, metrics = run(request.steps)
        seconds.append(elapsed / request.steps)
        entry.timed(seconds)
        assert entry.tokens_per_second is not None  # timed() sets it
        entry.mfu = share(entry.tokens_per_second)
        entry.peak_bytes = _peak_bytes(devices)
        entry.losses = [first, float(metrics["loss"])]
        entry.notes["skipped_steps"] = int(metrics["bad_total"])
        results.put(entry)
    assert entry.ms is not None  # at least one repeat
    print(f"{name}: {entry.ms['median']:.2f} ms a step, {entry.tokens_per_second:,.0f} tokens/s", flush=True)


def random_params(name: str, config: Config, model: ModelConfig, mesh: Mesh, dtype: Any) -> optim.Params:
    """Parameters of a stage on the mesh: the pretrained part random in ``dtype``, mixers and adapters freshly
    initialised in float32 as the trainer does.

    The pretrained part is a hash of each entry's index, which XLA computes in place: real random numbers would need
    several times the memory of a step for a moment, and the allocator's peak cannot be reset.
    """
    attention, lora = stages.architecture(name, config)
    _, base = models.abstract(model, dtype=dtype)
    _, whole = models.abstract(model, attention, lora, dtype=dtype)
    added = {part: value for part, value in whole.items() if part not in base}
    draw = jax.jit(functools.partial(_hashed, base), out_shardings=sharding.shardings(base, mesh))
    initialise = jax.jit(
        lambda: models.init_params(model, attention, lora, seed=config.seed, base={}),
        out_shardings=sharding.shardings(added, mesh),
    )
    return draw() | initialise()


def _hashed(shapes: Any) -> Any:
    """Uniform numbers of standard deviation 0.02 for kernels and embeddings, ones for the scales of norms."""

    def one(number: int, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if name.endswith("scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        index, stride = jnp.uint32(number * 0x9E3779B9 % 2**32), 1
        for axis in reversed(range(len(leaf.shape))):
            index = index + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= leaf.shape[axis]
        for factor in (0x7FEB352D, 0x846CA68B):
            index = (index ^ (index >> 16)) * jnp.uint32(factor)
        unit = ((index >> 8).astype(jnp.float32) + 0.5) * 2.0**-24
        return ((2 * unit - 1) * (0.02 * 3**0.5)).astype(leaf.dtype)

    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    values = [one(number, sharding.path_name(path), leaf) for number, (path, leaf) in enumerate(leaves)]
    return jax.tree.unflatten(treedef, values)


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


def _memory(compiled: Any) -> dict[str, int]:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    return {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }


def _peak_bytes(devices: list[jax.Device]) -> int | None:  # pyright: ignore[reportInvalidTypeForm]  # a variable to pyright
    """Peak bytes of the fullest of this process's devices; None where the platform does not tell (CPUs)."""
    stats = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    return max((entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry), default=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

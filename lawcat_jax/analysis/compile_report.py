"""Compile the programs of a configuration for TPUs or GPUs that are not there, and report what they need.

The compiler is libtpu's or that of jax's CUDA plugin, running on a CPU; what it compiles are the jitted functions that
the trainer and the generator call, with their shardings and donated buffers.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from lawcat_jax.analysis import flops, hlo
from lawcat_jax.analysis.out_of_memory import largest_arrays, largest_buffers, needed_bytes
from lawcat_jax.analysis.topology import compiler_wheels, cuda_extra, memory_limit
from lawcat_jax.config import Config, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.models.flops import model_flops
from lawcat_jax.runtime.chips import GIB, Chip

PROGRAMS = ("pretrain", "stage1", "stage2", "prefill", "decode")
GPU_OPTIONS = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    "xla_disable_hlo_passes": "triton-softmax-rewriter",
}
"""XLA tries out on a GPU which kernels are fastest. Without one it would take its own Triton kernels, with the first
tiles of a list; here matrix products are calls of cuBLAS, and reductions are fused without Triton, which in jax 0.10.2
does not compile for every shape.
"""


@dataclasses.dataclass
class Options:
    """Sizes of the generator's programs; 0 takes the default (see :func:`programs`)."""

    prefill_length: int = 0
    prefill_batch: int = 0
    decode_batch: int = 0


@dataclasses.dataclass
class Report:
    """What one program needs. Bytes, operations and seconds are of one device and one call.

    ``peak_bytes``: arguments, results that reuse no argument, temporaries and code. ``flops``: matrix products as
    traced, recomputation included; ``model_flops``: what the model needs (:func:`lawcat_jax.models.flops.model_flops`).
    ``hbm_bytes``: what jax may allocate. ``seconds`` bounds the time from below (compute, HBM and links overlap
    perfectly) and above (not at all), ``mfu`` likewise with the better value first. Without ``fits`` most numbers may
    be missing, and ``largest`` names buffers.
    """

    program: str
    tokens: int
    fits: bool
    hbm_bytes: float
    compile_seconds: float = 0.0
    argument_bytes: int = 0
    temp_bytes: int = 0
    output_bytes: int = 0
    code_bytes: int = 0
    peak_bytes: int = 0
    flops: float = 0.0
    model_flops: float = 0.0
    hbm_traffic_bytes: float = 0.0
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds_by: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: tuple[float, float] = (0.0, 0.0)
    mfu: tuple[float, float] = (0.0, 0.0)
    largest: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    problem: str = ""


def programs(config: Config) -> list[str]:
    """Enabled stages, then prefill and decode of the student (where there is one)."""
    stages = [name for name, _ in config.stages()]
    return stages + ([] if config.pretrain.enabled else ["prefill", "decode"])


def compile_program(name: str, config: Config, model: ModelConfig, mesh: Any, chip: Chip, options: Options) -> Report:
    """Compile one of :data:`PROGRAMS` for the devices of ``mesh`` and measure it.

    A program that needs too much memory gives a report with ``fits`` False.

    Raises:
      UserError: sizes that do not fit each other, another failure of the compiler, or a compiler of another version.
    """
    try:
        traced, tokens, length = _trace(name, config, model, mesh, options)
    except RuntimeError as problem:  # jax asks for cuDNN's version where it hands attention to cuDNN
        if "cuDNN" not in str(problem):
            raise
        raise UserError(f"{name}: {problem} {compiler_wheels(cuda_extra())} (it needs no GPU)") from problem
    report = Report(name, tokens, True, memory_limit(chip))
    report.flops = flops.traced_flops(traced.jaxpr) / mesh.size
    report.model_flops = model_flops(name, config, model, length) * tokens / mesh.size
    if name == "prefill":  # only the last token of a sequence goes through the head
        rows = tokens // length
        report.model_flops += 2.0 * model.hidden_size * model.vocab_size * rows / mesh.size
    started = time.monotonic()
    try:
        compiled = traced.lower().compile(compiler_options=GPU_OPTIONS if chip.is_gpu else None)
    except Exception as problem:  # jaxlib's XlaRuntimeError, or ValueError of a kernel that cannot be
        text = str(problem)
        no_room = "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text
        if not no_room or "hared memory" in text:  # shared memory is a GPU kernel's: no smaller batch helps
            raise UserError(f"{name} does not compile: {' '.join(text.split())[:600]}") from problem
        report.compile_seconds = time.monotonic() - started
        report.fits = False
        report.largest = largest_buffers(text) or largest_arrays(traced.jaxpr, mesh.size)
        report.peak_bytes = int(needed_bytes(text))
        report.problem = advice(name, report, config)
        return report
    report.compile_seconds = time.monotonic() - started
    try:
        text = compiled.as_text()
    except RuntimeError as problem:  # jaxlib's, of a compiler that knows newer instructions
        wheels = compiler_wheels(cuda_extra() if chip.is_gpu else "tpu")
        line = " ".join(str(problem).split())[:200]
        raise UserError(
            f"{name}: jaxlib cannot read the compiled program, install its compiler: {wheels} ({line})"
        ) from (problem)
    _measure(report, compiled, text, chip, mesh)
    if chip.is_gpu and report.peak_bytes > report.hbm_bytes:  # its compiler does not complain
        report.fits = False
        report.largest = largest_arrays(traced.jaxpr, mesh.size)
        report.problem = advice(name, report, config)
        if report.peak_bytes < chip.hbm_bytes:
            report.problem += f", or a larger XLA_CLIENT_MEM_FRACTION (of {chip.hbm_bytes / GIB:.1f} GiB)"
    return report


def _measure(report: Report, compiled: Any, text: str, chip: Chip, mesh: Any) -> None:
    memory = compiled.memory_analysis()
    report.argument_bytes, report.temp_bytes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    report.output_bytes = memory.output_size_in_bytes - memory.alias_size_in_bytes
    report.code_bytes = memory.generated_code_size_in_bytes
    report.peak_bytes = report.argument_bytes + report.temp_bytes + report.output_bytes + report.code_bytes
    module = hlo.Module(text)
    report.hbm_traffic_bytes = module.hbm_bytes()
    report.flops += module.attention_flops()
    processes = [device.process_index for device in mesh.devices.flat]
    collectives = module.collectives(processes.count(processes[0]) if chip.is_gpu else 0)
    report.collectives = [dataclasses.asdict(entry) for entry in collectives]
    report.seconds_by = {
        "compute": report.flops / chip.flops,
        "hbm": report.hbm_traffic_bytes / chip.hbm_bandwidth,
        **_link_seconds(collectives, chip),
    }
    times = report.seconds_by.values()
    report.seconds = (max(times), sum(times))
    best, worst = (report.model_flops / (chip.flops * max(second, 1e-12)) for second in report.seconds)
    report.mfu = (best, worst)


def _link_seconds(collectives: list[hlo.Collective], chip: Chip) -> dict[str, float]:
    """Time of the collectives by the links that carry them."""
    if not chip.is_gpu:
        return {"ici": sum(entry.bytes for entry in collectives) / chip.ici_bandwidth}
    inside = sum(entry.bytes for entry in collectives if entry.local == entry.group) / chip.ici_bandwidth
    # As many rings as a group has members on a machine, each leaving it through the port of another GPU.
    outside = sum(
        entry.bytes / min(chip.ici_bandwidth, entry.local * chip.network_bandwidth)
        for entry in collectives
        if entry.local < entry.group
    )
    return {"nvlink": inside, "network": outside} if outside else {"nvlink": inside}


def _trace(name: str, config: Config, model: ModelConfig, mesh: Any, options: Options) -> tuple[Any, int, int]:
    """(traced program, tokens per call, tokens per sequence)."""
    import jax
    import jax.numpy as jnp

    from lawcat_jax.training import stages

    if name in ("prefill", "decode"):
        return _trace_generator(name, config, model, mesh, options)
    dtype = jnp.float32 if name == "pretrain" or config.teacher.dtype == "float32" else jnp.bfloat16
    built = stages.build(name, config, model, mesh, dtype=dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    stage = built.config
    traced = built.train_step.trace(built.state, built.frozen, built.batch, key)
    return traced, stage.batch_size * stage.seq_length, stage.seq_length


def _trace_generator(name: str, config: Config, model: ModelConfig, mesh: Any, options: Options):
    import jax
    import jax.numpy as jnp

    from lawcat_jax import models
    from lawcat_jax.inference import generation
    from lawcat_jax.runtime import sharding

    _, stage = config.stages()[-1]
    attention, lora = config.attention, config.lora if config.stage2.enabled else None
    dtype = jnp.float32 if config.teacher.dtype == "float32" else jnp.bfloat16
    graphdef, shapes = models.abstract(model, attention, lora, dtype=dtype)
    length = (options.prefill_length or stage.seq_length) if name == "prefill" else 1
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = (options.prefill_batch if name == "prefill" else options.decode_batch) or rows
    room = options.prefill_length or stage.seq_length  # of the key-value buffer, where softmax layers are left
    cache, logits = jax.eval_shape(
        lambda params: generation.empty_cache(params, graphdef=graphdef, batch=batch, length=room), shapes
    )

    def placed(tree, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    everywhere = sharding.replicated(mesh)
    params = placed(shapes, sharding.shardings(shapes, mesh))
    cache = placed(cache, sharding.shardings(cache, mesh))

    def whole(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if name == "prefill":
            logits = whole(*logits.shape, dtype=logits.dtype)
            arguments = (params, cache, logits, whole(batch, length), whole(batch), whole(batch))
            traced = generation.prefill_chunk.trace(*arguments, graphdef=graphdef, as_teacher=False)
        else:
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
            arguments = (params, cache, whole(batch), whole(), keys, {"temperature": whole(dtype=jnp.float32)}, None)
            traced = generation.decode_step.trace(*arguments, graphdef=graphdef, as_teacher=False)
    return traced, batch * length, length


def advice(name: str, report: Report, config: Config) -> str:
    """One line: what does not fit, the largest buffers, and what to change."""
    largest = "; ".join(
        f"{entry['bytes'] / GIB:.2f} GiB {entry['shape']} ({entry['operation'] or entry['kind']})"
        for entry in report.largest[:3]
    )
    if name in ("prefill", "decode"):
        changes = [f"a smaller --{name}_batch"] + (["a smaller --prefill_length"] if name == "prefill" else [])
    else:
        stage = getattr(config, name)
        changes = [f"config.{name}.remat=layer"] if stage.remat != "layer" and name != "stage1" else []
        changes += [f"config.{name}.loss_chunk=256"] if stage.loss_chunk == 0 and name != "stage1" else []
        changes += [f"config.{name}.grad_accum={2 * stage.grad_accum}", f"a smaller config.{name}.seq_length"]
    changes += ["more devices for config.mesh.fsdp or .tensor, or .sequence for long inputs", "a larger --topology"]
    used = f"needs {report.peak_bytes / GIB:.2f} GiB" if report.peak_bytes else "needs more than the"
    of = f" of {report.hbm_bytes / GIB:.0f} GiB HBM a chip" if report.peak_bytes else " HBM of a chip"
    return f"{name} does not fit: it {used}{of}; largest: {largest or 'not listed'}; try {', or '.join(changes)}"

"""Times the same two stages in PyTorch: ``python -m lawcat_jax.analysis.throughput.torch_peer REQUEST`` (a child of the command).

A plain loop over a transformers model, as good as such a loop is without compiling it: bf16 weights, scaled dot product
attention for the teacher, fla's ``chunk_gla`` for the student, fused AdamW, the host's batch copied to the device at
every step and no value read back. Stage 1 back-propagates layer by layer; stage 2 runs without and with gradient
checkpointing. What has several forms (``NORMALISERS`` and ``CONVOLUTIONS`` of :mod:`torch_model`) is tried in several,
and the fastest counts. One device: the first.
"""

from __future__ import annotations

import gc
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from kernels_pallas.benchmark.torch_tuning import parallel_tuning
from lawcat_jax.analysis.throughput import records, torch_model
from lawcat_jax.analysis.throughput.records import Measurement, Request, Results
from lawcat_jax.config import Config, StageConfig

TOLERANCE = 2e-2
"""Largest relative RMS difference of ``chunk_gla`` from the recurrence; beyond it a speed would mean nothing."""

Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], torch.Tensor]


class Variant(NamedTuple):
    """One way to run a stage."""

    stage: str
    normaliser: str
    checkpointing: bool = False


class Peer(NamedTuple):
    """What all variants share."""

    gla: torch_model.Gla
    conv: str
    device: str
    dtype: torch.dtype
    notes: dict[str, Any]

    def label(self, variant: Variant) -> str:
        """In words."""
        return f"{variant.normaliser} v, {self.conv} conv" + (", checkpointing" if variant.checkpointing else "")


def main(path: str) -> int:
    """Measure what the request asks for; a variant that fails is a measurement with a problem."""
    request = records.read_request(path)
    config, results = request.settings(), Results(request.results)
    with parallel_tuning() as parallel:
        try:
            peer = prepare(config, request)
        except Exception as problem:  # no device, no fla, kernels that do not compile: nothing can be measured
            _all_failed(config, request, results, records.one_line(problem))
            return 1
        peer.notes["tuned_in_parallel"] = parallel
        seconds: list[float] = []
        tuned, too_large = set(), set()
        for variant in plan(request.stages, request.normalisers):
            entry = _entry(config, request, variant.stage, peer.label(variant))
            started = time.monotonic()
            # The first variant of a normaliser tunes its kernels; those after it are as short as the shortest.
            expected = min(seconds, default=0.0) if variant.normaliser in tuned else max(seconds, default=0.0)
            try:
                entry.problem = torch_model.refusal(config, variant.stage)
                if request.left() < expected:
                    entry.problem = "no time left"
                elif (variant.stage, variant.checkpointing) in too_large:
                    entry.problem = "out of memory with another normaliser"
                if not entry.problem:
                    tuned.add(variant.normaliser)
                    measure(entry, variant, peer, config, request, results)
                    seconds.append(time.monotonic() - started)
            except Exception as problem:
                entry.problem = records.one_line(problem)
                if entry.problem.startswith("out of memory"):
                    too_large.add((variant.stage, variant.checkpointing))
            if entry.problem:
                print(f"{variant.stage} ({entry.variant}): not measured: {entry.problem}", file=sys.stderr, flush=True)
            results.put(entry)
            _release(peer.device)
    return 0


def plan(stages: list[str], normalisers: list[str]) -> list[Variant]:
    """Variants in the order of their importance: what there is no time for comes last."""
    found = []
    for normaliser in normalisers:
        found += [Variant(stage, normaliser) for stage in stages]
        found += [Variant(stage, normaliser, True) for stage in stages if stage == "stage2"]
    return found


def prepare(config: Config, request: Request) -> Peer:
    """Device, kernels and the fastest convolution.

    Raises:
      ImportError: fla is not installed.
      ValueError: no CUDA device, or ``chunk_gla`` is not the recurrence here.
    """
    cuda = torch.cuda.is_available()
    if request.gla == "fla" and not cuda:
        raise ValueError("fla needs a CUDA device, and PyTorch sees none")
    device = "cuda" if cuda else "cpu"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
        config.teacher.dtype, torch.bfloat16 if cuda else torch.float32
    )
    notes: dict[str, Any] = {"gla": request.gla, "dtype": str(dtype).removeprefix("torch.")}
    if request.gla == "reference":
        return Peer(torch_model.reference_gla, "shifted", device, dtype, notes)
    gla = torch_model.fla_gla()
    started = time.monotonic()
    notes["gla_error"] = error = gla_error(gla, config, request.normalisers[0])
    if not error < TOLERANCE:
        raise ValueError(f"fla's chunk_gla differs from the recurrence by {error:.1e} (relative RMS)")
    model = config.teacher.architecture
    assert model is not None  # the request states it
    rows = request.batch.get(request.stages[0]) or getattr(config, request.stages[0]).batch_size
    shape = (rows, getattr(config, request.stages[0]).seq_length, model.num_heads * model.head_dim)
    notes["convolution_ms"] = times = convolution_times(shape, config.attention.conv_size, device, dtype)
    notes["preparation_seconds"] = time.monotonic() - started
    print(f"peer: chunk_gla differs by {error:.1e} from the recurrence; convolutions, ms: {times}", flush=True)
    return Peer(gla, min(times, key=times.__getitem__), device, dtype, notes)


def gla_error(gla: torch_model.Gla, config: Config, normaliser: str) -> float:
    """Relative RMS difference of the normalised output from the recurrence, on random bf16 features."""
    model = config.teacher.architecture
    assert model is not None  # the request states it
    width, features = model.head_dim, 2 * (model.head_dim // 2)
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(size: int) -> torch.Tensor:
        return torch.randn(1, 256, model.num_heads, size, device="cuda", generator=generator)

    q, k = ((3 * draw(features)).softmax(-1).bfloat16() for _ in range(2))
    v, log_g = draw(width).bfloat16(), torch.nn.functional.logsigmoid(draw(features)) / config.attention.gate_normalizer
    numerator, denominator = torch_model.NORMALISERS[normaliser](gla, q, k, v, log_g)
    exact, norm = torch_model.NORMALISERS[normaliser](torch_model.reference_gla, q, k, v.float(), log_g)
    exact, found = exact / norm, numerator.float() / denominator.float()
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def convolution_times(shape: tuple[int, ...], taps: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of each convolution with its gradient, on [B, T, C]; those that fail are left out."""
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    w = torch.randn(shape[-1], taps, device=device, requires_grad=True)
    found: dict[str, float] = {}
    for name, convolve in torch_model.CONVOLUTIONS.items():

        def run(convolve: torch_model.Convolution = convolve) -> None:
            torch.autograd.grad(convolve(x, w).sum(), (x, w))

        try:
            _seconds(run, 2, device)
            found[name] = round(1e3 * _seconds(run, 5, device), 3)
        except Exception as problem:  # a kernel that this version does not have, or that does not compile
            print(f"peer: no {name} convolution: {records.one_line(problem)}", file=sys.stderr, flush=True)
    return found


def measure(
    entry: Measurement, variant: Variant, peer: Peer, config: Config, request: Request, results: Results
) -> None:
    """Build, warm up and time one variant; ``entry`` is filled in and written as numbers come.

    Raises:
      ValueError: other trainable parameters than ours.
    """
    if peer.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    entry.device = torch.cuda.get_device_name() if peer.device == "cuda" else "cpu"
    entry.notes = dict(peer.notes)
    decoder = torch_model.build(
        config,
        variant.stage,
        dtype=peer.dtype,
        device=peer.device,
        gla=peer.gla,
        normaliser=variant.normaliser,
        conv=torch_model.CONVOLUTIONS[peer.conv],
    )
    entry.trainable = sum(parameter.numel() for parameter in torch_model.trainable_parameters(decoder))
    expected = request.trainable.get(variant.stage, entry.trainable)
    if entry.trainable != expected:
        raise ValueError(f"{entry.trainable:,} trainable parameters here, {expected:,} on the JAX side")
    if variant.checkpointing:
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # a new name from transformers 5.2x on
            decoder.gradient_checkpointing_enable({"use_reentrant": False})
    step = make_step(decoder, variant.stage, getattr(config, variant.stage), peer.device)
    model = config.teacher.architecture
    assert model is not None  # the request states it
    examples = records.example_batches(model.vocab_size, entry.batch, entry.length)
    batches = itertools.cycle([host_batch(batch, pin=peer.device == "cuda") for batch in itertools.islice(examples, 4)])
    losses: list[torch.Tensor] = []

    def run() -> None:
        losses.append(step({name: x.to(peer.device, non_blocking=True) for name, x in next(batches).items()}))

    entry.first_step_seconds = _seconds(run, 1, peer.device)
    _seconds(run, max(1, request.warmup - 1), peer.device)
    seconds: list[float] = []
    while len(seconds) < request.repeats:
        if seconds and request.left() < seconds[-1] * request.steps:
            break
        seconds.append(_seconds(run, request.steps, peer.device))
        entry.timed(seconds)
        entry.losses = [float(losses[0]), float(losses[-1])]
        if peer.device == "cuda":
            entry.peak_bytes = torch.cuda.max_memory_allocated()
        results.put(entry)
    assert entry.ms is not None  # at least one repeat
    speed = f"{entry.ms['median']:.2f} ms a step, {entry.tokens_per_second:,.0f} tokens/s"
    print(f"{variant.stage} in PyTorch ({entry.variant}): {speed}", flush=True)


def host_batch(batch: Mapping[str, Any], pin: bool = False) -> Batch:
    """A batch of ours for transformers, which shifts the labels itself: tokens and labels [B, T], int64."""
    labels = np.full(batch["tokens"].shape, -100, np.int64)
    labels[:, 1:] = np.where(batch["loss_weights"] > 0, batch["targets"], -100)[:, :-1]
    tensors = {"tokens": torch.from_numpy(batch["tokens"].astype(np.int64)), "labels": torch.from_numpy(labels)}
    return {name: x.pin_memory() for name, x in tensors.items()} if pin else tensors


def loss_and_gradients(decoder: Any, name: str, stage: StageConfig, batch: Batch) -> torch.Tensor:
    """The loss of a stage on a batch, its gradients added to the parameters'."""
    parts = [dict(zip(batch, part, strict=True)) for part in _micro_batches(batch, stage.grad_accum)]
    total: Any = sum(_LOSSES[name](decoder, stage, part, 1 / len(parts)) for part in parts)
    return total


def _micro_batches(batch: Batch, count: int) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(x.chunk(count) for x in batch.values()), strict=True)


def _transfer(decoder: Any, stage: StageConfig, batch: Batch, share: float) -> torch.Tensor:
    layers = torch_model.attentions(decoder)
    for layer in layers:
        layer.transfer = share * stage.mse_weight / len(layers)
    with torch.no_grad():
        decoder.model(input_ids=batch["tokens"], use_cache=False)
    losses: list[Any] = [layer.loss for layer in layers]  # each has run
    return torch.stack(losses).sum()


def _finetune(decoder: Any, stage: StageConfig, batch: Batch, share: float) -> torch.Tensor:
    loss = share * decoder(input_ids=batch["tokens"], labels=batch["labels"], use_cache=False).loss
    loss.backward()
    return loss.detach()


_LOSSES = {"stage1": _transfer, "stage2": _finetune}


def make_step(decoder: Any, name: str, stage: StageConfig, device: str) -> Step:
    """One optimizer step on a batch on the device; returns the loss without waiting for it."""
    parameters = torch_model.trainable_parameters(decoder)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=stage.learning_rate,
        betas=(stage.b1, stage.b2),
        weight_decay=stage.weight_decay,
        fused=device == "cuda",
    )
    steps = stage.steps or int(stage.epochs * stage.data.num_samples / stage.batch_size)
    warmup = max(1, math.ceil(stage.warmup_fraction * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: min(1.0, (count + 1) / warmup))

    def step(batch: Batch) -> torch.Tensor:
        loss = loss_and_gradients(decoder, name, stage, batch)
        if stage.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, stage.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def _seconds(run: Callable[[], None], count: int, device: str) -> float:
    """Seconds per call: on a GPU between two events on the stream, with the device idle before and after."""
    if device != "cuda":
        started = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - started) / count
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def _release(device: str) -> None:
    """Give the last variant's memory back before the next one counts its own."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _entry(config: Config, request: Request, stage: str, variant: str) -> Measurement:
    settings = getattr(config, stage)
    return Measurement("torch", stage, variant, request.batch.get(stage) or settings.batch_size, settings.seq_length)


def _all_failed(config: Config, request: Request, results: Results, problem: str) -> None:
    print(f"peer: not measured: {problem}", file=sys.stderr, flush=True)
    for stage in request.stages:
        entry = _entry(config, request, stage, "")
        entry.problem = problem
        results.put(entry)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

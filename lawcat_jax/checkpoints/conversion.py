"""Conversion of a whole checkpoint, and the check that the result is what was read."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lawcat_jax.checkpoints import delta
from lawcat_jax.checkpoints.delta import check_delta_target, is_delta
from lawcat_jax.checkpoints.hf import values
from lawcat_jax.checkpoints.hf.mapping import flatten
from lawcat_jax.checkpoints.hf.peft import write_adapter
from lawcat_jax.checkpoints.hf.read import progress_bar
from lawcat_jax.checkpoints.hf.write import MAX_SHARD_BYTES, write_hf
from lawcat_jax.checkpoints.logits import (
    compare_logits,
    random_tokens,
    require_torch,
    student_logits,
    suspects,
    teacher_logits,
)
from lawcat_jax.checkpoints.model_dir import (
    MODEL_JSON,
    ModelBundle,
    OpenedCheckpoint,
    in_run,
    is_remote,
    load_model,
    open_checkpoint,
    resolve_dtype,
    save_model,
    takes_base,
)
from lawcat_jax.checkpoints.transformers_export import write_transformers
from lawcat_jax.errors import UserError
from lawcat_jax.files import check_target, read_json


def convert(
    source: str,
    target: str,
    *,
    to: str = "model",
    dtype: str = "keep",
    revision: str | None = None,
    base: str | None = None,
    adapter: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: bool = False,
    overwrite: bool = False,
) -> None:
    """Read ``source``, write ``target``, print what was done.

    Args:
      source: HF directory, hub id, GGUF file, model directory, folder of a run, student's small file, PEFT adapter,
        ``asset:...`` or ``package:...``.
      target: directory to create; a file ``*.safetensors`` with ``to="delta"``.
      to: one of :data:`KINDS`.
      dtype: of the pretrained weights, with ``to="delta"`` of what was trained; ``keep`` for the stored one.
      revision: of a hub repository.
      base: the model that a student's small file or an adapter belongs to; with ``to="delta"`` the teacher to compare the
        student with.
      adapter: directory of a PEFT adapter to merge into ``source``.
      max_shard_bytes: size of one safetensors file of a Hugging Face directory.
      verify: read the result once more and compare it with the source (see :func:`_verify`).
      overwrite: replace an existing target, if it is a model that this program wrote.

    Raises:
      UserError: anything wrong with source or target; no target is left behind.
    """
    if to not in KINDS:
        raise UserError(f"unknown target kind {to!r}; one of {', '.join(KINDS)}")
    if verify and to == "peft":
        raise UserError("--verify compares whole models; it does not go with --to=peft")
    if verify and to != "delta":
        require_torch()
    if max_shard_bytes < 1:
        raise UserError("--max_shard_gb must be positive")
    start = time.monotonic()
    source, run = in_run(source)
    if adapter is not None:
        source, base = _adapter_with_base(source, adapter, base)
    joined = takes_base(source)
    if joined and not is_delta(source) and (verify or to == "peft"):
        raise UserError(f"{'--verify' if verify else '--to=peft'} does not go with an adapter that is merged")
    if to == "delta":
        check_delta_target(target, overwrite=overwrite)
    else:
        check_target(target, overwrite=overwrite, sources=[source] if os.path.exists(source) else [])
    opened = open_checkpoint(source, revision, base if joined or to != "delta" else None)
    if to != "delta":
        check_target(target, overwrite=overwrite, sources=[opened.directory])
    is_student = opened.attention is not None
    if is_student != (to in _OF_STUDENTS) and to != "model":
        raise UserError(_wrong_kind(source, to, is_student))
    if verify and to == "delta" and base is None and _local(opened.extra.get("source")) is None:
        raise UserError("--verify joins the file with its teacher, which is not on this machine: name it with --base")
    if verify and to == "model" and not joined and opened.directory.is_file() and _beyond_gguf(opened):
        raise UserError(
            "--verify compares with transformers, which ignores rope scaling and sliding windows of GGUF files, and "
            f"{source} has them; leave it out"
        )
    with progress_bar(_weight_bytes(opened), f"reading {source}") as progress, values.counted() as small:
        bundle = ModelBundle(
            opened.model,
            opened.attention,
            opened.lora,
            opened.params(dtype="keep" if to == "delta" else dtype, progress=progress),
            opened.tokenizer_path,
            opened.extra,
        )
    job = _Job(
        bundle, source, opened.directory, target, run, resolve_dtype(dtype), revision, base, max_shard_bytes, overwrite
    )
    bad = values.not_finite(bundle.params)
    with values.counted() as written:
        KINDS[to](job)
    for counts in (small, written):
        if counts.zero or counts.denormal:
            _warn(f"{source}: {counts}")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        _warn(f"{source}: NaN or infinity in {', '.join(bad[:5])}{more}; {target} has them too, and gives no text")
    print(f"wrote {target}: {_summary(bundle, Path(target), to)} in {time.monotonic() - start:.1f} s", flush=True)
    if verify:
        _verify(job, to=to, exact=dtype == "keep")


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _adapter_with_base(source: str, adapter: str, base: str | None) -> tuple[str, str]:
    """(source, base) of ``--adapter=<adapter> --source=<source>``."""
    if takes_base(source):
        raise UserError(f"--source={source} is an adapter itself or a student's small file; name a model")
    if base is not None:
        raise UserError("--base goes with an adapter as --source; with --adapter its model is --source")
    if not takes_base(adapter) or is_delta(adapter):
        raise UserError(f"--adapter={adapter}: no directory of a PEFT adapter (adapter_config.json)")
    return adapter, source


class _Job(NamedTuple):
    """What is written where. ``dtype`` is None for "as stored"."""

    bundle: ModelBundle
    source: str
    directory: Path
    target: str
    run: Path | None
    dtype: np.dtype | None
    revision: str | None
    base: str | None
    max_shard_bytes: int
    overwrite: bool

    @property
    def origin(self) -> str | None:
        """The pretrained model as its first reader named it."""
        return self.bundle.extra.get("source")


def _to_model(job: _Job) -> None:
    bundle = job.bundle
    save_model(
        job.target,
        model=bundle.model,
        attention=bundle.attention,
        lora=bundle.lora,
        params=bundle.params,
        tokenizer_source=bundle.tokenizer_path,
        extra=bundle.extra,
        overwrite=job.overwrite,
    )


def _to_hf(job: _Job) -> None:
    bundle = job.bundle
    if bundle.attention is not None:
        adapters = ", its adapters are merged" if bundle.lora is not None else ""
        print(f"{job.target}: the softmax model behind the student; its linear attention is left out{adapters}")
    with progress_bar(_bytes(bundle.params), f"writing {job.target}") as progress:
        write_hf(
            job.target,
            model=bundle.model,
            params=bundle.params,
            attention=bundle.attention,
            lora=bundle.lora,
            tokenizer_source=bundle.tokenizer_path,
            max_shard_bytes=job.max_shard_bytes,
            overwrite=job.overwrite,
            progress=progress,
        )


def _to_transformers(job: _Job) -> None:
    bundle = job.bundle
    assert bundle.attention is not None  # of a student, which the job was checked to be
    with progress_bar(_bytes(bundle.params), f"writing {job.target}") as progress:
        write_transformers(
            job.target,
            model=bundle.model,
            attention=bundle.attention,
            lora=bundle.lora,
            params=bundle.params,
            tokenizer_source=bundle.tokenizer_path,
            extra=bundle.extra,
            recipe=recipe_of(job.run),
            max_shard_bytes=job.max_shard_bytes,
            overwrite=job.overwrite,
            progress=progress,
        )


def _to_peft(job: _Job) -> None:
    bundle = job.bundle
    if bundle.lora is None:
        raise UserError(f"{job.source}: has no LoRA adapters to write; --to=peft needs a student that has them")
    write_adapter(
        job.target,
        model=bundle.model,
        attention=bundle.attention,
        lora=bundle.lora,
        params=bundle.params,
        base_model=job.origin,
        overwrite=job.overwrite,
    )
    print(
        f"{job.target}: the adapters alone, which on softmax attention are another model than the student; "
        "the student leaves with --to=transformers or --to=delta"
    )


def _to_delta(job: _Job) -> None:
    bundle, leaves = job.bundle, dict(flatten(job.bundle.params))
    teacher = job.base or _local(job.origin)
    weights = delta.record(leaves)
    if teacher is not None:  # a student whose pretrained part was trained as well is more than its small file
        revision = bundle.extra.get("revision") if is_remote(teacher) else None
        found = dict(flatten(load_model(teacher, revision=revision, dtype="keep").params))
        found = {path: leaf for path, leaf in found.items() if not delta.is_trained(path)}
        try:
            delta.check_base(found, weights, where=teacher, student=job.source)
        except UserError as problem:
            raise UserError(
                f"{problem}; if it is the teacher, stage 2 trained the pretrained weights too, and the student leaves "
                "as a whole only (--to=model, --to=transformers)"
            ) from problem
    else:
        print(
            f"{job.origin or 'the teacher'} is not on this machine: not checked that the student's weights are its own"
        )
    assert bundle.attention is not None  # of a student, which the job was checked to be
    delta.write_delta(
        job.target,
        model=bundle.model,
        attention=bundle.attention,
        lora=bundle.lora,
        params=leaves,
        teacher=job.origin or job.base,
        revision=bundle.extra.get("revision"),
        weights=weights,
        extra=bundle.extra,
        recipe=recipe_of(job.run),
        dtype=job.dtype,
        overwrite=job.overwrite,
    )


def _beyond_gguf(opened: OpenedCheckpoint) -> bool:
    return opened.model.rope_scaling.kind != "none" or opened.model.sliding_window is not None


def recipe_of(run: Path | None) -> dict[str, Any] | None:
    """Configuration, versions and results of the run in a folder, from its manifest; None if there is none."""
    if run is None or not (run / "manifest.json").is_file():
        return None
    manifest = read_json(run / "manifest.json")
    return {name: manifest[name] for name in ("config", "results", "git", "versions") if name in manifest}


def _local(source: str | None) -> str | None:
    """``source`` if it can be read without a download."""
    return (
        source if source and (source.startswith(("asset:", "package:")) or Path(source).expanduser().exists()) else None
    )


KINDS: dict[str, Callable[[_Job], None]] = {
    "model": _to_model,
    "hf": _to_hf,
    "hf-base": _to_hf,
    "transformers": _to_transformers,
    "peft": _to_peft,
    "delta": _to_delta,
}
"""What can be written: a model directory, a Hugging Face checkpoint, the same of a student's softmax model, a student
with its own torch code, LoRA adapters for PEFT, a student's small file."""

_OF_STUDENTS = ("hf-base", "transformers", "peft", "delta")
_LEFT_OUT: dict[str, Callable[[str], bool]] = {  # parameters by path; of the other kinds none
    "hf-base": delta.is_trained,
    "peft": lambda path: not path.startswith("lora/"),
    "delta": lambda path: not delta.is_trained(path),
}


def _wrong_kind(source: str, to: str, is_student: bool) -> str:
    if is_student:
        return (
            f"{source} is a student, and --to={to} has no place for its linear attention: take --to=transformers "
            "(the student as a Hugging Face model) or --to=hf-base (the softmax model behind it, mixers left out)"
        )
    if to == "peft":
        return f"{source}: has no LoRA adapters to write; --to=peft needs a student"
    return f"{source} is no student; --to={to} needs one"


def _bytes(params: Any) -> int:
    return sum(leaf.nbytes for _, leaf in flatten(params))


def _summary(bundle: ModelBundle, target: Path, to: str) -> str:
    """What was written: parameters by kind, and the bytes of the files."""
    left_out = _LEFT_OUT.get(to, lambda path: False)
    leaves = [leaf for path, leaf in flatten(bundle.params) if not left_out(path)]
    count, kinds = sum(leaf.size for leaf in leaves), ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
    files = [target] if target.is_file() else [file for file in target.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    name = f"{bundle.model.family}, {bundle.model.num_layers} layers"
    return f"{name}, {count / 1e6:,.1f} M parameters, {kinds}, {size / 1e9:.3g} GB"


def _weight_bytes(opened: OpenedCheckpoint) -> int | None:
    """Bytes that reading will report (of GGUF after dequantisation), None where that is not known."""
    return getattr(opened.reader, "nbytes", None)


def _verify(job: _Job, *, to: str, exact: bool) -> None:
    """Compare the result of a conversion with its source, and print how they differ.

    Model directories and Hugging Face checkpoints: logits of one side here against those of the other in transformers.
    A student's small file: joined again, bit for bit.
    """
    source, target = job.source, Path(job.target)
    if to == "delta":
        base = job.base or job.origin
        again = dict(flatten(load_model(target, base=base, dtype="keep").params))
        before = dict(flatten(job.bundle.params))
        same = all(np.array_equal(again[path], before[path], equal_nan=True) for path in before)
        if not same and exact:
            raise UserError(f"{target}: joined with {base} it is not {source}; do not use it, and report this")
        print(f"verify: joined with {base} it is the source {'bit for bit' if same else 'up to rounding'}", flush=True)
        return
    job.bundle.params = {}  # make room
    tokens, trust = random_tokens(job.bundle.model), False
    before = load_model(source, revision=job.revision, base=job.base, dtype="float32")
    with tempfile.TemporaryDirectory() as scratch:
        if to == "model":
            after = load_model(target, dtype="float32")
            _check_trained(before, after, target)
            here, reference = teacher_logits(after, tokens), job.directory
            if before.attention is not None and not (job.directory / MODEL_JSON).is_file() and not is_delta(source):
                here, trust = student_logits(after, tokens), True  # an exported student
            elif (job.directory / MODEL_JSON).is_file() or is_delta(source):
                reference = Path(scratch) / "hf"  # of our own formats the counterpart exists only once it is written
                write_hf(reference, model=before.model, params={k: v for k, v in before.params.items() if k != "lora"})
        elif to == "transformers":
            here, reference, trust = student_logits(before, tokens), target, True
        else:
            if before.lora is not None and before.attention is not None:
                from lawcat_jax.models import merge_lora

                before.params = merge_lora(before.params, before.lora, before.attention)
            here, reference = teacher_logits(dataclasses.replace(before, lora=None), tokens), target
        del before
        result = compare_logits(here, reference, tokens, trust_remote_code=trust)
    print(
        f"verify: {result['tokens']} random tokens, max abs difference of logits {result['max_abs']:.3g} "
        f"(largest logit {result['scale']:.3g}), KL(transformers || here) {result['kl']:.3g} nats per token",
        flush=True,
    )
    if not np.isfinite(result["kl"]):
        raise UserError(f"{target}: {_not_finite(target)}")
    # Rounding to another dtype moves logits by itself; the same weights must agree to float32 rounding.
    if exact and result["kl"] > 1e-4:
        raise UserError(
            f"{target}: logits differ from transformers beyond rounding; do not use it{suspects(reference, job.bundle.attention)}"
        )


def _not_finite(target: str | Path) -> str:
    """Which weights make the logits of a model NaN or infinite."""
    bad = values.not_finite(load_model(target, dtype="keep").params)
    if bad:
        return f"NaN or infinity in {', '.join(bad[:5])}, as in the source; the logits cannot be compared"
    return "all weights are finite, but the logits are not, here or in transformers: values overflow; do not use it"


def _check_trained(before: ModelBundle, after: ModelBundle, target: Path) -> None:
    """Mixers and adapters are never rounded on the way."""
    old, new = ({p: leaf for p, leaf in flatten(b.params) if delta.is_trained(p)} for b in (before, after))
    if old.keys() != new.keys() or not all(np.array_equal(old[path], new[path], equal_nan=True) for path in old):
        raise UserError(f"{target}: mixers or adapters are not those of the source; do not use it, and report this")

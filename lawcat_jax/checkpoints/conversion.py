"""Conversion of a whole checkpoint, and the comparison of its logits with ``transformers``."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path

import numpy as np

from lawcat_jax.checkpoints.hf.mapping import flatten
from lawcat_jax.checkpoints.hf.merge import base_of, is_adapter, merge_adapter
from lawcat_jax.checkpoints.hf.peft import write_adapter
from lawcat_jax.checkpoints.hf.read import progress_bar
from lawcat_jax.checkpoints.hf.write import MAX_SHARD_BYTES, write_hf
from lawcat_jax.checkpoints.model_dir import MODEL_JSON, ModelBundle, load_model, locate, open_checkpoint, save_model
from lawcat_jax.errors import UserError
from lawcat_jax.files import check_target

VERIFY_TOKENS = (2, 64)  # sequences, tokens: enough to see a wrong rotary scaling, cheap for 7B on a CPU


def convert(
    source: str,
    target: str,
    *,
    to: str = "model",
    dtype: str = "keep",
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: bool = False,
    overwrite: bool = False,
    base: str | None = None,
    adapter: str | None = None,
) -> None:
    """Read ``source``, write ``target``, print what was done.

    Args:
      source: HF directory, hub id, GGUF file, model directory, ``asset:...`` or ``package:...``.
      target: directory to create.
      to: ``model`` (model directory), ``hf`` (Hugging Face directory, LoRA merged) or ``peft`` (adapter).
      dtype: of the pretrained weights, ``keep`` for the stored one.
      revision: of a hub repository.
      max_shard_bytes: size of one safetensors file with ``to='hf'``.
      verify: load the result once more and compare its logits with transformers, both in float32.
      overwrite: replace an existing target.
      base: where ``source`` is the directory of a PEFT adapter: the model to merge it into; None is the one that it names.
      adapter: directory of a PEFT adapter to merge into ``source``.

    Raises:
      UserError: anything wrong with source or target; no target is left behind.
    """
    check_target(target, overwrite=overwrite)
    if verify and to == "peft":
        raise UserError("--verify compares whole models; it does not go with --to=peft")
    if verify:
        _require_torch()
    if max_shard_bytes < 1:
        raise UserError("--max_shard_gb must be positive")
    start = time.monotonic()
    source, adapter = _adapter_and_base(source, adapter, base)
    if adapter is not None and (verify or to == "peft"):
        raise UserError(f"{'--verify' if verify else '--to=peft'} does not go with an adapter that is merged")
    directory = locate(source, revision)
    if Path(target).exists() and directory.resolve() == Path(target).resolve():
        raise UserError(f"source and target are the same directory: {target}")
    with progress_bar(_weight_bytes(directory), f"reading {source}") as progress:
        bundle = load_model(str(directory), dtype=dtype, progress=progress)
    if adapter is not None:
        if bundle.attention is not None:
            raise UserError(f"{source} is a student; an adapter is merged into the model that it was trained on")
        bundle.params = merge_adapter(Path(adapter).expanduser(), bundle.model, bundle.params)
        bundle.extra = {**bundle.extra, "source": source, "adapter": str(adapter)}
    total = sum(leaf.nbytes for _, leaf in flatten(bundle.params))
    own = (directory / MODEL_JSON).is_file()
    origin = bundle.extra.get("source") if own else source
    if to == "model":
        save_model(
            target,
            model=bundle.model,
            attention=bundle.attention,
            lora=bundle.lora,
            params=bundle.params,
            tokenizer_source=bundle.tokenizer_path,
            extra=bundle.extra if own or adapter else {"source": source},
            overwrite=overwrite,
        )
    elif to == "hf":
        with progress_bar(total, f"writing {target}") as progress:
            write_hf(
                target,
                model=bundle.model,
                params=bundle.params,
                attention=bundle.attention,
                lora=bundle.lora,
                tokenizer_source=bundle.tokenizer_path,
                max_shard_bytes=max_shard_bytes,
                overwrite=overwrite,
                progress=progress,
            )
    elif to == "peft":
        if bundle.lora is None:
            raise UserError(f"{source}: has no LoRA adapters to write; --to=peft needs a student")
        write_adapter(
            target,
            model=bundle.model,
            attention=bundle.attention,
            lora=bundle.lora,
            params=bundle.params,
            base_model=origin,
            overwrite=overwrite,
        )
    else:
        raise UserError(f"unknown target kind {to!r}; one of model, hf, peft")
    print(f"wrote {target}: {_summary(bundle, target, to)} in {time.monotonic() - start:.1f} s", flush=True)
    if verify:
        del bundle
        _verify(directory, Path(target), to=to, exact=dtype == "keep")


def _adapter_and_base(source: str, adapter: str | None, base: str | None) -> tuple[str, str | None]:
    """(the model to read, the adapter to merge into it or None)."""
    if is_adapter(Path(source).expanduser()):
        if adapter is not None:
            raise UserError(f"--source={source} is an adapter itself; name a model, or leave --adapter out")
        base = base or base_of(Path(source).expanduser())
        if base is None:
            raise UserError(f"{source} is an adapter that names no base model; name it with --base=")
        return base, source
    if base is not None:
        raise UserError(f"--base goes with an adapter, and --source={source} is none")
    if adapter is not None and not is_adapter(Path(adapter).expanduser()):
        raise UserError(f"--adapter={adapter}: no directory of a PEFT adapter (adapter_config.json)")
    return source, adapter


def _summary(bundle: ModelBundle, target: str, to: str) -> str:
    """What was written: parameters by kind, and the bytes of the files."""
    left_out = {"model": (), "hf": ("mixers/", "lora/")}.get(
        to, ("embed/", "layers/", "final_norm/", "lm_head/", "mixers/")
    )
    leaves = [leaf for path, leaf in flatten(bundle.params) if not path.startswith(left_out)]
    count, kinds = sum(leaf.size for leaf in leaves), ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
    size = sum(file.stat().st_size for file in Path(target).rglob("*") if file.is_file())
    name = f"{bundle.model.family}, {bundle.model.num_layers} layers"
    return f"{name}, {count / 1e6:,.1f} M parameters, {kinds}, {size / 1e9:.3g} GB"


def _weight_bytes(directory: Path) -> int | None:
    if directory.is_file():  # GGUF: what is counted are the bytes after dequantisation
        return open_checkpoint(directory).nbytes
    return sum(file.stat().st_size for file in directory.glob("model*.safetensors") if file.is_file()) or None


def _require_torch() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--verify needs {' and '.join(missing)}: pip install {' '.join(missing)}; or leave it out")


def _verify(source: Path, target: Path, *, to: str, exact: bool) -> None:
    """Print the differences of logits between the result of a conversion and ``transformers``."""
    with tempfile.TemporaryDirectory() as scratch:
        if to == "hf":
            reference, ours = target, target
        elif not (source / MODEL_JSON).is_file():
            reference, ours = source, target
        else:  # a model directory was copied: its counterpart exists only once it is written
            reference, ours = Path(scratch) / "hf", target
            bundle = load_model(target, dtype="keep")
            write_hf(reference, model=bundle.model, params={k: v for k, v in bundle.params.items() if k != "lora"})
        result = compare_with_transformers(ours, reference)
    print(
        f"verify: {result['tokens']} random tokens, max abs difference of logits {result['max_abs']:.3g} "
        f"(largest logit {result['scale']:.3g}), KL(transformers || here) {result['kl']:.3g} nats a token",
        flush=True,
    )
    if not np.isfinite(result["kl"]):
        raise UserError(f"{target}: {_not_finite(target)}")
    # Rounding to another dtype moves logits by itself; the same weights must agree to float32 rounding.
    if exact and result["kl"] > 1e-4:
        raise UserError(f"{target}: logits differ from transformers beyond rounding; do not use it, and report this")


def _not_finite(target: Path) -> str:
    """Which weights make the logits of a model NaN or infinite."""
    leaves = flatten(load_model(target, dtype="keep").params)
    bad = [path for path, leaf in leaves if not np.isfinite(leaf.astype(np.float32)).all()]
    if bad:
        return f"NaN or infinity in {', '.join(bad[:5])}, as in the source; the logits cannot be compared"
    return "all weights are finite, but the logits are not, here or in transformers: values overflow; do not use it"


def compare_with_transformers(ours: Path, reference: Path, *, seed: int = 0) -> dict[str, float]:
    """Logits of the teacher in ``ours`` against ``transformers`` on ``reference`` (HF directory or GGUF file), in float32.

    Returns:
      ``max_abs`` (largest absolute difference), ``scale`` (largest absolute logit), ``kl``
      (KL(reference || ours), nats, mean over tokens) and ``tokens``.

    Raises:
      UserError: either cannot be loaded, or torch is not installed.
    """
    _require_torch()
    bundle = load_model(ours, dtype="float32")
    tokens = np.random.default_rng(seed).integers(0, bundle.model.vocab_size, VERIFY_TOKENS).astype(np.int32)
    here = teacher_logits(bundle, tokens)
    del bundle
    import torch
    import transformers

    where = (reference.parent, {"gguf_file": reference.name}) if reference.is_file() else (reference, {})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        where[0], **where[1], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        there = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    log_p, log_q = _log_softmax(there), _log_softmax(here)
    return {
        "max_abs": float(np.max(np.abs(here - there))),
        "scale": float(np.max(np.abs(there))),
        "kl": float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))),
        "tokens": tokens.size,
    }


def teacher_logits(bundle: ModelBundle, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] logits of the softmax model for int32 [B, T] tokens."""
    import jax

    from lawcat_jax import models

    graphdef, _ = models.abstract(bundle.model, bundle.attention, bundle.lora)
    with jax.default_matmul_precision("float32"):
        forward = jax.jit(lambda params, x: models.bind(graphdef, params)(x, as_teacher=True))
        return np.asarray(forward(bundle.params, tokens), np.float32)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))

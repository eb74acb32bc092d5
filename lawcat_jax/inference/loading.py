"""From the ``--checkpoint`` of a command line to a decoder on the device and its tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lawcat_jax.data.tokenize import Tokenizer, load_tokenizer
from lawcat_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A decoder ready to run. ``directory`` is where reports go: the run's folder, or None for a hub id or asset."""

    graphdef: Any
    params: Any
    tokenizer: Tokenizer
    is_student: bool
    eos_ids: tuple[int, ...]
    extra: dict[str, Any]
    directory: Path | None


def load_for_inference(
    checkpoint: str, *, revision: str | None = None, dtype: str = "auto", tokenizer: str | None = None
) -> LoadedModel:
    """Load a model directory, the working directory of a finished run, a Hugging Face directory or hub id, or
    ``asset:<name>``, onto the default device.

    Raises:
      UserError: nothing loadable under that name, or no tokenizer beside it.
    """
    if not checkpoint:
        raise UserError(
            "--checkpoint is missing: a model directory, a Hugging Face directory or hub id, or asset:<name>"
        )
    source, directory = _resolve(checkpoint)

    import jax

    from lawcat_jax.checkpoints.model_dir import load_model
    from lawcat_jax.models import abstract

    bundle = load_model(source, revision=revision, dtype=dtype)
    if not (tokenizer or bundle.tokenizer_path):
        raise UserError(
            f"{checkpoint}: no tokenizer in the checkpoint; name one with --tokenizer=<directory or hub id>"
        )
    graphdef, _ = abstract(bundle.model, bundle.attention, bundle.lora)
    loaded = load_tokenizer(tokenizer or bundle.tokenizer_path)
    eos_ids = tuple(bundle.model.eos_token_ids) or tuple(token for token in (loaded.eos_token_id,) if token is not None)
    size = bundle.model.vocab_size
    if (
        loaded.vocab_size > size
    ):  # without added tokens, which some checkpoints have beyond the vocabulary and never use
        raise UserError(
            f"{checkpoint}: the tokenizer has {loaded.vocab_size} tokens, the model's vocabulary only {size}"
        )
    return LoadedModel(
        graphdef,
        jax.device_put(bundle.params),
        loaded,
        bundle.attention is not None,
        eos_ids,
        dict(bundle.extra or {}),
        directory,
    )


def _resolve(checkpoint: str) -> tuple[str, Path | None]:
    """The model directory of a working directory is ``student`` or ``teacher`` in it."""
    path = Path(checkpoint).expanduser()
    if checkpoint.startswith("asset:") or not path.exists():
        return checkpoint, None
    if path.suffix == ".gguf":
        return checkpoint, None
    if not path.is_dir():
        raise UserError(f"checkpoint {checkpoint!r} is a file; give the directory of a model")
    if not any((path / name).exists() for name in ("model.json", "config.json")):
        for name in ("student", "teacher"):
            if (path / name / "model.json").exists():
                return str(path / name), path
    inside_run = path.resolve().name in ("student", "teacher") and (path.resolve().parent / "manifest.json").exists()
    return str(path), path.resolve().parent if inside_run else path

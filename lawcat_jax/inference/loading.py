"""From the ``--checkpoint`` of a command line to a decoder on the device and its tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lawcat_jax.config.choices import Bos
from lawcat_jax.data.tokenize import Tokenizer, fit_embedding, load_tokenizer, set_bos_rule
from lawcat_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FoundCheckpoint:
    """What is known of a checkpoint before its weights are read.

    Attributes:
      source: what ``lawcat_jax.checkpoints.model_dir.load_model`` takes: the model directory of a run, or the name as
        it was given.
      run: the folder of the run that the model belongs to, which reports may be written into; None for all others.
      tokenizer: as the checkpoint has it, or the one asked for.
      extra: what the writer of a model directory left in it, e.g. ``training_length`` and ``eval``.
    """

    source: str
    run: Path | None
    tokenizer: Tokenizer
    extra: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A decoder ready to run.

    Attributes:
      graphdef, params: see ``lawcat_jax.models``; the parameters are on the device.
      tokenizer: the checkpoint's, or the one asked for.
      is_student: whether it has linear attention; a student's teacher is in the same parameters.
      eos_ids: the tokens that end an answer.
      extra: see :class:`FoundCheckpoint`.
      directory: the folder of the run that the model belongs to, or None.
    """

    graphdef: Any
    params: Any
    tokenizer: Tokenizer
    is_student: bool
    eos_ids: tuple[int, ...]
    extra: dict[str, Any]
    directory: Path | None


def find_checkpoint(
    checkpoint: str,
    *,
    revision: str | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    add_bos: Bos | None = None,
) -> FoundCheckpoint:
    """Look a checkpoint up without reading its weights; arguments and errors as in :func:`load_for_inference`."""
    if not checkpoint:
        raise UserError(
            "--checkpoint is missing: a model directory, a Hugging Face directory or hub id, or asset:<name>"
        )
    from lawcat_jax.checkpoints.model_dir import in_run, open_checkpoint

    source, run = in_run(checkpoint)
    opened = open_checkpoint(source, revision, base)
    files = tokenizer or opened.tokenizer_path
    if files is None:
        raise UserError(
            f"{checkpoint}: no tokenizer in the checkpoint; name one with --tokenizer=<directory or hub id>"
        )
    extra = opened.extra
    # As the model was trained; students of earlier versions saw bos wherever there was one.
    rule: Bos = add_bos or extra.get("add_bos") or ("always" if extra.get("stage") else "auto")
    return FoundCheckpoint(source, run, set_bos_rule(load_tokenizer(files), rule), extra)


def load_for_inference(
    checkpoint: str,
    *,
    revision: str | None = None,
    base: str | None = None,
    dtype: str = "auto",
    tokenizer: str | None = None,
    add_bos: Bos | None = None,
) -> LoadedModel:
    """Load a checkpoint onto the default device.

    Args:
      checkpoint: a model directory, the folder of a finished run, a Hugging Face directory or hub id,
        ``asset:<name>``, a student's small file, or a PEFT adapter.
      revision: of a hub repository.
      base: the model that a student's small file or a PEFT adapter belongs to; by default the one that it names.
      dtype: of the pretrained weights: ``auto`` (bfloat16 on accelerators, float32 on CPU), ``float32``, ``bfloat16``.
      tokenizer: directory or hub id of a tokenizer to use instead of the checkpoint's.
      add_bos: whether prompts and texts begin with the bos token; None is as the model was trained, else ``auto``.

    Raises:
      UserError: nothing loadable under that name, no tokenizer beside it, or one that does not fit the vocabulary.
    """
    found = find_checkpoint(checkpoint, revision=revision, base=base, tokenizer=tokenizer, add_bos=add_bos)

    import jax

    from lawcat_jax.checkpoints.model_dir import load_model
    from lawcat_jax.models import abstract, for_this_machine

    bundle = load_model(found.source, revision=revision, base=base, dtype=dtype)
    graphdef, _ = abstract(bundle.model, for_this_machine(bundle.attention), bundle.lora)
    end = fit_embedding(found.tokenizer, bundle.model.vocab_size, checkpoint).eos_token_id
    return LoadedModel(
        graphdef,
        jax.device_put(bundle.params),
        found.tokenizer,
        bundle.attention is not None,
        tuple(bundle.model.eos_token_ids) or (() if end is None else (end,)),
        dict(bundle.extra or {}),
        found.run,
    )

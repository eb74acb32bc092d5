"""Evaluate a model.

    python -m lawcat_jax.evaluate --checkpoint=<dir> --tasks=passkey --lengths=256,512,1024
    python -m lawcat_jax.evaluate --checkpoint=<dir> --tasks=perplexity --text=book.txt --lengths=1024

Writes ``eval/<task>.json`` and ``eval/passkey.png`` beside the model (``--output`` names another folder).
"""

from __future__ import annotations

import dataclasses

from absl import flags

from lawcat_jax.command_line import no_arguments, run_main
from lawcat_jax.config import EvalConfig, from_dict
from lawcat_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Model directory, folder of a run, Hugging Face directory or hub id, or asset:tiny_llama."
)
_TASKS = flags.DEFINE_list("tasks", None, "Of passkey, perplexity. Default: those of the checkpoint, else passkey.")
_LENGTHS = flags.DEFINE_list("lengths", None, "Context lengths in tokens. Default: those of the checkpoint.")
_SAMPLES = flags.DEFINE_integer("samples", None, "Samples a length.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Samples generated together.", lower_bound=1)
_TEACHER = flags.DEFINE_bool("teacher", False, "Evaluate the student's teacher beside it.")
_FORM = flags.DEFINE_enum("form", None, ["landmark", "train"], "Wording of the passkey task.")
_SEED = flags.DEFINE_integer("seed", None, "Of the samples of --form=train.")
_TEXT = flags.DEFINE_string("text", None, "Text of the perplexity task: tfds:<name>, hf:<name>, or a path.")
_TEXT_KEY = flags.DEFINE_string("text_key", None, "Field of the text in its rows.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the reports. Default: eval/ beside the model.")
_REVISION = flags.DEFINE_string("revision", None, "Revision of a hub repository.")
_DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Of the frozen weights.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer directory or hub id, instead of the checkpoint's.")
_TRAINING_LENGTH = flags.DEFINE_integer("training_length", None, "In tokens, marked in the plot.")


def _settings(stored: dict) -> EvalConfig:
    """Flags over the checkpoint's own evaluation settings over the defaults."""
    known = {field.name for field in dataclasses.fields(EvalConfig)}
    settings = from_dict(EvalConfig, {name: value for name, value in stored.items() if name in known}, "eval")
    if _LENGTHS.value is not None:
        settings.lengths = tuple(_length(item) for item in _LENGTHS.value)
    if _TASKS.value is not None:
        settings.tasks = tuple(item.strip() for item in _TASKS.value if item.strip())
    for name, value in (
        ("samples", _SAMPLES.value),
        ("batch_size", _BATCH_SIZE.value),
        ("passkey_form", _FORM.value),
        ("seed", _SEED.value),
        ("text", _TEXT.value),
        ("text_key", _TEXT_KEY.value),
    ):
        if value is not None:
            setattr(settings, name, value)
    settings.teacher = _TEACHER.value
    problems = settings.problems("--")
    if problems:
        raise UserError("; ".join(problem.replace("--.", "--") for problem in problems))
    return settings


def _length(item: str) -> int:
    try:
        length = int(item)
    except ValueError:
        length = 0
    if length < 1:
        raise UserError(f"--lengths: {item!r} is not a number of tokens (use --lengths=256,512)")
    return length


def main(argv: list[str]) -> None:
    no_arguments(argv)
    _settings({})  # mistakes in the flags show before anything is loaded
    from lawcat_jax.inference.loading import load_for_inference
    from lawcat_jax.tasks.runner import evaluate_model

    model = load_for_inference(
        _CHECKPOINT.value, revision=_REVISION.value, dtype=_DTYPE.value, tokenizer=_TOKENIZER.value
    )
    evaluate_model(
        model.graphdef,
        model.params,
        model.tokenizer,
        _settings(model.extra.get("eval") or {}),
        model=_CHECKPOINT.value,
        output=_OUTPUT.value or (str(model.directory / "eval") if model.directory else "eval"),
        is_student=model.is_student,
        training_length=_TRAINING_LENGTH.value or model.extra.get("training_length"),
    )


if __name__ == "__main__":
    run_main(main)

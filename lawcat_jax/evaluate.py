"""Evaluate a model, or compare several.

    python -m lawcat_jax.evaluate --checkpoint=<dir> --tasks=passkey --lengths=256,512,1024
    python -m lawcat_jax.evaluate --checkpoint=<dir> --tasks=perplexity --text=book.txt --lengths=1024
    python -m lawcat_jax.evaluate --checkpoint=<dir> --tasks=niah_single_1,niah_single_2 --haystack=essays/
    python -m lawcat_jax.evaluate --checkpoint=<dir> --tasks=babilong_qa1 --haystack=tfds:pg19:test --babi=en-10k/
    python -m lawcat_jax.evaluate --checkpoint=<dir> --tasks=lm_eval:hellaswag,piqa [--lm_eval_tasks_dir=my_tasks/]
    python -m lawcat_jax.evaluate --checkpoint=long=runs/a --checkpoint=short=runs/b --lengths=1024,2048

Writes ``<task>.json``, ``<task>.md`` and ``<task>.png`` into ``eval/`` in the folder of a run, or into ``./eval_<name>/``
for any other model (``--output`` names another folder). Interrupted and run again, it goes on where it was.
"""

from __future__ import annotations

import typing

from absl import flags

from lawcat_jax.command_line import no_arguments, not_empty, run_main
from lawcat_jax.config import Bos, PasskeyForm, TaskName
from lawcat_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_multi_string(
    "checkpoint",
    [],
    "Model directory, folder of a run, Hugging Face directory or hub id, asset:tiny_llama, or a student's small file. "
    "Given several times (or separated by commas), each as name=checkpoint, they are compared.",
)
_TASKS = flags.DEFINE_list(
    "tasks",
    None,
    f"Of {', '.join(typing.get_args(TaskName))}; or lm_eval:<task> of lm-evaluation-harness, after which its other tasks "
    "need no lm_eval: of their own. Default: those of the first checkpoint, else passkey.",
)
_LENGTHS = flags.DEFINE_list("lengths", None, "Context lengths in tokens. Default: those of the first checkpoint.")
_SAMPLES = flags.DEFINE_integer("samples", None, "Samples of each length.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Samples generated together.", lower_bound=1)
_TEACHER = flags.DEFINE_bool("teacher", False, "Evaluate the student's teacher beside it.")
_FORM = flags.DEFINE_enum("form", None, list(typing.get_args(PasskeyForm)), "Wording of the passkey task.")
_SEED = flags.DEFINE_integer("seed", None, "Of the samples of S-NIAH, BABILong and --form=train.")
_TEXT = flags.DEFINE_string("text", None, "Text of the perplexity tasks: tfds:<name>, hf:<name>, or a path.")
_TEXT_KEY = flags.DEFINE_string("text_key", None, "Field of the text in its rows, also of the haystack.")
_BLOCK = flags.DEFINE_integer("position_block", None, "Positions of a row of perplexity_by_position.", lower_bound=1)
_HAYSTACK = flags.DEFINE_string(
    "haystack", None, "Essays or books of niah_single_2 and _3 and babilong_*: tfds:<name>, hf:<name>, or a path."
)
_BABI = flags.DEFINE_string("babi", None, "Directory of bAbI's en-10k files, for babilong_*.")
_LM_EVAL_DIR = flags.DEFINE_string(
    "lm_eval_tasks_dir", None, "Directory with task files (YAML) of your own for lm_eval: tasks."
)
_LM_EVAL_FEWSHOT = flags.DEFINE_integer(
    "lm_eval_fewshot", None, "Examples before each question of lm_eval: tasks. Default: the task's.", lower_bound=0
)
_LM_EVAL_LIMIT = flags.DEFINE_integer(
    "lm_eval_limit", None, "Samples of each lm_eval: task, the first ones. Default: all.", lower_bound=1
)
_LM_EVAL_CHAT = flags.DEFINE_bool("lm_eval_chat", None, "Write lm_eval: prompts in the form of the chat template.")
_PREFILL_CHUNK = flags.DEFINE_integer(
    "prefill_chunk", None, "Tokens of each prompt read at a time. Default: by the prompts' lengths.", lower_bound=0
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the reports. Default: eval/ of the run, else ./eval_<name>/.")
_REVISION = flags.DEFINE_string("revision", None, "Revision of a hub repository.")
_BASE = flags.DEFINE_string(
    "base", None, "Model that a student's small file or a PEFT adapter belongs to; default: the one that it names."
)
_DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Of the frozen weights.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer directory or hub id, instead of the checkpoint's.")
_ADD_BOS = flags.DEFINE_enum(
    "add_bos",
    None,
    list(typing.get_args(Bos)),
    "Beginning-of-sequence token in front. Default: as in training, else auto.",
)
_TRAINING_LENGTH = flags.DEFINE_integer("training_length", None, "In tokens, marked in the plot.")


def _length(item: str) -> int:
    try:
        length = int(item)
    except ValueError:
        length = -1
    if length < 0:
        raise UserError(f"--lengths: {item!r} is not a number of tokens (use --lengths=256,512)")
    return length


def main(argv: list[str]) -> None:
    no_arguments(argv)
    not_empty("--tasks", _TASKS.value)
    not_empty("--lengths", _LENGTHS.value)
    from lawcat_jax.tasks.compare import evaluate_checkpoints, split_tasks

    tasks, harness = (None, None) if _TASKS.value is None else split_tasks(_TASKS.value)
    settings = {
        "tasks": tasks,
        "lm_eval": harness,
        "lm_eval_tasks_dir": _LM_EVAL_DIR.value,
        "lm_eval_fewshot": _LM_EVAL_FEWSHOT.value,
        "lm_eval_limit": _LM_EVAL_LIMIT.value,
        "lm_eval_chat": _LM_EVAL_CHAT.value,
        "lengths": None if _LENGTHS.value is None else tuple(_length(item) for item in _LENGTHS.value),
        "samples": _SAMPLES.value,
        "batch_size": _BATCH_SIZE.value,
        "teacher": _TEACHER.value,
        "passkey_form": _FORM.value,
        "seed": _SEED.value,
        "text": _TEXT.value,
        "text_key": _TEXT_KEY.value,
        "position_block": _BLOCK.value,
        "haystack": _HAYSTACK.value,
        "babi": _BABI.value,
        "sample_seed": _SEED.value,
        "prefill_chunk": _PREFILL_CHUNK.value,
    }
    evaluate_checkpoints(
        _CHECKPOINT.value,
        settings,
        output=_OUTPUT.value,
        revision=_REVISION.value,
        base=_BASE.value,
        dtype=_DTYPE.value,
        tokenizer=_TOKENIZER.value,
        add_bos=typing.cast(Bos | None, _ADD_BOS.value),
        training_length=_TRAINING_LENGTH.value,
    )


if __name__ == "__main__":
    run_main(main)

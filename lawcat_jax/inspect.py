"""Look into a trained student: gates, denominators, errors by layer, states of long texts, layers to keep as softmax.

    python -m lawcat_jax.inspect --checkpoint=<student>
    python -m lawcat_jax.inspect --checkpoint=<file.safetensors> --base=<teacher> --text=book.txt --max_length=16384

Writes ``inspection.json``, ``inspection.md`` and ``inspection.png`` into ``inspect/`` in the folder of a run, or into
``./inspect_<name>/`` for any other model (``--output`` names another folder).
"""

from __future__ import annotations

import typing

from absl import flags

from lawcat_jax.command_line import no_arguments, run_main
from lawcat_jax.config import Bos

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Student: model directory, folder of a run, or small file.")
_TEXT = flags.DEFINE_string(
    "text",
    None,
    "What the student reads: tfds:<name>, hf:<name>, or a path. Default: passkey samples in a wording of their own.",
)
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "Field of the text in its rows.")
_SAMPLES = flags.DEFINE_integer("samples", 4, "Rows on which student and teacher are compared.", lower_bound=1)
_LENGTH = flags.DEFINE_integer(
    "length",
    None,
    "Tokens of these rows. Default: 1024, or the teacher's positions where they are fewer.",
    lower_bound=16,
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 65_536, "Tokens of the one row over which states are followed.", lower_bound=16
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder of the report. Default: inspect/ of the run, else ./inspect_<name>/."
)
_REVISION = flags.DEFINE_string("revision", None, "Revision of a hub repository.")
_BASE = flags.DEFINE_string("base", None, "Teacher of a student's small file; default: the one that it names.")
_DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Of the frozen weights.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer directory or hub id, instead of the checkpoint's.")
_ADD_BOS = flags.DEFINE_enum(
    "add_bos",
    None,
    list(typing.get_args(Bos)),
    "Beginning-of-sequence token in front. Default: as in training, else auto.",
)


def main(argv: list[str]) -> None:
    no_arguments(argv)
    from lawcat_jax.analysis.inspection.run import inspect_checkpoint

    inspect_checkpoint(
        _CHECKPOINT.value,
        text=_TEXT.value,
        text_key=_TEXT_KEY.value,
        samples=_SAMPLES.value,
        length=_LENGTH.value,
        max_length=_MAX_LENGTH.value,
        output=_OUTPUT.value,
        revision=_REVISION.value,
        base=_BASE.value,
        dtype=_DTYPE.value,
        tokenizer=_TOKENIZER.value,
        add_bos=typing.cast(Bos | None, _ADD_BOS.value),
    )


if __name__ == "__main__":
    run_main(main)

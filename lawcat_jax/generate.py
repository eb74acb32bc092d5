"""Continue a prompt, printing text as it is generated.

python -m lawcat_jax.generate --checkpoint=<dir> --prompt='The sky is' [--max_new_tokens=64] [--temperature=0.7]
"""

from __future__ import annotations

import sys
import typing

from absl import flags

from lawcat_jax.command_line import no_arguments, readable, run_main
from lawcat_jax.config import Bos
from lawcat_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Model directory, folder of a run, Hugging Face directory or hub id, asset:tiny_llama, or a student's small file.",
)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; '-' reads it from standard input.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens to generate at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws at a temperature above 0.")
_TEACHER = flags.DEFINE_bool("teacher", False, "Use the student's teacher (softmax attention).")
_ECHO = flags.DEFINE_bool("echo", True, "Print the prompt first.")
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


def main(argv: list[str]) -> None:
    no_arguments(argv)
    if _PROMPT.value is None:
        raise UserError("--prompt is missing: the text to continue, or - to read it from standard input")
    if _PROMPT.value == "-":
        prompt = readable(sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape"), "standard input")
    else:
        prompt = readable(_PROMPT.value, "--prompt")
    from lawcat_jax.inference.loading import load_for_inference
    from lawcat_jax.inference.text import continue_text

    model = load_for_inference(
        _CHECKPOINT.value or "",
        revision=_REVISION.value,
        base=_BASE.value,
        dtype=_DTYPE.value,
        tokenizer=_TOKENIZER.value,
        add_bos=typing.cast(Bos | None, _ADD_BOS.value),
    )
    pieces = continue_text(
        model,
        prompt,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        seed=_SEED.value,
        teacher=_TEACHER.value,
    )
    if _ECHO.value:
        print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


if __name__ == "__main__":
    run_main(main)

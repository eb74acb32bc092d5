"""Continue a prompt, or answer questions, printing text as it is generated.

    python -m lawcat_jax.generate --checkpoint=<dir> --prompt='The sky is' [--max_new_tokens=64] [--temperature=0.7]
    python -m lawcat_jax.generate --checkpoint=<dir> --chat --prompt='What colour is the sky?' [--system='Be brief.']
    python -m lawcat_jax.generate --checkpoint=<dir> --interactive
    python -m lawcat_jax.generate --checkpoint=<dir> --input=prompts.jsonl --output=answers.jsonl

Text goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterator
from pathlib import Path

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
_INTERACTIVE = flags.DEFINE_bool(
    "interactive",
    False,
    "Read a prompt from each line of standard input. What was read is not read again, unless the template changes it.",
)
_INPUT = flags.DEFINE_string(
    "input", None, "JSONL file of prompts: rows with prompt, a text, or messages, a list of role and content."
)
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file for the answers to --input, which must not be there yet.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows of --input answered together.", lower_bound=1)
_CHAT = flags.DEFINE_bool(
    "chat",
    None,
    "Ask in the form of the model's chat template. Default: with --system, and in --interactive if it has one.",
)
_SYSTEM = flags.DEFINE_string("system", "", "System prompt of the conversation.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "Tokens to generate at most. Default: 128, or what softmax attention has positions for.",
    lower_bound=1,
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many most likely tokens; 0 is off.", lower_bound=0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the most likely tokens with this share together; 1 is off.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Draw from tokens with this share of the most likely one's; 0 is off.")
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1, tokens that were there already are less likely.")
_STOP = flags.DEFINE_multi_string(
    "stop", [], "End before this text, special tokens included; may be given several times."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws at a temperature above 0.")
_TEACHER = flags.DEFINE_bool("teacher", False, "Use the student's teacher (softmax attention).")
_ECHO = flags.DEFINE_bool("echo", None, "Print the prompt first. Default: where a plain text is continued.")
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
    _check_flags()
    prompt = _PROMPT.value
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape")
    if prompt is not None:
        prompt = readable(prompt, "standard input" if _PROMPT.value == "-" else "--prompt")
    system = readable(_SYSTEM.value, "--system")
    stop = tuple(readable(word, "--stop") for word in _STOP.value)
    from lawcat_jax.inference import batch, text
    from lawcat_jax.inference.loading import load_for_inference
    from lawcat_jax.inference.sampling import Sampling

    sampling = Sampling(
        _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value, _PENALTY.value, typing.cast(int, _SEED.value)
    )
    sampling.check("--")
    rows = None if _INPUT.value is None else batch.read_rows(_INPUT.value)
    model = load_for_inference(
        _CHECKPOINT.value or "",
        revision=_REVISION.value,
        base=_BASE.value,
        dtype=_DTYPE.value,
        tokenizer=_TOKENIZER.value,
        add_bos=typing.cast(Bos | None, _ADD_BOS.value),
    )
    request = text.Request(_MAX_NEW_TOKENS.value, sampling, stop, _TEACHER.value)
    templated = text.has_chat_template(model.tokenizer)
    chat = bool(_CHAT.value or system or (_CHAT.value is None and _INTERACTIVE.value and templated))
    continued = rows is None or any("prompt" in row.fields for row in rows)
    if templated and not chat and _CHAT.value is None and continued:
        _say("this model has a chat template: --chat asks in its form; a plain text is continued, perhaps with nothing")
    if rows is not None:
        made = batch.answer_file(
            model, rows, _OUTPUT.value or "", request, chat=chat, system=system, batch_size=_BATCH_SIZE.value
        )
        _say(f"wrote {_OUTPUT.value}: {len(rows)} answers of {made} tokens together")
        return
    conversation = text.Conversation(model, request, system=system) if chat else None
    session = text.new_session(model, request)
    for question in _questions(prompt):
        if conversation is not None:
            reread, answer = conversation.reread, conversation.ask(question)
            if conversation.reread > reread:
                _say("the conversation has other tokens now than were read and made: all of it is read again")
        else:
            answer = text.continue_text(model, question, request, session=session)
        first = next(answer, "")  # reads the prompt: mistakes show before anything is printed
        if _ECHO.value or (_ECHO.value is None and not chat and not _INTERACTIVE.value):
            print(question, end="", flush=True)
        print(first, end="", flush=True)
        for piece in answer:
            print(piece, end="", flush=True)
        print(flush=True)
        _say(answer.summary())


def _check_flags() -> None:
    """Refuse combinations of flags that cannot be meant, before anything is loaded."""
    if (_INPUT.value is None) != (_OUTPUT.value is None):
        raise UserError("--input and --output belong together: prompts in one file, answers in the other")
    if _INPUT.value is not None:
        if _PROMPT.value is not None or _INTERACTIVE.value:
            raise UserError("--input has the prompts: leave --prompt and --interactive out")
        if Path(_OUTPUT.value or "").exists():
            raise UserError(f"--output={_OUTPUT.value} is there already; name another file, or remove it")
    elif _PROMPT.value is None and not _INTERACTIVE.value:
        raise UserError("--prompt is missing: the text to continue, or - to read it from standard input")
    if _INTERACTIVE.value and _PROMPT.value == "-":
        raise UserError("--interactive reads standard input itself: leave --prompt=- out")
    if _SYSTEM.value and _CHAT.value is False:
        raise UserError("--system is part of a conversation: leave --nochat out")
    if "" in _STOP.value:
        raise UserError("--stop: an empty text would end every answer at once")


def _questions(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
    while _INTERACTIVE.value:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        if line.strip():
            yield readable(line.decode("utf-8", errors="surrogateescape").rstrip("\r\n"), "standard input")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)

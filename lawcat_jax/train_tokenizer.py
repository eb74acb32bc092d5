"""Train a small byte-level BPE tokenizer and write it as a Hugging Face tokenizer directory.

    python -m lawcat_jax.train_tokenizer --input='books/*.txt' --vocab_size=1024 --target=tokenizer

What it is made for is in :mod:`lawcat_jax.data.train_tokenizer`.
"""

from __future__ import annotations

from absl import flags

from lawcat_jax.command_line import no_arguments, run_main
from lawcat_jax.data.documents import documents
from lawcat_jax.data.passkey import HAY
from lawcat_jax.data.train_tokenizer import SMALLEST, check_tokenizer_target, save_tokenizer, train_tokenizer
from lawcat_jax.errors import UserError

_INPUT = flags.DEFINE_string("input", None, "Text source: a file, directory or glob (.txt, .jsonl, .parquet).")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 1024, f"Tokens in all, at least {SMALLEST}.")
_TARGET = flags.DEFINE_string("target", None, "Directory to write.")
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Replace the tokenizer that the directory holds; never that of a model."
)
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "Field of the text in JSONL and parquet rows.")
_PASSKEY_REPEATS = flags.DEFINE_integer(
    "passkey_repeats", 3000, "Weight of the passkey sentences in the text.", lower_bound=0
)


def main(argv: list[str]) -> None:
    """Train, write, and say how many tokens there are."""
    no_arguments(argv)
    source, target = _INPUT.value, _TARGET.value
    if not source or not target:
        raise UserError(f"--{'target' if source else 'input'} is missing")
    check_tokenizer_target(target, overwrite=_OVERWRITE.value)
    texts = documents(source, _TEXT_KEY.value)
    tokenizer = train_tokenizer(texts, vocab_size=_VOCAB_SIZE.value, passkey_repeats=_PASSKEY_REPEATS.value)
    written = save_tokenizer(tokenizer, target)
    print(f"wrote {written}: {len(tokenizer)} tokens; the hay text takes {len(tokenizer(HAY)['input_ids']) - 1}")


if __name__ == "__main__":
    run_main(main)

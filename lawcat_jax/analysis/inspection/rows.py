"""The token rows that a student is inspected on: a text of the user's, or passkey prompts, which need no file."""

from __future__ import annotations

import numpy as np

from lawcat_jax.data.batch import Batch, batch_shapes
from lawcat_jax.data.passkey import landmark_sample_tokens
from lawcat_jax.data.text import load_tokens
from lawcat_jax.data.tokenize import Tokenizer, bos_rule, opening, pad_id
from lawcat_jax.errors import UserError


def text_rows(tokenizer: Tokenizer, text: str, text_key: str, shapes: list[tuple[int, int]]) -> list[Batch]:
    """Batches of the shapes [B, T], each cut from the beginning of ``text``; a row begins as the model's texts do.

    Args:
      tokenizer: the model's.
      text: ``tfds:<name>``, ``hf:<name>``, or a path (see :mod:`lawcat_jax.data.text`).
      text_key: the field of the text in rows of a data set.
      shapes: rows and tokens of each batch.

    Raises:
      UserError: a text that cannot be read, or has too few tokens.
    """
    needed = max(rows * length for rows, length in shapes)
    tokens = load_tokens(text, tokenizer, text_key=text_key, max_tokens=needed)
    if len(tokens) < needed:
        raise UserError(
            f"--text={text} has {len(tokens)} tokens, {needed} are needed: give more text, or lower --max_length, "
            "--length or --samples"
        )
    batches = []
    for rows, length in shapes:
        first = opening(tokenizer, bos_rule(tokenizer), tokens[:1].tolist())
        own = length - len(first)
        cut = np.asarray(tokens[: rows * own], np.int32).reshape(rows, own)
        batches.append(_batch(tokenizer, [np.concatenate([np.asarray(first, np.int32), row]) for row in cut], length))
    return batches


def passkey_rows(tokenizer: Tokenizer, shapes: list[tuple[int, int]]) -> list[Batch]:
    """The same of the evaluation's passkey prompts (``landmark``): row j is test j, as long as fits in T tokens.

    Raises:
      UserError: T is too short for a prompt.
    """
    rule = bos_rule(tokenizer)
    return [
        _batch(
            tokenizer, [landmark_sample_tokens(tokenizer, length, j, add_bos=rule).tokens for j in range(rows)], length
        )
        for rows, length in shapes
    ]


def _batch(tokenizer: Tokenizer, rows: list[np.ndarray], length: int) -> Batch:
    """Rows of up to ``length`` tokens, padded on the right."""
    arrays = {name: np.zeros(*spec) for name, spec in batch_shapes(len(rows), length).items()}
    arrays["tokens"][:] = pad_id(tokenizer)
    for number, row in enumerate(rows):
        arrays["tokens"][number, : len(row)] = row
        arrays["mask"][number, : len(row)] = row != tokenizer.eos_token_id
        arrays["loss_weights"][number, : len(row) - 1] = 1
    arrays["targets"][:, :-1] = arrays["tokens"][:, 1:]
    arrays["lengths"][:] = [len(row) for row in rows]
    return Batch(**arrays)

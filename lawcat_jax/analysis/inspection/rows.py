"""The token rows that a student is measured on: a text of the user's, or passkey prompts, which need no file."""

from __future__ import annotations

import numpy as np

from lawcat_jax.data.batch import Batch, batch_shapes
from lawcat_jax.data.passkey import landmark_sample_tokens
from lawcat_jax.data.text import load_tokens
from lawcat_jax.data.tokenize import Tokenizer, bos_rule, opening, pad_id
from lawcat_jax.errors import UserError

LENGTH = 1024
"""[tokens] Rows that student and teacher are compared on, unless the teacher has fewer positions."""


def compared_shape(positions: int, samples: int, length: int | None) -> tuple[int, int]:
    """(rows, tokens) on which a student is compared with a teacher of so many ``positions``; ``length`` None is
    :data:`LENGTH`, or as many tokens as fit.

    Raises:
      UserError: a ``length`` that the teacher does not have.
    """
    if length is not None and length > positions:
        raise UserError(f"--length={length} does not fit the teacher, which has {positions} positions")
    return samples, length or min(LENGTH, positions)


def read_rows(tokenizer: Tokenizer, text: str | None, text_key: str, shapes: list[tuple[int, int]]) -> list[Batch]:
    """Batches of the shapes [B, T], on each of which the model begins as on its training texts.

    Args:
      tokenizer: the model's.
      text: ``tfds:<name>``, ``hf:<name>``, or a path (see :mod:`lawcat_jax.data.text`), from whose beginning every batch is
        cut; None for passkey prompts of the evaluation (``landmark``): row j is test j, as long as fits in T tokens.
      text_key: the field of the text in rows of a data set.
      shapes: rows and tokens of each batch.

    Raises:
      UserError: a text that cannot be read, or has too few tokens; T is too short for a prompt.
    """
    rule = bos_rule(tokenizer)
    if text is None:
        return [
            _batch(
                tokenizer, [landmark_sample_tokens(tokenizer, size, j, add_bos=rule).tokens for j in range(rows)], size
            )
            for rows, size in shapes
        ]
    needed = max(rows * size for rows, size in shapes)
    tokens = load_tokens(text, tokenizer, text_key=text_key, max_tokens=needed)
    if len(tokens) < needed:
        raise UserError(
            f"--text={text} has {len(tokens)} tokens, {needed} are needed: give more text, or ask for fewer or shorter rows"
        )
    batches = []
    for rows, size in shapes:
        first = opening(tokenizer, rule, tokens[:1].tolist())
        own = size - len(first)
        cut = np.asarray(tokens[: rows * own], np.int32).reshape(rows, own)
        batches.append(_batch(tokenizer, [np.concatenate([np.asarray(first, np.int32), row]) for row in cut], size))
    return batches


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

"""Continue a text with a loaded model."""

from __future__ import annotations

from collections.abc import Iterator

from lawcat_jax.data.tokenize import bos_rule, encode_prompt, stream_text
from lawcat_jax.errors import UserError
from lawcat_jax.inference.generation import stream
from lawcat_jax.inference.loading import LoadedModel
from lawcat_jax.models import bind


def continue_text(
    model: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    teacher: bool = False,
) -> Iterator[str]:
    """Pieces of the text that follows ``prompt``, as they are made, up to the model's end token.

    Args:
      model: see :func:`lawcat_jax.inference.loading.load_for_inference`.
      prompt: text; the tokenizer's bos token is put before it as :func:`lawcat_jax.data.tokenize.bos_rule` says.
      max_new_tokens: most tokens to make.
      temperature: 0 for the most likely token, else the softmax temperature of the draws.
      seed: of the draws.
      teacher: use the student's teacher.

    Raises:
      UserError: at once, for a prompt of no tokens, or one that is too long for softmax attention; else as
        :func:`lawcat_jax.inference.generation.stream`.
    """
    ids = encode_prompt(model.tokenizer, prompt, add_bos=bos_rule(model.tokenizer))
    if not ids:
        raise UserError("the prompt is empty, and this tokenizer has no bos token to start from")
    softmax, config = teacher or not model.is_student, bind(model.graphdef, model.params).config
    if softmax and len(ids) + max_new_tokens > config.max_position_embeddings:
        raise UserError(
            f"prompt and answer take up to {len(ids)} + {max_new_tokens} tokens, but softmax attention was trained for "
            f"{config.max_position_embeddings} positions; shorten the prompt or --max_new_tokens"
        )
    tokens = stream(
        model.graphdef,
        model.params,
        ids,
        max_new_tokens=max_new_tokens,
        eos_ids=model.eos_ids,
        temperature=temperature,
        seed=seed,
        as_teacher=softmax,
    )
    return stream_text(model.tokenizer, tokens, context=ids)

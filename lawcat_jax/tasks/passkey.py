"""Passkey accuracy by context length, for any function that continues token prompts greedily."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from lawcat_jax.data.passkey import PasskeySample, eval_samples
from lawcat_jax.data.tokenize import Tokenizer, decode, encode
from lawcat_jax.errors import UserError

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, max_new_tokens) -> new tokens of each prompt, in order."""

Progress = Callable[[int, int, int, int], None]
"""(length in tokens, samples done at this length, samples at this length, hits so far)."""


@dataclasses.dataclass(frozen=True)
class LengthResult:
    """Result at one length: ``accuracy`` in [0, 1] over ``n`` samples of ``mean_tokens`` prompt tokens."""

    accuracy: float
    n: int
    mean_tokens: float


def _answer_in_text(answer: str, tokenizer: Tokenizer) -> tuple[list[int], bool]:
    """Tokens of the answer as it follows a word, space included, and whether the space is a token of its own."""
    tokens = encode(tokenizer, f"is {answer}")[len(encode(tokenizer, "is")) :]
    return tokens, not decode(tokenizer, tokens[:1]).strip()


def new_tokens(sample: PasskeySample, tokenizer: Tokenizer, form: str) -> int:
    """How many tokens to generate for a sample.

    ``landmark``: one more than the answer's tokens. ``train``: the answer's tokens, since the training prompt
    ends with the space before it.
    """
    if form == "train":
        return sample.answer_end - sample.answer_start
    in_text, own_space = _answer_in_text(sample.answer, tokenizer)
    return (len(encode(tokenizer, sample.answer)) if own_space else len(in_text)) + 1


def is_hit(sample: PasskeySample, generated: Sequence[int], tokenizer: Tokenizer, form: str) -> bool:
    """Whether new tokens answer the sample.

    ``landmark`` is the rule of the LAWCAT authors' code: of len(answer) + 1 new tokens, the decoded answer is
    a substring of the decoded last len(answer). It takes for granted that the space before a number is a token
    of its own (Llama, Mistral). Where a vocabulary merges the space with digits the rule would reject the right
    answer, so all new tokens count there.

    ``train``: the answer is in the len(answer) new tokens.
    """
    generated = list(generated)[: new_tokens(sample, tokenizer, form)]
    if form == "landmark" and _answer_in_text(sample.answer, tokenizer)[1]:
        generated = generated[-len(encode(tokenizer, sample.answer)) :]
    return sample.answer in decode(tokenizer, generated)


def evaluate_passkey(
    generate: Generate,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    samples: int = 50,
    batch_size: int = 10,
    form: str = "landmark",
    seed: int = 1_000_003,
    add_bos: bool = True,
    progress: Progress | None = None,
) -> dict[int, LengthResult]:
    """Accuracy at each length in tokens (prompt and answer together take at most that many).

    Batches hold samples of one length, so their prompts differ by a few tokens at most.

    Raises:
      UserError: for a length too short for the prompt's frame (before anything is generated), an unknown form,
        or no lengths.
    """
    if not lengths:
        raise UserError("passkey evaluation: name at least one length")
    for length in lengths:  # a length that cannot work fails before the first is generated
        eval_samples(tokenizer, form=form, length=length, samples=1, seed=seed, add_bos=add_bos)
    results = {}
    for length in sorted(set(lengths)):
        drawn = eval_samples(tokenizer, form=form, length=length, samples=samples, seed=seed, add_bos=add_bos)
        longest = max(new_tokens(sample, tokenizer, form) for sample in drawn)
        hits = 0
        for start in range(0, samples, batch_size):
            batch = drawn[start : start + batch_size]
            outputs = generate([sample.prompt for sample in batch], longest)
            hits += sum(is_hit(s, out, tokenizer, form) for s, out in zip(batch, outputs, strict=True))
            if progress is not None:
                progress(length, start + len(batch), samples, hits)
        mean = sum(sample.answer_start for sample in drawn) / samples
        results[length] = LengthResult(hits / samples, samples, mean)
    return results

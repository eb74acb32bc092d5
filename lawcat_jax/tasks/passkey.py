"""Passkey retrieval: a number hidden in filler text must be repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lawcat_jax.config import EvalConfig
from lawcat_jax.data.passkey import LANDMARK_NEEDLE, NEEDLE, PasskeySample, draw_eval_samples
from lawcat_jax.data.tokenize import Tokenizer, bos_rule, decode, encode
from lawcat_jax.tasks.task import GenerationTask, Sample

_WORDINGS = {"landmark": "evaluation wording (landmark)", "train": "training wording (train)"}


class Passkey(GenerationTask):
    """Passkey retrieval in the wording ``settings.passkey_form``.

    ``landmark``: the prompt of Landmark attention (arXiv 2305.16300) that LongLoRA and LAWCAT evaluate with, by the
    rule of the LAWCAT authors' code: of len(answer) + 1 new tokens, the decoded answer is a substring of the decoded
    last len(answer). That rule takes for granted that the space before a number is a token of its own (Llama,
    Mistral). Where a vocabulary merges the space with digits it would reject the right answer, so all new tokens count
    there. ``settings.seed`` has no part in these prompts.

    ``train``: the wording of the training samples, from seeds that training never draws; the answer is in the
    len(answer) new tokens.
    """

    name = "passkey"
    heading = "Passkey retrieval"
    settings = ("samples", "passkey_form", "seed")
    ends = False  # the published rule counts tokens

    def wording(self, settings: EvalConfig) -> str:
        return _WORDINGS[settings.passkey_form]

    def variant(self, settings: EvalConfig) -> str:
        return settings.passkey_form if settings.passkey_form == "landmark" else f"train_seed{settings.seed}"

    def reads(self, settings: EvalConfig) -> set[str]:
        """Without ``seed`` in the wording ``landmark``, whose prompts are always the same."""
        return super().reads(settings) - ({"seed"} if settings.passkey_form == "landmark" else set())

    def samples(self, tokenizer: Tokenizer, length: int, settings: EvalConfig) -> Iterator[Sample]:
        form = settings.passkey_form
        options = {"samples": settings.samples, "seed": settings.seed, "add_bos": bos_rule(tokenizer)}
        for drawn in draw_eval_samples(tokenizer, form=form, length=length, **options):
            yield _question(drawn, tokenizer, form)

    def score(self, sample: Sample, generated: Sequence[int], tokenizer: Tokenizer) -> float:
        counted = list(generated)[: sample.max_new_tokens][-sample.meta["counted"] :]
        return float(sample.answer in decode(tokenizer, counted))


def _question(sample: PasskeySample, tokenizer: Tokenizer, form: str) -> Sample:
    """``meta["counted"]``: how many of the last new tokens may hold the answer."""
    if form == "train":  # the prompt ends with the space before the answer
        new = counted = sample.answer_end - sample.answer_start
    else:
        in_text = encode(tokenizer, f"is {sample.answer}")[len(encode(tokenizer, "is")) :]
        own_space = not decode(tokenizer, in_text[:1]).strip()
        alone = len(encode(tokenizer, sample.answer))
        new = (alone if own_space else len(in_text)) + 1
        counted = alone if own_space else new
    return Sample(sample.prompt, sample.answer, new, {"depth": _depth(sample, form), "counted": counted})


def _depth(sample: PasskeySample, form: str) -> float:
    """Where the needle stands among the filler, from 0 (before all of it) to 1 (after it), by characters."""
    needle = (LANDMARK_NEEDLE if form == "landmark" else NEEDLE).format(key=sample.answer)
    hay = sample.text[sample.text.index("\n") + 1 : sample.text.rindex("\n")]
    return round(hay.index(needle) / max(1, len(hay) - len(needle)), 4)


TASKS = (Passkey(),)

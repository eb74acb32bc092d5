"""A model under evaluation as lm-evaluation-harness asks it.

Prompts, windows, stop strings and truncation are those of the harness' own Hugging Face backend, so that numbers can be
compared. A model without a limited context differs from it in one thing: nothing is cut off, and a rolling likelihood is
one pass over the whole text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lawcat_jax.data.tokenize import Tokenizer, bos_rule, encode, fingerprint, opening
from lawcat_jax.errors import UserError
from lawcat_jax.inference.generation import STOP_EVERY
from lawcat_jax.inference.sampling import Sampling
from lawcat_jax.inference.text import chat_text
from lawcat_jax.tasks.task import Model, Progress

NEW_TOKENS = 256
"""Tokens of an answer at most, where a task does not say; the harness' default."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "typical_p": 1.0,
}


class StopCriteria:
    """When the harness' Hugging Face backend ends an answer that it makes alone: with the token after which a stop string stands
    in the last tokens of it, two more than the string has itself. They are spelt with their special tokens, and without what
    is before them. (With others in a batch, it lets an answer go on until all of them have come to the same string.)
    """

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str]):
        self._tokenizer = tokenizer
        self._looks_at = [(word, len(tokenizer.encode(word, add_special_tokens=False)) + 2) for word in until]

    def end(self, tokens: Sequence[int], start: int = 0) -> int | None:
        """The number of tokens, more than ``start``, with which the answer ends; None where it has not."""
        for end in range(start + 1, len(tokens) + 1):
            for word, size in self._looks_at:
                if word in self._tokenizer.decode(tokens[max(0, end - size) : end]):
                    return end
        return None

    def __call__(self, number: int, tokens: Sequence[int]) -> bool:
        """Whether it ends among the tokens that were made since it was asked last."""
        return self.end(tokens, max(0, len(tokens) - STOP_EVERY)) is not None


class HarnessModel(TemplateLM):
    """The interface of the harness over a :class:`Model` that has ``likelihoods`` and ``sample``."""

    def __init__(self, model: Model, *, seed: int, progress: Progress | None = None):
        super().__init__()
        self.tokenizer = model.tokenizer
        self._model, self._seed, self._progress = model, seed, progress

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return next(iter(self._ends()), None)  # type: ignore[return-value]

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is conditioned on: bos, or else the end token."""
        bos = self.tokenizer.bos_token_id
        prefix = self.eot_token_id if bos is None else bos
        if prefix is None:
            raise UserError("lm_eval: this tokenizer has neither a bos nor an end token to begin a text with")
        return prefix

    def _ends(self) -> list[int]:
        own = self.tokenizer.eos_token_id
        return list(dict.fromkeys([*([] if own is None else [own]), *self._model.eos_ids]))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, with bos in front as the model is used to, unless ``add_special_tokens`` is False."""
        del kwargs
        ids = encode(self.tokenizer, string)
        return ids if add_special_tokens is False else opening(self.tokenizer, bos_rule(self.tokenizer), ids) + ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether it is the greedy one) of each request."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        rows, places = [], []
        for place, (_, context, following) in enumerate(requests):
            if following:  # nothing to predict is certain
                places.append(place)
                rows.append(self._fitted(context or [self.prefix_token_id], following))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        assert self._model.likelihoods is not None
        for place, result in zip(places, self._model.likelihoods(rows, self._progress), strict=True):
            found[place] = result
        return found

    def _fitted(self, context: list[int], following: list[int]) -> tuple[list[int], list[int]]:
        """The pair without the start of the context that the model has no positions for."""
        positions = self._model.positions
        if positions is None:
            return context, following
        if len(following) > positions:
            raise UserError(
                f"lm_eval: a continuation of {len(following)} tokens is more than the {positions} positions that "
                f"{self._model.label} has"
            )
        return context[max(0, len(context) + len(following) - positions - 1) :], following

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each whole text."""
        del disable_tqdm
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            tokens, positions = self.tok_encode(text), self._model.positions
            if positions is None:
                own = [([self.prefix_token_id], tokens)] if tokens else []
            else:
                rolling = get_rolling_token_windows(tokens, self.prefix_token_id, positions, 1)
                own = [make_disjoint_window(window) for window in rolling]
            windows += [(("", ""), context, following) for context, following in own]
            counts.append(len(own))
        totals = iter(self._loglikelihood_tokens(windows))
        return [sum(total for total, _ in itertools.islice(totals, count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The continuation of each request, before its first stop string."""
        del disable_tqdm
        texts = [""] * len(requests)
        asked: list[tuple[Any, ...]] = [tuple(request.args) for request in requests]  # (context, generation_kwargs)
        groups: dict[str, list[int]] = {}
        for number, (_, options) in enumerate(asked):
            groups.setdefault(repr(options), []).append(number)
        for numbers in groups.values():
            answers = self._generate([asked[number][0] for number in numbers], asked[numbers[0]][1])
            for number, text in zip(numbers, answers, strict=True):
                texts[number] = text
        return texts

    def _generate(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        given: dict[str, Any] = {**normalize_gen_kwargs(options, NEW_TOKENS)}
        until, new_tokens = given.pop("until"), given.pop("max_gen_toks")
        sampling = self._sampling(given)
        ends = self._ends()
        eos = self.tokenizer.decode(ends[:1], skip_special_tokens=False) if ends else None
        until = handle_stop_sequences(list(until), eos=eos)
        prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        if (positions := self._model.positions) is not None:
            if new_tokens >= positions:
                raise UserError(
                    f"lm_eval: the task asks for up to {new_tokens} new tokens, and {self._model.label} has {positions} "
                    "positions for prompt and answer; set max_gen_toks in the task's generation_kwargs"
                )
            prompts = [prompt[-(positions - new_tokens) :] for prompt in prompts]
        assert self._model.sample is not None
        stop = StopCriteria(self.tokenizer, until)
        answers = self._model.sample(prompts, new_tokens, ends, sampling, stop)
        if self._progress is not None:
            self._progress(0, len(prompts), len(prompts))
        texts = (self.tokenizer.decode(answer[: stop.end(answer)], skip_special_tokens=True) for answer in answers)
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        drawn = bool(options.pop("do_sample"))
        known = {name: options.pop(name) for name in _SAMPLING if options.get(name) is not None}
        odd = [name for name, value in options.items() if value is not None and _NEUTRAL.get(name) != value]
        if odd:
            raise UserError(f"lm_eval: generation_kwargs {', '.join(sorted(odd))} of the task cannot be followed here")
        if not drawn:
            known = {name: value for name, value in known.items() if name == "repetition_penalty"}
        sampling = Sampling(**known, seed=self._seed)
        sampling.check("lm_eval: ")
        return sampling

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of prompts apart."""
        return fingerprint(self.tokenizer)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's chat template writes it; without ``add_generation_prompt`` its last answer is
        left open to be continued."""
        if add_generation_prompt:
            return chat_text(self.tokenizer, chat_history)
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=False, continue_final_message=True
        )

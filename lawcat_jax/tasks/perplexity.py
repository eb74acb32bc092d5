"""Perplexity of text: the mean negative log-likelihood per token, in nats, and its exponential."""

from __future__ import annotations

import re
from typing import Any

from lawcat_jax.config import DataConfig, EvalConfig
from lawcat_jax.data.pipeline import Samples
from lawcat_jax.data.tokenize import Tokenizer, bos_rule
from lawcat_jax.errors import UserError
from lawcat_jax.tasks.cells import file_stamp
from lawcat_jax.tasks.task import LikelihoodTask


class Perplexity(LikelihoodTask):
    """Perplexity of the first ``settings.samples`` sequences of each length of ``settings.text``."""

    name = "perplexity"
    heading = "Perplexity"
    settings = ("samples", "text", "text_key")

    def wording(self, settings: EvalConfig) -> str:
        return f"text {settings.text}"

    def variant(self, settings: EvalConfig) -> str:
        return re.sub(r"[^A-Za-z0-9.]+", "-", settings.text).strip("-.")[-40:]

    def identity(self, settings: EvalConfig) -> dict[str, Any]:
        """Of a local text also the contents of its files: a text that was changed is measured anew."""
        return super().identity(settings) | {"files": file_stamp(settings.text)}

    def reads(self, settings: EvalConfig) -> set[str]:
        """Without ``prefill_chunk``: a sequence is read at once."""
        return super().reads(settings) - {"prefill_chunk"}

    def check(self, settings: EvalConfig, tokenizer: Tokenizer) -> None:
        super().check(settings, tokenizer)
        if not settings.text:
            raise UserError(f"{self.name}: name a text (--text=tfds:..., hf:..., or a path)")
        if min(settings.lengths) < 1:
            raise UserError(f"{self.name}: every length must be at least 1 token")
        self.sequences(tokenizer, max(settings.lengths), settings)  # reads and tokenizes the text, once for all lengths

    def sequences(self, tokenizer: Tokenizer, length: int, settings: EvalConfig) -> Samples:
        data = DataConfig(
            kind="text",
            source=settings.text,
            validation_source=settings.text,
            validation_samples=settings.samples,
            text_key=settings.text_key,
            add_bos=bos_rule(tokenizer),
        )
        return Samples(data, tokenizer, seq_length=length, seed=0, split="validation")


TASKS = (Perplexity(),)

"""RULER's S-NIAH: the number or UUID that belongs to a name must be found in noise or in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from lawcat_jax.config import EvalConfig
from lawcat_jax.data import niah
from lawcat_jax.data.haystack import load_haystack, source_name
from lawcat_jax.data.samples import EvalSample
from lawcat_jax.data.tokenize import Tokenizer, bos_rule, decode
from lawcat_jax.errors import UserError
from lawcat_jax.tasks.cells import file_stamp
from lawcat_jax.tasks.task import GenerationTask, Sample


class Haystacked(GenerationTask):
    """A retrieval task whose prompts come from :mod:`lawcat_jax.data` as :class:`EvalSample`, and whose hay may be a text
    that the user names."""

    has_haystack: ClassVar[bool] = True

    def seed(self, settings: EvalConfig) -> int:
        return settings.sample_seed

    def variant(self, settings: EvalConfig) -> str:
        hay = f"{file_name(source_name(settings.haystack))}_" if self.has_haystack and settings.haystack else ""
        return f"{hay}seed{settings.sample_seed}"

    def identity(self, settings: EvalConfig) -> dict[str, Any]:
        """A local haystack is known by the contents of its files as well: a changed one is measured anew."""
        stamp = file_stamp(settings.haystack) if self.has_haystack and settings.haystack else []
        return super().identity(settings) | {"haystack_files": stamp}

    def check(self, settings: EvalConfig, tokenizer: Tokenizer) -> None:
        if self.has_haystack and any(settings.lengths) and not settings.haystack:
            raise UserError(f"{self.name}: name essays or books (--haystack=tfds:..., hf:..., or a path)")
        super().check(settings, tokenizer)


class NiahSingle(Haystacked):
    """S-NIAH-``number`` of RULER (arXiv 2404.06654); see :mod:`lawcat_jax.data.niah`.

    128 new tokens; the answer occurs in them, in whatever case. A local or remote text stands in for RULER's essays, which
    are under copyright, and is named in every result.
    """

    family = "S-NIAH"
    number: ClassVar[int]

    def wording(self, settings: EvalConfig) -> str:
        return f"haystack {source_name(settings.haystack)}" if self.has_haystack else "haystack RULER's noise"

    def samples(self, tokenizer: Tokenizer, length: int, settings: EvalConfig) -> Iterator[Sample]:
        hay = load_haystack(settings.haystack, text_key(settings)) if self.has_haystack else None
        options = {"seed": settings.sample_seed, "haystack": hay, "add_bos": bos_rule(tokenizer)}
        for drawn in niah.draw_eval_samples(tokenizer, self.number, length, settings.samples, **options):
            yield asked(drawn)

    def score(self, sample: Sample, generated: Sequence[int], tokenizer: Tokenizer) -> float:
        return niah.score(sample.meta["drawn"], decode(tokenizer, generated[: sample.max_new_tokens]))


class NiahSingle1(NiahSingle):
    """A 7-digit number between lines of noise."""

    name, heading, number = "niah_single_1", "S-NIAH-1", 1
    settings = ("samples", "sample_seed")
    has_haystack = False


class NiahSingle2(NiahSingle):
    """A 7-digit number between sentences of a text."""

    name, heading, number = "niah_single_2", "S-NIAH-2", 2
    settings = ("samples", "sample_seed", "haystack", "text_key")


class NiahSingle3(NiahSingle):
    """A UUID between sentences of a text."""

    name, heading, number = "niah_single_3", "S-NIAH-3", 3
    settings = ("samples", "sample_seed", "haystack", "text_key")


def asked(drawn: EvalSample) -> Sample:
    """A drawn prompt as the runner's sample; ``meta["drawn"]`` is the prompt as it was drawn."""
    meta = {"depth": round(drawn.depth / 100, 4), "drawn": drawn}
    return Sample(drawn.tokens.tolist(), drawn.answer, drawn.max_new_tokens, meta)


def text_key(settings: EvalConfig) -> str:
    """The haystack's field of text, "" for the usual one of its source."""
    return "" if settings.text_key == EvalConfig.text_key else settings.text_key


def file_name(text: str) -> str:
    """``text`` with nothing that a file name cannot have."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[-40:]


TASKS = (NiahSingle1(), NiahSingle2(), NiahSingle3())

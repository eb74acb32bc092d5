"""BABILong: a question about facts of a bAbI story that are scattered in book text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lawcat_jax.config import EvalConfig
from lawcat_jax.data import babilong
from lawcat_jax.data.haystack import load_haystack, source_name
from lawcat_jax.data.tokenize import Tokenizer, bos_rule, decode
from lawcat_jax.errors import UserError
from lawcat_jax.tasks.cells import file_stamp
from lawcat_jax.tasks.niah import Haystacked, asked, text_key
from lawcat_jax.tasks.task import Sample


class Babilong(Haystacked):
    """BABILong ``question`` (arXiv 2406.10149); see :mod:`lawcat_jax.data.babilong`.

    20 new tokens, scored by the strict metric. The length 0 gives the facts without noise. Facts come from bAbI's test
    files (the published sets take train facts), and noise from the books that the user names, as every result says.
    """

    family = "BABILong"
    question: ClassVar[str]
    settings = ("samples", "sample_seed", "haystack", "text_key", "babi")

    def wording(self, settings: EvalConfig) -> str:
        return f"test facts in {source_name(settings.haystack) if settings.haystack else 'no noise'}"

    def identity(self, settings: EvalConfig) -> dict[str, Any]:
        return super().identity(settings) | {"babi_files": file_stamp(settings.babi)}

    def reads(self, settings: EvalConfig) -> set[str]:
        """Without a haystack where no length asks for noise."""
        return super().reads(settings) - (set() if any(settings.lengths) else {"haystack", "text_key"})

    def check(self, settings: EvalConfig, tokenizer: Tokenizer) -> None:
        if not settings.babi:
            raise UserError(f"{self.name}: name the directory of bAbI's en-10k files (--babi=<directory>)")
        if not Path(settings.babi).expanduser().is_dir():
            raise UserError(f"{self.name}: bAbI directory {settings.babi!r} is not a directory")
        super().check(settings, tokenizer)
        for length in self.lengths(settings):  # there may be fewer stories than samples
            next(self.samples(tokenizer, length, settings))

    def samples(self, tokenizer: Tokenizer, length: int, settings: EvalConfig) -> Iterator[Sample]:
        noise = load_haystack(settings.haystack, text_key(settings)) if length else None
        options = {"facts": settings.babi, "noise": noise, "seed": settings.sample_seed, "add_bos": bos_rule(tokenizer)}
        for drawn in babilong.draw_eval_samples(tokenizer, self.question, length, settings.samples, **options):
            yield asked(drawn)

    def score(self, sample: Sample, generated: Sequence[int], tokenizer: Tokenizer) -> float:
        return babilong.score(sample.meta["drawn"], decode(tokenizer, generated[: sample.max_new_tokens]))


class BabilongQa1(Babilong):
    """One supporting fact: where somebody is."""

    name, heading, question = "babilong_qa1", "BABILong QA1", "qa1"


class BabilongQa2(Babilong):
    """Two supporting facts: where a thing is."""

    name, heading, question = "babilong_qa2", "BABILong QA2", "qa2"


class BabilongQa3(Babilong):
    """Three supporting facts: where a thing was before."""

    name, heading, question = "babilong_qa3", "BABILong QA3", "qa3"


class BabilongQa4(Babilong):
    """Relations of two arguments: what lies where."""

    name, heading, question = "babilong_qa4", "BABILong QA4", "qa4"


class BabilongQa5(Babilong):
    """Relations of three arguments: who gave what to whom."""

    name, heading, question = "babilong_qa5", "BABILong QA5", "qa5"


TASKS = (BabilongQa1(), BabilongQa2(), BabilongQa3(), BabilongQa4(), BabilongQa5())

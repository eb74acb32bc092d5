"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness): HellaSwag, PIQA, MMLU and so on."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lawcat_jax.config import EvalConfig
from lawcat_jax.data.source_files import digests
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.inference.text import has_chat_template
from lawcat_jax.tasks.ahead import Ahead
from lawcat_jax.tasks.task import Model, Progress, Task

PREFIX = "lm_eval:"
"""With which the names of these tasks begin."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that the harness gives for ``n`` samples, with its standard error where it has one."""

    value: float
    stderr: float | None
    n: int


class LmEval(Task):
    """A task, or the tasks of a group, as the harness measures them.

    The rows of its table are the harness' metrics; where there are several tasks, or a filter of answers, their names
    stand before them.
    """

    settings = ("lm_eval_tasks_dir", "lm_eval_fewshot", "lm_eval_limit", "lm_eval_chat")
    packages = ("lm_eval", "datasets")
    axis = "metric"
    plotted = False
    result = Metric

    def __init__(self, name: str):
        self._task = name
        self.name = PREFIX + name
        self.heading = name

    @property
    def stem(self) -> str:
        return "lm_eval_" + re.sub(r"[^A-Za-z0-9._-]+", "-", self._task).strip("-")

    def wording(self, settings: EvalConfig) -> str:
        shots = settings.lm_eval_fewshot
        words = ["examples as the task has them" if shots is None else f"{shots} examples"]
        if settings.lm_eval_limit is not None:
            words.append(f"first {settings.lm_eval_limit} samples")
        if settings.lm_eval_chat:
            words.append("chat template")
        return ", ".join(words)

    def variant(self, settings: EvalConfig) -> str:
        shots, limit = settings.lm_eval_fewshot, settings.lm_eval_limit
        parts = ["" if shots is None else f"{shots}-shot", "" if limit is None else f"n{limit}"]
        return "_".join(filter(None, [*parts, "chat" if settings.lm_eval_chat else ""])) or "plain"

    def samples_of(self, result: Metric) -> int:
        return result.n

    def seed(self, settings: EvalConfig) -> int:
        return _package().SEED

    def ending(self, settings: EvalConfig, positions: Sequence[Any]) -> str:
        return f"_{self.variant(settings)}"

    def facts(self, settings: EvalConfig) -> list[str]:
        names = [f"{name} {value!r}" for name in self.settings if (value := getattr(settings, name))]
        return ["lm-evaluation-harness", *names, "with the standard errors that it gives"]

    def position(self, text: str) -> str:
        return text

    def identity(self, settings: EvalConfig) -> dict[str, Any]:
        """Also the version of the harness, and the contents of the user's task files and what lies beside them."""
        folder = Path(settings.lm_eval_tasks_dir) if settings.lm_eval_tasks_dir else None
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
        stamps = [[str(path), digest] for path, digest in zip(files, digests(files), strict=True)]
        return super().identity(settings) | {"lm_eval": _package().VERSION, "files": stamps}

    def check(self, settings: EvalConfig, tokenizer: Tokenizer) -> None:
        if settings.lm_eval_chat and not has_chat_template(tokenizer):
            raise UserError("lm_eval_chat: this tokenizer has no chat template")
        self._load(settings)

    def reads(self, settings: EvalConfig) -> set[str]:
        """The harness' documents have the lengths that they have, and ``lm_eval_limit`` says how many are read."""
        return super().reads(settings) - {"lengths"}

    def lengths(self, settings: EvalConfig) -> list[int]:
        return [0]  # all of it is one cell

    def _load(self, settings: EvalConfig) -> dict[str, Any]:
        return _package().load(self._task, settings.lm_eval_tasks_dir, settings.lm_eval_fewshot)

    def measure(
        self,
        model: Model,
        length: int,
        settings: EvalConfig,
        progress: Progress | None = None,
        prepared: Ahead | None = None,
    ) -> dict[str, Metric]:
        del length, prepared
        loaded = self._load(settings)
        from lawcat_jax.tasks.harness.adapter import HarnessModel

        asked = HarnessModel(model, seed=self.seed(settings), progress=progress)
        found = _package().measure(loaded, asked, limit=settings.lm_eval_limit, chat=settings.lm_eval_chat)
        counts = {name: count["effective"] for name, count in found["n-samples"].items()}
        for group, members in found.get("group_subtasks", {}).items():
            counts.setdefault(group, sum(counts.get(member, 0) for member in members))
        rows = {**found["results"], **found.get("groups", {})}
        return {
            self._row(task, key, single=len(rows) == 1): Metric(
                float(value), _number(values.get(key.replace(",", "_stderr,", 1))), counts.get(task, 0)
            )
            for task, values in rows.items()
            for key, value in values.items()
            if "," in key and "_stderr," not in key and _number(value) is not None
        }

    def _row(self, task: str, key: str, *, single: bool) -> str:
        metric, _, chosen = key.partition(",")
        words = ["" if single else task, metric, "" if chosen == "none" else f"({chosen})"]
        return " ".join(filter(None, words))

    def cell(self, result: Metric) -> str:
        return f"{result.value:.4f}" + ("" if result.stderr is None else f" ± {result.stderr:.4f}")

    def row(self, result: Metric) -> dict[str, Any]:
        return dataclasses.asdict(result)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _package() -> Any:
    """``lawcat_jax.tasks.harness.evaluation``, where the package lm_eval is installed.

    Raises:
      UserError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks of lm-evaluation-harness need its package: pip install lm_eval")
    from lawcat_jax.tasks.harness import evaluation

    return evaluation

"""The configuration refuses the fields that a kind of data does not read: those, and no others, leave the samples alone."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from lawcat_jax.config import Config, ConfigError, DataConfig, MixtureSource, StageConfig
from lawcat_jax.data.pipeline import make_dataset
from tests.data import tokenizers as small
from tests.data.texts import prose, write_babi


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two of each kind of source."""
    folder = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(("one", "two")):
        rows = [
            {
                "instruction": f"Count {name} {i}",
                "input": "x",
                "output": f"{i} {name}.",
                "text": f"Count {name} {i} x {i} {name}.",
            }
            for i in range(40)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        texts = [{"text": prose(400, number), "body": prose(400, number + 5)} for _ in range(8)]
        (folder / f"{name}-text.jsonl").write_text("\n".join(map(json.dumps, texts)))
        (folder / f"{name}.txt").write_text(prose(4000, number))
        (folder / name).mkdir()
        write_babi(folder / name)
    for file in (folder / "two").glob("*.txt"):  # the same stories of other people
        file.write_text(file.read_text().replace("Mary", "Zoe").replace("John", "Max"))
    return folder


def base(kind: str, folder) -> DataConfig:
    given = {
        "text": {"source": str(folder / "one-text.jsonl")},
        "instruction": {"source": str(folder / "one.jsonl")},
        "babilong": {"babi_source": str(folder / "one"), "hay_source": str(folder / "one.txt")},
        "niah": {"hay": "books", "hay_source": str(folder / "one.txt")},
        "varied": {"hay": "books", "hay_source": str(folder / "one.txt"), "wording": "varied"},
        "mixed text": {"source": str(folder / "one-text.jsonl"), "passkey_fraction": 0.5},
    }.get(kind, {})
    kind = {"varied": "passkey", "mixed text": "text"}.get(kind, kind)
    return DataConfig(kind=kind, num_samples=4, validation_samples=4, passkey_words=0, **given)


def other(field: str, data: DataConfig, folder) -> object:
    """A value that should change the samples of whoever reads the field."""
    text = {"text": "two-text.jsonl", "instruction": "two.jsonl"}.get(data.kind, "two.txt")
    return {
        "source": str(folder / text),
        "text_key": "body",
        "validation_source": str(folder / text),
        "ignored_fields": ("input",),
        "passkey_words": 12,
        "passkey_fraction": 0.75,
        "min_length_fraction": 0.5,
        "wording": "paper" if data.wording == "varied" else "varied",
        "validation_wording": "varied",
        "hay": "noise" if data.hay == "books" else "books",
        "hay_source": str(folder / "two.txt"),
        "babi_source": str(folder / "two"),
        "babi_tasks": ("qa2",),
        "mixture": (MixtureSource(kind="niah"),),
        "answer_only": False,
        "answer_weight": 3.0,
        "prompt_weight": 0.5,
        "end_weight": 0.5,
        "text_weight": 0.5,
        "kl_weight": 0.5,
    }[field]


# chat_date acts through a tokenizer's chat template only: tests/data/test_instructions.py
APART = ("kind", "weight", "chat_date")
FIELDS = [field.name for field in dataclasses.fields(MixtureSource) if field.name not in APART]
FIELDS += ["passkey_words", "passkey_fraction", "mixture", "answer_only"]


def validate(data: DataConfig) -> None:
    Config(stage1=StageConfig(steps=1, data=data), stage2=StageConfig(enabled=False)).validate()


def batches(data: DataConfig) -> list[dict[str, np.ndarray]]:
    made = []
    for split in ("train", "validation"):
        options = {"seq_length": 400, "batch_size": 4, "seed": 3, "split": split, "repeat": False}
        made += list(make_dataset(data, small.byte_level(), **options))
    return made


def same(first: list, second: list) -> bool:
    if len(first) != len(second):
        return False
    pairs = zip(first, second, strict=True)
    return all(a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a) for a, b in pairs)


@pytest.mark.parametrize("kind", ["passkey", "varied", "niah", "babilong", "instruction", "text", "mixed text"])
def test_what_is_refused_has_no_effect_and_what_is_accepted_has_one(kind, sources, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path_factory.mktemp("cache")))
    data = base(kind, sources)
    validate(data)
    before, refused = batches(data), set()
    for name in FIELDS:
        changed = dataclasses.replace(data, **{name: other(name, data, sources)})
        try:
            validate(changed)
        except ConfigError as problem:
            if f"data.{name}: " not in str(problem) or "is not read by kind" not in str(problem):
                continue  # it goes with another field
            refused.add(name)
            assert same(batches(changed), before), f"{name} is refused though {kind} reads it"
        else:
            assert not same(batches(changed), before), f"{name} is accepted though {kind} does not read it"
    assert len(refused) >= 3

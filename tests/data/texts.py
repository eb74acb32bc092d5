"""Prose and bAbI files made up on the spot, so that no test needs data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

STORIES = ["The sky is blue. Here we go.", "The sun is yellow.", "There and back again. The grass is green."]
_WORDS = """
the old man walked along a quiet river and thought about his house while rain fell on every roof of that town where people
slept until morning came with birds over green hills nobody had seen before winter
""".split()  # noqa: SIM905


def prose(words: int, seed: int = 0) -> str:
    """About ``words`` words in sentences of 5 to 20 words."""
    rng, out = np.random.default_rng(seed), []
    while words > 0:
        count = int(rng.integers(5, 21))
        sentence = " ".join(_WORDS[i] for i in rng.integers(len(_WORDS), size=count))
        out.append(sentence.capitalize() + "." + ("\n" if rng.random() < 0.1 else ""))
        words -= count
    return " ".join(out)


def write_stories(folder: Path) -> list[str]:
    """The stories as files of every kind, and where they are."""
    import pyarrow
    import pyarrow.parquet

    (folder / "txt").mkdir()
    for number, story in enumerate(STORIES):
        (folder / "txt" / f"{number}.txt").write_text(story)
    (folder / "s.jsonl").write_text("\n".join(json.dumps({"text": story, "id": 1}) for story in STORIES) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": STORIES, "id": [1, 2, 3]}), folder / "s.parquet")
    (folder / "hf").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": STORIES}), folder / "hf" / "train.parquet")
    return [str(folder / "txt"), str(folder / "txt" / "*.txt"), str(folder / "s.jsonl"), str(folder / "s.parquet")]


QA1 = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the {place}.
5 Sandra moved to the garden.
6 Where is Daniel? \t{place}\t4
"""
QA2 = """1 Mary got the milk there.
2 John moved to the bedroom.
3 Mary travelled to the {place}.
4 Where is the milk? \t{place}\t1 3
"""
QA3 = """1 Mary got the milk.
2 John moved to the bedroom.
3 Mary journeyed to the {place}.
4 Mary went to the garden.
5 Where was the milk before the garden? \t{place}\t1 3 4
"""
QA4 = """1 The hallway is east of the bathroom.
2 The {place} is west of the bathroom.
3 What is the bathroom east of?\t{place}\t2
"""
QA5 = """1 Fred picked up the football there.
2 Fred gave the football to Jeff.
3 What did Fred give to Jeff? \tfootball\t2
"""


def write_babi(directory: Path) -> str:
    """A small en-10k directory: train and test files of all tasks but qa3's train file, with a story in common."""
    for number, text in enumerate((QA1, QA2, QA3, QA4, QA5), 1):
        for split, places in (("test", ("kitchen", "office", "hallway")), ("train", ("bedroom", "kitchen"))):
            if (number, split) != (3, "train"):
                file = directory / f"qa{number}_some-name_{split}.txt"
                file.write_text("".join(text.format(place=place) for place in places))
    return str(directory)

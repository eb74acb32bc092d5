"""The pages say what exists: links lead to files, commands name modules, and the training commands are valid."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags

from lawcat_jax import command_line

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]


def commands() -> list[str]:
    """Lines of the fenced blocks of all pages, continued lines joined, without comments."""
    found = []
    for page in PAGES:
        for block in re.findall(
            r"^```(?:bash)?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            found += block.replace("\\\n", " ").splitlines()
    return found


# Those with a toy of CONTRIBUTING.md are valid where it was added only, those with <...> where it is filled in.
TRAINING = [line for line in commands() if re.search(r"-m lawcat_jax\.train (?!.*(?:toy|<)).*--config=", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, _ = target.partition("#")
        if path and "://" not in path:
            assert (page.parent / path).exists(), target


def test_anchors_of_a_page_are_its_titles():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        titles = {
            re.sub(r"[^\w -]", "", t).strip().lower().replace(" ", "-") for t in re.findall(r"^#+ (.*)$", text, re.M)
        }
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= titles, page.name


def test_modules_in_commands_exist():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = set(re.findall(r"-m ((?:lawcat_jax|kernels_pallas)[\w.]*\w)", text))
    assert len(names) > 8
    assert [name for name in sorted(names) if importlib.util.find_spec(name) is None] == []


def test_the_hub_s_command_line_has_its_present_name():
    files = [*PAGES, *sorted((ROOT / "lawcat_jax").rglob("*.py")), *sorted((ROOT / "configs").glob("*.py"))]
    assert [file.name for file in files if "huggingface-cli" in file.read_text(encoding="utf-8")] == []


def test_files_in_commands_exist():
    named = {
        name for line in commands() for name in re.findall(r"(?<![\w/])(?:configs|tests|launch)/[\w/]+\.\w+", line)
    }
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_files_in_the_text_exist():
    """Paths in backticks; those of the recipes' toys are made by ``test_contributing.py``."""
    missing = [
        f"{page.name}: {name}"
        for page in PAGES
        for name in re.findall(
            r"`((?:lawcat_jax|kernels_pallas|configs|launch|tests|docs)/[\w/.-]*)`", page.read_text(encoding="utf-8")
        )
        if not (ROOT / name).exists() and "toy" not in name
    ]
    assert not missing


@pytest.mark.parametrize("line", TRAINING)
def test_training_commands_are_valid(line, monkeypatch):
    arguments = [word for word in shlex.split(line, comments=True) if word.startswith("--config")]
    values = flags.FlagValues()
    argv = ["train", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(ROOT)
    holder = command_line.define_config(flag_values=values)
    command_line.parse_flags(argv, values)
    assert command_line.load_config(holder).stages()


def test_there_are_training_commands_to_check():
    assert len(TRAINING) >= 4

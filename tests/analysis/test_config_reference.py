"""docs/config.md is what the dataclasses say, and they say something about every field."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lawcat_jax.analysis import config_reference
from lawcat_jax.config import Config
from lawcat_jax.config.tree import Node

ROOT = Path(__file__).parents[2]


def test_the_committed_file_is_the_generated_one():
    command = "python -m lawcat_jax.analysis.config_reference > docs/config.md"
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == config_reference.reference(), f"run {command}"


def test_every_field_has_a_row():
    text = config_reference.reference()
    for path, kind in config_reference.places(Config):
        section = text.split(f"\n## {kind.__name__}\n")[1].split("\n## ")[0]
        assert f"`{path}`" in section
        for field in dataclasses.fields(kind):
            assert len(re.findall(rf"^\| `{field.name}` \|", section, re.MULTILINE)) == 1


def test_links_lead_somewhere():
    text = config_reference.reference()
    titles = {title.lower() for title in re.findall(r"^#+ (\w+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= titles


@dataclasses.dataclass
class _Silent(Node):
    """A field without a meaning."""

    x: int = 0


@dataclasses.dataclass
class _NoUnit(Node):
    """A number without a unit."""

    x: int = 0
    """How many."""


@dataclasses.dataclass
class _UnitOfText(Node):
    """A unit where there can be none."""

    x: str = ""
    """[metres] A name."""


@pytest.mark.parametrize("kind", [_Silent, _NoUnit, _UnitOfText])
def test_fields_without_meaning_or_unit_are_refused(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.x"):
        config_reference.fields(kind)


def test_config_and_its_reference_need_no_jax():
    code = "import sys, lawcat_jax.analysis.config_reference as r; r.reference(); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)

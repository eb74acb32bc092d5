"""The recipes of CONTRIBUTING.md, carried out as they are written in a copy of the project.

A block whose first line is ``# path`` becomes that file, one with ``# path, in NAME`` the last entries of the list or table
``NAME`` there. Nothing else is changed, and the files that a recipe says it touches are the ones that it does.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("lawcat_jax", "kernels_pallas", "tests", "configs", "docs", "pyproject.toml")
RECIPES = {
    "family": "A model family",
    "mixer": "A token mixer",
    "task": "A task",
    "backend": "A kernel backend",
}
PAGE = "docs/config.md"
COMMAND = f"python -m lawcat_jax.analysis.config_reference > {PAGE}"


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced Python block of the page: lines for a new file, or entries for a table of a file that is there."""

    path: str
    table: str | None
    text: str

    def apply(self, root: Path) -> None:
        path = root / self.path
        if self.table is None:
            assert not path.exists(), self.path
            path.write_text(self.text, encoding="utf-8")
        else:
            path.write_text(with_entries(path.read_text(encoding="utf-8"), self.table, self.text), encoding="utf-8")


def with_entries(source: str, table: str, entries: str) -> str:
    """``source`` with ``entries`` before the bracket that closes the value of ``table``."""
    (node,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) == table
    )
    lines = source.splitlines(keepends=True)
    end = sum(len(line) for line in lines[: node.value.end_lineno - 1]) + node.value.end_col_offset
    assert source.isascii(), "offsets of ast are bytes"
    before, bracket, after = source[: end - 1].rstrip(), source[end - 1], source[end:]
    assert bracket in "])}", f"{table} is no list"
    comma = "" if before.endswith((",", "[", "(", "{")) else ","
    return f"{before}{comma}\n{textwrap.indent(entries.rstrip().rstrip(','), '    ')},\n{bracket}{after}"


def section(title: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(title: str) -> list[Block]:
    """The Python blocks of a recipe, in order."""
    found = []
    for indent, text in re.findall(r"^( *)```python\n(.*?)^ *```$", section(title), re.MULTILINE | re.DOTALL):
        first, _, rest = textwrap.dedent(text).partition("\n")
        assert len(indent) <= 3
        where = re.fullmatch(r"# ([\w/.]+\.py)(?:, in (\w+))?", first)
        assert where, f"{title}: the first line of a block does not say where it goes: {first!r}"
        found.append(Block(where[1], where[2], rest))
    return found


def touches(title: str) -> set[str]:
    """The files that a recipe says it touches."""
    paragraph = re.search(r"^Touches: (.*?)\n\n", section(title), re.MULTILINE | re.DOTALL)
    assert paragraph
    return set(re.findall(r"`([^`]+)`", paragraph[1]))


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def python(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    # Programs run for milliseconds: compiling them fast matters more than how fast they are.
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with all four toys in it."""
    root = tmp_path_factory.mktemp("project")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name)
        else:
            shutil.copy2(ROOT / name, root / name)
    for title in RECIPES.values():
        before = contents(root)
        for block in blocks(title):
            block.apply(root)
        assert COMMAND in section(title)
        assert changed(before, contents(root)) | {PAGE} == touches(title), title
    return root


@pytest.fixture(scope="module")
def outcomes(project) -> dict[str, str]:
    """What each check says of its toy, "ok" or a traceback: one process for all, which takes long to start."""
    before = contents(project)
    done = python(project, "-m", "tests.recipe_checks", *RECIPES)
    assert done.returncode == 0, done.stderr
    after = contents(project)
    assert changed(before, after) - {name for name in after if name.startswith("out/")} == {PAGE}
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(outcomes, recipe):
    assert outcomes[recipe] == "ok", outcomes[recipe]


def test_entries_go_to_the_end_of_a_table():
    assert with_entries('A = L["x"]\nB = 1\n', "A", '"y"\n') == 'A = L["x",\n    "y",\n]\nB = 1\n'
    assert with_entries("A: D = {\n    1: 2,\n}\n", "A", "3: 4,\n") == "A: D = {\n    1: 2,\n    3: 4,\n}\n"


@pytest.mark.slow
def test_the_tests_that_the_recipes_name_pass(project, outcomes):
    """Those of the rooms, of which the toys are cases now. The toy family is unknown to transformers, so that it is not
    compared there."""
    files = [
        "tests/test_choices.py",
        "tests/analysis/test_config_reference.py",
        "tests/models/test_mixers.py",
        "tests/models/test_cache.py",
        "tests/tasks/test_runner.py",
        "tests/kernels/test_toy.py",
        "tests/kernels/test_contract.py",
        "tests/checkpoints/test_families.py",
    ]
    wanted = "(toy or choices or config_reference or every_family_is_tried) and not toy_qk_norm"
    done = python(project, "-m", "pytest", "-q", *files, "-k", wanted)
    assert done.returncode == 0, done.stdout[-5000:]


def test_the_copy_is_formatted(project):
    """What the page shows is what ruff would leave as it is."""
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("needs ruff")
    new = [block.path for title in RECIPES.values() for block in blocks(title) if block.table is None]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [ruff, *command, "--no-cache", *new], cwd=project, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

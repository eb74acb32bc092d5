"""The imports of both packages point one way: no circle between files or between folders, and layers from top to bottom.

Every import statement counts, also inside a function or under ``TYPE_CHECKING``: what a type checker follows, a reader
follows too. So does ``import_module("a.b")`` of a name that is written out. The files are parsed, not imported.

The order of the layers, and what must not import what, is read from the import-linter contracts in ``pyproject.toml``.
"""

from __future__ import annotations

import ast
import graphlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lawcat_jax", "kernels_pallas")

CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
# Top to bottom: a file imports from its own layer or from layers below it. What one layer holds may import each other.
LAYERS = [
    [f"lawcat_jax.{name.strip()}" for name in layer.split(":")]
    for contract in CONTRACTS
    if contract["type"] == "layers"
    for layer in contract["layers"]
]
# (importer, what neither it nor anything in it may import, why)
FORBIDDEN = [
    *(
        (one["source_modules"][0], one["forbidden_modules"], one["name"])
        for one in CONTRACTS
        if one["type"] == "forbidden"
    ),
    ("kernels_pallas", ["tests"], "Kernels run without the tests"),
    ("lawcat_jax", ["tests"], "The product runs without its tests"),
]

Graph = dict[str, set[str]]


def module_name(path: Path, root: Path) -> str:
    """``a/b/c.py`` -> ``a.b.c``; ``a/b/__init__.py`` -> ``a.b``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def named_by(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it or None) of every import statement, however deep."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((str(word.value), None) for word in node.args[:1] if isinstance(word, ast.Constant))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # from . import x
                parents = module.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
                base = ".".join([*parents, base] if base else parents)
            yield from ((base, alias.name) for alias in node.names)


def read_graph(root: Path, packages: tuple[str, ...]) -> tuple[Graph, Graph]:
    """(module -> modules of ``packages`` that it imports, module -> other modules that it imports).

    ``from a import b`` is an import of ``a.b`` where that is a file, else of ``a``. That Python runs ``a/__init__.py``
    before ``a.b`` counts as no import: it says nothing about what the code needs, and would tie every file of a package
    whose ``__init__`` offers names to all others.
    """
    files = {module_name(path, root): path for package in packages for path in sorted((root / package).rglob("*.py"))}
    inside: Graph = {module: set() for module in files}
    outside: Graph = {module: set() for module in files}
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for base, name in named_by(tree, module, path.name == "__init__.py"):
            target = f"{base}.{name}" if f"{base}.{name}" in files else base
            (inside if target in files else outside)[module].add(target)
    return inside, outside


def beside(graph: Graph) -> Iterator[tuple[str, Graph]]:
    """For every folder: its files and subfolders, each subfolder as one thing, and which of them need which.

    A folder's own ``__init__.py`` is one of its files there.
    """
    for folder in sorted({module.rpartition(".")[0] for module in graph}):  # "" holds the packages themselves
        start = f"{folder}." if folder else ""

        def child(module: str, folder: str = folder, start: str = start) -> str | None:
            if module == folder:
                return f"{folder}.__init__"
            return start + module[len(start) :].split(".")[0] if module.startswith(start) else None

        contracted: Graph = {}
        for module, targets in graph.items():
            if (one := child(module)) is not None:
                others = {other for target in targets if (other := child(target)) not in (None, one)}
                contracted.setdefault(one, set()).update(others)
        yield folder or "the top", contracted


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One circle of a graph, first and last the same; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as found:
        return list(reversed(found.args[1]))
    return []


def layer_of(module: str) -> int | None:
    """Number of a module's layer, 0 on top; None where it is in none."""
    found = [(len(name), row) for row, names in enumerate(LAYERS) for name in names if is_in(module, name)]
    return max(found)[1] if found else None


def is_in(module: str, package: str) -> bool:
    """Whether a module is ``package`` or lies in it."""
    return module == package or module.startswith(f"{package}.")


@pytest.fixture(scope="module")
def imports() -> tuple[Graph, Graph]:
    return read_graph(ROOT, PACKAGES)


def test_no_circle_between_files(imports):
    assert not circle(imports[0]), " -> ".join(circle(imports[0]))


def test_no_circle_between_folders(imports):
    found = {folder: " -> ".join(way) for folder, contracted in beside(imports[0]) if (way := circle(contracted))}
    assert not found


def test_every_file_has_a_layer(imports):
    homeless = [module for module in imports[0] if module.startswith("lawcat_jax.") and layer_of(module) is None]
    assert not homeless, f"add them to the layers in pyproject.toml: {homeless}"


def test_layers(imports):
    upwards = [
        f"{module} imports {target}"
        for module, targets in imports[0].items()
        for target in targets
        if None not in (layer_of(module), layer_of(target)) and layer_of(target) < layer_of(module)
    ]
    assert not upwards


@pytest.mark.parametrize(("importer", "forbidden", "why"), FORBIDDEN)
def test_forbidden_imports(imports, importer, forbidden, why):
    inside, outside = imports
    assert importer in inside  # else the contract is about a file that has moved
    found = [
        f"{module} imports {target}"
        for module in inside
        if is_in(module, importer)
        for target in inside[module] | outside[module]
        if any(is_in(target, name) for name in forbidden)
    ]
    assert not found, why


@pytest.mark.parametrize(
    ("files", "way"),
    [
        ({"p/a.py": "from p import b", "p/b.py": "def f():\n    import p.a"}, ["p.a", "p.b", "p.a"]),
        ({"p/a.py": "from p.b import f", "p/b.py": "if TYPE_CHECKING:\n    from . import a"}, ["p.a", "p.b", "p.a"]),
        ({"p/a.py": "import p.b", "p/b.py": "importlib.import_module('p.a')"}, ["p.a", "p.b", "p.a"]),
        # No two files need each other here, but the folders do.
        (
            {"p/x/a.py": "from ..y import b", "p/y/b.py": "", "p/y/c.py": "import p.x.d", "p/x/d.py": ""},
            ["p.x", "p.y", "p.x"],
        ),
        # A file and the folder beside it.
        ({"p/a.py": "import p.x.b", "p/x/b.py": "", "p/x/c.py": "from ..a import f"}, ["p.a", "p.x", "p.a"]),
        ({"p/a.py": "from p.x import b, c", "p/x/b.py": "from . import c", "p/x/c.py": "import os"}, []),
    ],
)
def test_circles_are_found(tmp_path, files, way):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in [path.parent, *path.parent.relative_to(tmp_path).parents]:
            (tmp_path / folder / "__init__.py").touch()
        path.write_text(text)
    graph, _ = read_graph(tmp_path, ("p",))
    ways = [found for _, contracted in beside(graph) if (found := circle(contracted))]
    assert {frozenset(found) for found in ways} == ({frozenset(way)} if way else set())

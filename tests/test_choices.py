"""The Literal types of lawcat_jax.config are the only lists of options: tables and comparisons elsewhere agree with them."""

from __future__ import annotations

import ast
import dataclasses
import typing
from pathlib import Path

import pytest

import kernels_pallas
from lawcat_jax import config, projections
from lawcat_jax.checkpoints.hf import families, rope_map
from lawcat_jax.config import choices
from lawcat_jax.config.tree import options
from lawcat_jax.models import blocks, decoder
from lawcat_jax.models.mixers import feature_maps, inits
from lawcat_jax.tasks import passkey, registry

PACKAGE = Path(config.__file__).parents[1]

TABLES = {
    "Family": families.table(),
    "MixerKind": decoder.MIXERS,
    "FeatureMap": feature_maps.FEATURE_MAPS,
    "Init": inits.INITS,
    "Remat": blocks.REMAT,
    "Implementation": kernels_pallas.IMPLEMENTATIONS,
    "Projection": projections.LORA_TARGETS,
    "LayerProjection": [row.name for row in projections.PROJECTIONS],
    "RopeKind": [{"default": "none"}.get(name, name) for name in rope_map.FIELDS],
    "PasskeyForm": passkey._WORDINGS,
    "TaskName": registry.tasks(),
}


def config_classes() -> list[type]:
    return [kind for kind in vars(config).values() if dataclasses.is_dataclass(kind)]


def fields_with_options() -> dict[str, set[str]]:
    """Field name -> every option that a field of that name has in some config class."""
    found: dict[str, set[str]] = {}
    for kind in config_classes():
        for name, hint in typing.get_type_hints(kind).items():
            inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
            if allowed := options(inner):
                found.setdefault(name, set()).update(value for value in allowed if value is not None)
    return found


@pytest.mark.parametrize("name", TABLES)
def test_tables_hold_every_option_and_no_other(name):
    assert sorted(TABLES[name]) == sorted(typing.get_args(getattr(choices, name)))


def test_every_list_of_options_is_used_by_a_field():
    used = set().union(*fields_with_options().values())
    lists = {name: typing.get_args(value) for name, value in vars(choices).items() if options(value)}
    assert len(lists) >= 18
    assert {name for name, values in lists.items() if not used.issuperset(values)} == set()


def test_every_list_of_options_is_exported():
    for name, value in vars(choices).items():
        if options(value):
            assert getattr(config, name) == value


def test_comparisons_name_options_that_exist():
    """``stage.schedule == "plateau"`` or ``a.conv in ("on", "shared")`` in the code: the name is an option of that field."""
    known = fields_with_options()
    checked, wrong = set(), []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr in known):
                continue
            names = [
                leaf.value for side in node.comparators for leaf in ast.walk(side) if isinstance(leaf, ast.Constant)
            ]
            for name in names:
                if isinstance(name, str):
                    checked.add(node.left.attr)
                    if name not in known[node.left.attr]:
                        wrong.append(
                            f"{file.relative_to(PACKAGE)}:{node.lineno}: {node.left.attr} compared with {name!r}"
                        )
    assert not wrong
    assert checked >= {"schedule", "kind", "conv", "gate_kind"}  # the search finds what it is meant to find

"""The committed sharding manifests are what the code does."""

from __future__ import annotations

import json

import pytest

from tests.golden import sharding


@pytest.mark.parametrize("name", sharding.MANIFESTS)
def test_sharding_manifest(name):
    committed = json.loads(sharding.MANIFESTS[name].read_text(encoding="utf-8"))
    found = sharding.manifest(name)
    assert set(found) == set(committed)
    for part, specs in found.items():
        differing = {path: (committed[part].get(path), spec) for path, spec in specs.items()}
        differing = {path: pair for path, pair in differing.items() if pair[0] != pair[1]}
        missing = sorted(set(committed[part]) - set(specs))
        assert not differing, f"{part}: {differing}; if meant so: python -m tests.golden.sharding"
        assert not missing, f"{part}: no longer there: {missing}; if meant so: python -m tests.golden.sharding"


@pytest.mark.parametrize("name", sharding.MANIFESTS)
def test_big_arrays_are_split(name):
    """Nothing of a million elements or more lies whole on every device."""
    for part, specs in json.loads(sharding.MANIFESTS[name].read_text(encoding="utf-8")).items():
        for path, spec in specs.items():
            size = 1
            for dimension in spec.split() if spec != "scalar" else []:
                size *= int(dimension.split(":")[0])
            split = any(not dimension.endswith(":-") for dimension in spec.split()) if spec != "scalar" else False
            assert split or size < 1_000_000, f"{part} {path}: {spec}"

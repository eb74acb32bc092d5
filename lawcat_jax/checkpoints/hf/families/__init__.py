"""Model families: one file each says how its ``config.json`` is read and written and how its tensors are named.

A new family is a file here with a :class:`~lawcat_jax.checkpoints.hf.families.family.Family` called ``FAMILY``, named
like the ``model_type`` of its ``config.json``, and that name in :data:`lawcat_jax.config.FAMILIES`.
"""

from __future__ import annotations

import importlib

from lawcat_jax.checkpoints.hf.families.family import Family
from lawcat_jax.config import FAMILIES


def find(name: str) -> Family:
    """The family of a ``model_type`` in :data:`lawcat_jax.config.FAMILIES`."""
    return importlib.import_module(f"{__name__}.{name}").FAMILY


def table() -> dict[str, Family]:
    """Every family by ``model_type``."""
    return {name: find(name) for name in FAMILIES}

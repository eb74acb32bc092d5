"""Model families: one file each says how its ``config.json`` is read and written and how its tensors are named.

A new family is a file here with a :class:`~lawcat_jax.checkpoints.hf.families.family.Family` called ``FAMILY``, named
like the ``model_type`` of its ``config.json``, and that name in ``lawcat_jax.config.choices.Family``.

Gemma is not among them: it would need of the decoder another activation, norms with an offset, a scaled embedding, a
scale of its own for attention and, for Gemma 2, soft caps on scores that the attention kernels used here do not have, or,
for Gemma 3, two rotary tables; each a branch for one family alone.
"""

from __future__ import annotations

import importlib
from typing import get_args

from lawcat_jax.checkpoints.hf.families.family import Family
from lawcat_jax.config import choices


def find(name: str) -> Family:
    """The family of a ``model_type`` that is an option of ``ModelConfig.family``."""
    return importlib.import_module(f"{__name__}.{name}").FAMILY


def table() -> dict[str, Family]:
    """Every family by ``model_type``."""
    return {name: find(name) for name in get_args(choices.Family)}

"""Token mixers: what stands in for softmax attention in a linearised layer.

A new mixer is a file here, named like its option of ``AttentionConfig.kind``, with a class of
:class:`~lawcat_jax.models.mixers.mixer.TokenMixer` called ``MIXER``, and that name in
``lawcat_jax.config.choices.MixerKind``.
"""

from __future__ import annotations

import importlib
from typing import get_args

from jax.sharding import PartitionSpec

from lawcat_jax.config import AttentionConfig, choices
from lawcat_jax.models.mixers.ablations import LawcatAblation, is_paper_design
from lawcat_jax.models.mixers.mixer import TokenMixer
from lawcat_jax.runtime import sharding

__all__ = ["MIXERS", "TokenMixer", "mixer_class", "sharding_rules"]

MIXERS: dict[str, type[TokenMixer]] = {
    kind: importlib.import_module(f"{__name__}.{kind}").MIXER for kind in get_args(choices.MixerKind)
}
"""``AttentionConfig.kind`` -> class, the ``MIXER`` of the file of that name."""


def mixer_class(attention: AttentionConfig) -> type[TokenMixer]:
    """The class that serves this config: that of its ``kind``, or the ablations' where a switch of the paper's mixer is
    turned.

    Raises:
      KeyError: for a kind that is not in :data:`MIXERS`.
    """
    if attention.kind == "lawcat" and not is_paper_design(attention):
        return LawcatAblation
    return MIXERS[attention.kind]


def sharding_rules() -> list[sharding.Rule]:
    """How parameters and decoding states of all mixers are split, as rules for :func:`sharding.add_rules`."""
    rules = []
    for mixer in (*MIXERS.values(), LawcatAblation):
        for prefix, table in (("mixers/", mixer.parameter_rules), ("(^|/)linear/", mixer.state_rules)):
            # Axis 0 of every array are the stacked layers.
            rules += [(f"{prefix}(?:{pattern})$", PartitionSpec(None, *spec)) for pattern, spec in table.items()]
    return rules


sharding.add_rules(sharding_rules())

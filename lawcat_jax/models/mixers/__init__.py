"""Token mixers: what stands in for softmax attention in a linearised layer.

To add one, write a class of :class:`~lawcat_jax.models.mixers.mixer.TokenMixer` in a file of this folder, give it a
name in :data:`MIXERS`, and add the name to the options of ``AttentionConfig.kind``.
"""

from __future__ import annotations

from jax.sharding import PartitionSpec

from lawcat_jax.config import AttentionConfig
from lawcat_jax.models.mixers.ablations import LawcatAblation, is_paper_design
from lawcat_jax.models.mixers.lawcat import LawcatMixer
from lawcat_jax.models.mixers.lolcats import LolcatsMixer
from lawcat_jax.models.mixers.mixer import TokenMixer
from lawcat_jax.runtime import sharding

__all__ = ["MIXERS", "TokenMixer", "mixer_class", "sharding_rules"]

MIXERS: dict[str, type[TokenMixer]] = {"lawcat": LawcatMixer, "lolcats": LolcatsMixer}
"""``AttentionConfig.kind`` -> class."""


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

"""What every token mixer gives: the protocol that decoder, FLOP counts and sharding rely on.

A token mixer stands in a linearised layer where softmax attention stood: it gets the projected q, k and v and returns
the output of the heads, before Wo. A new one is a class of this protocol, called ``MIXER`` in a file of its own, and the
file's name in ``lawcat_jax.config.choices.MixerKind``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from flax import nnx
from jax.sharding import PartitionSpec

from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.models.layers import Context, Stack

if TYPE_CHECKING:
    from jaxtyping import Array, Float

State = dict[str, Any]
"""What a layer keeps of the past: a nested dict of arrays [B, ...], of a size that does not grow with the tokens."""

Rules = Mapping[str, PartitionSpec]
"""Regular expression for the whole '/'-joined path of an array -> mesh axes of its dimensions (see ``TokenMixer``)."""


@runtime_checkable
class TokenMixer(Protocol):
    """An ``nnx.Module`` holding the token-mixing parameters of one layer (or, with ``stack``, of a stack of layers).

    Names of sizes: batch B, tokens T, model width D, query heads H, key-value heads Hkv, head dimension d. Query head
    h belongs to key-value head h // (H / Hkv).
    """

    parameter_rules: ClassVar[Rules]
    """How each parameter is split over the mesh: its path within the mixer ("gate_up/kernel") -> axes ("data", "fsdp",
    "tensor" or None) of its dimensions without ``stack``. Mixers that use the same name split it the same way.
    """

    state_rules: ClassVar[Rules]
    """The same for each array of :meth:`empty_state`, batch first: sequences over ("data", "fsdp"), heads over
    "tensor".
    """

    def __init__(self, config: ModelConfig, attention: AttentionConfig, *, rngs: nnx.Rngs, stack: Stack = ()) -> None:
        """Fresh float32 parameters, each with the leading axes ``stack`` (independent draws along them)."""
        ...

    @staticmethod
    def problems(config: ModelConfig, attention: AttentionConfig) -> list[str]:
        """What this mixer cannot do with these configs, one sentence each: the field, what is wrong, the remedy."""
        ...

    @staticmethod
    def flops_per_token(config: ModelConfig, attention: AttentionConfig) -> float:
        """Operations of one layer's forward pass for one token, in the recurrent form; two for a multiplication and
        addition. Projections are not counted.
        """
        ...

    @staticmethod
    def empty_state(config: ModelConfig, attention: AttentionConfig, batch: int, dtype: Any) -> State:
        """The state before the first token; rows of activations in ``dtype``, sums in float32."""
        ...

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        v: Float[Array, "B T Hkv d"],
        context: Context,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T H d"], State]:
        """(output of the heads before Wo, in v's dtype; state after the last valid token).

        ``x`` is the layer's input after its norm; q, k and v are its projections, not rotated. Any split of a sequence
        into calls that hand on the state gives the same outputs. ``state`` None is the start of a sequence. Padding
        stands on the right: it leaves the state alone, and its outputs are finite and mean nothing.
        """
        ...

    def statistics(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        v: Float[Array, "B T Hkv d"],
        context: Context,
    ) -> dict[str, Array]:
        """Named numbers to watch in training, over the valid tokens of whole sequences; the first axis is heads."""
        ...

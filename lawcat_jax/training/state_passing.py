"""State passing: a training step whose rows begin with what the student remembers, not with nothing.

A recurrent model that only ever trains from an empty state fails beyond its training length, because there it meets
states that it has never seen; a few hundred steps that begin with the final states of other sequences cure that
(arXiv 2507.02782). What passes from step to step is everything that the linearised layers keep of the past: S, z, the
rows of the convolutions, and of a window. Two ways (``StageConfig.state_passing``):

``shuffled``
    A row begins with the final state of a random row of the batch before.
``pieces``
    A row begins with its own final state where ``batch["continues"]`` says that it goes on with the sample that it held
    in the batch before (long samples cut into pieces), and with nothing elsewhere.

Of either, ``state_reset`` is the share of rows that begin with nothing all the same. No gradient crosses the boundary
between two steps, unless ``state_gradient`` is 1: then the tokens of the batch before are kept as well and run again
from the state before *them*, so that the loss reaches back through one boundary (truncated backpropagation), at the
cost of a second forward and backward pass without an output head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from lawcat_jax.config import StageConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int


class Previous(NamedTuple):
    """The tokens [B, T] of the batch before and how many of each row are valid [B]."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]


class Carry(NamedTuple):
    """What one step leaves to the next: the student's recurrent state by row.

    ``recurrent`` is that of :meth:`lawcat_jax.models.Decoder.init_recurrent`. With ``previous`` it is the state before
    those tokens, else the state that a row begins with.
    """

    recurrent: dict[str, Any]
    previous: Previous | None = None

    def as_dict(self) -> dict[str, Any]:
        """The carry as nested dicts, as checkpoints hold it."""
        return {"recurrent": self.recurrent} | ({"previous": self.previous._asdict()} if self.previous else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Carry:
        """Inverse of :meth:`as_dict`."""
        previous = Previous(**values["previous"]) if "previous" in values else None
        return cls(values["recurrent"], previous)


class Entry(NamedTuple):
    """What enters a step: a carry whose rows are in this batch's order, and which of them are used [B]."""

    carry: Carry
    keep: Bool[Array, " B"]


def empty(recurrent: dict[str, Any], tokens: Any, stage: StageConfig) -> Carry:
    """The carry before the first step; ``tokens`` has the shape of a batch of tokens."""
    previous = None
    if stage.state_gradient:
        previous = Previous(jnp.zeros(tokens.shape, jnp.int32), jnp.zeros(tokens.shape[:1], jnp.int32))
    return Carry(recurrent, previous)


def by_row(function: Any, carry: Carry) -> Carry:
    """``function(array, axis)`` of every array, with the axis of its rows."""
    recurrent = {
        name: jax.tree.map(lambda x, axis=int(name == "linear"): function(x, axis), part)
        for name, part in carry.recurrent.items()
    }
    previous = None if carry.previous is None else Previous(*(function(x, 0) for x in carry.previous))
    return Carry(recurrent, previous)


def enter(carry: Carry, batch: Mapping[str, Any], key: jax.Array, stage: StageConfig) -> Entry:
    """The rows of ``carry`` as the rows of ``batch`` begin with them."""
    rows = batch["tokens"].shape[0]
    order_key, reset_key = jax.random.split(key)
    keep = ~jax.random.bernoulli(reset_key, stage.state_reset, (rows,))
    if stage.state_passing == "pieces":
        return Entry(carry, keep & batch["continues"])
    order = jax.random.permutation(order_key, rows)
    return Entry(by_row(lambda x, axis: jnp.take(x, order, axis=axis), carry), keep)


def where_kept(recurrent: dict[str, Any], keep: Bool[Array, " B"]) -> dict[str, Any]:
    """The state of the rows that are kept, nothing in the others."""

    def masked(x: jax.Array, axis: int) -> jax.Array:
        shape = [1] * x.ndim
        shape[axis] = -1
        return jnp.where(keep.reshape(shape), x, jnp.zeros_like(x))

    return by_row(masked, Carry(recurrent)).recurrent

"""Building blocks of the decoder, and what every token mixer shares.

Modules hold parameters that may carry leading ``stack`` axes: all layers of a model live in one module whose arrays
have a leading layer axis, and ``jax.lax.scan`` hands the same module class one layer's slice at a time.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.common import without_padding
from lawcat_jax import projections
from lawcat_jax.config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

Stack = tuple[int, ...]
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
T = TypeVar("T")


@functools.cache
def _hashable_type(kind: type) -> type:
    return type(kind.__name__, (kind,), {"__hash__": lambda self: hash(repr(self)), "__module__": kind.__module__})


def static_config(config: T) -> T:
    """A private copy of a config dataclass that hashes by content, so that a module holding it is a valid jit static
    argument.
    """
    if config is None:
        return config
    copied = copy.deepcopy(config)
    if type(copied).__hash__ is None:
        copied.__class__ = _hashable_type(type(copied))
    return copied


def param(rngs: nnx.Rngs, init: Initializer, stack: Stack, shape: tuple[int, ...], dtype=jnp.float32) -> nnx.Param:
    """A parameter of ``stack + shape``; ``init`` sees the whole shape and treats leading axes as independent draws."""
    return nnx.Param(init(rngs.params(), (*stack, *shape), dtype))


def normal(stddev: float) -> Initializer:
    """N(0, stddev^2)."""

    def init(key, shape, dtype):
        return stddev * jax.random.normal(key, shape, dtype)

    return init


def constant(value: float) -> Initializer:
    """Every entry equal."""

    def init(key, shape, dtype):
        return jnp.full(shape, value, dtype)

    return init


class Context(NamedTuple):
    """What a token mixer knows about the tokens of one call, beside their values.

    ``cos``, ``sin``: rotary table [B, T, d/2]. ``start``: tokens already in the cache, [B] int32. ``lengths``: valid
    tokens of this call, [B] int32, or None when all are; padding is on the right. ``segments``: number 0, 1, ... of the
    document that each token of a packed row belongs to, [B, T] int32, or None for one document; no token sees another
    document's.
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    start: Int[Array, " B"]
    lengths: Int[Array, " B"] | None = None
    segments: Int[Array, "B T"] | None = None

    def positions(self) -> Int[Array, "B T"]:
        """Tokens of the same document before each token, those in the cache included."""
        return token_positions(self.start, self.cos.shape[1], self.segments)

    def valid(self) -> Bool[Array, "B T"]:
        """Which tokens are not padding."""
        batch, length = self.cos.shape[:2]
        if self.lengths is None:
            return jnp.ones((batch, length), bool)
        return jnp.arange(length) < self.lengths[:, None]

    def without_padding(self, *arrays: Float[Array, "B T ..."]) -> tuple[Array, ...]:
        """The arrays with zeros at padding, and zero gradient there: masks that multiply by 0 would let NaN through."""
        return without_padding(None if self.lengths is None else self.valid(), *arrays)


def token_positions(start: Int[Array, " B"], length: int, segments: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """start .. start + T - 1 of each sequence, or, of packed rows, from 0 in each document but the first."""
    index = jnp.arange(length, dtype=jnp.int32)
    if segments is None:
        return start[:, None] + index
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    begin = jax.lax.cummax(jnp.where(first, index, -start[:, None]), axis=1)
    return index - begin


class Linear(nnx.Module):
    """y = x @ kernel (+ bias), kernel [in, out], bias [out]; float32 parameters under bfloat16 activations are used in
    bfloat16.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        stack: Stack = (),
        dtype=jnp.float32,
        init=None,
        bias: bool = False,
    ):
        self.kernel = param(rngs, init or normal(0.02), stack, (inputs, outputs), dtype)
        self.bias = nnx.Param(jnp.zeros((*stack, outputs), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale; the normalisation in float32, the scale applied in x's dtype (as Llama does)."""

    def __init__(self, size: int, eps: float, *, stack: Stack = (), dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((*stack, size), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        return _rms_normalized(x, self.scale[...], self.eps)


# What lies between a layer's matrix products is computed again in the backward pass: its intermediate arrays, float32
# some of them, would take more time to write and read than to compute, and half of a layer's memory.


@functools.partial(jax.checkpoint, static_argnums=(2,), prevent_cse=False)
def _rms_normalized(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return scale.astype(x.dtype) * y.astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    if TYPE_CHECKING:  # set by name
        gate_proj: Linear
        up_proj: Linear
        down_proj: Linear

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, stack: Stack = (), dtype=jnp.float32):
        for row in projections.MLP:
            bias = row.has_bias(config)
            setattr(self, row.name, Linear(*row.sizes(config), rngs=rngs, stack=stack, dtype=dtype, bias=bias))

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        return self.down_proj(_gated(self.gate_proj(x), self.up_proj(x)))

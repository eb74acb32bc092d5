"""A hash of what an array holds and where, computed on the devices where the array lies.

Element i, of bits b, adds a hash of (i, b) to two sums modulo 2^32. Sums of integers depend on no order, so an array has one
hash however it is sharded; and since the hash of an element is not linear in b, no exchange of elements, change of signs or
other change with a pattern cancels out. It finds changes; it does not stand against somebody who constructs one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import UInt32

GOLDEN = (
    0x9E3779B9  # 2^32 over the golden ratio, and two odd factors of xxHash32, for want of numbers that mean nothing
)
FACTORS = (0x85EBCA77, 0xC2B2AE3D)
ROUNDS = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))  # shift and factor, of the finalizer of MurmurHash3


def element_bits(x: jax.Array) -> UInt32[jax.Array, "*shape"]:
    """The bits of each element as u32; elements of 8 bytes have a trailing axis of 2."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def array_hash(x: jax.Array) -> UInt32[jax.Array, "words=2"]:
    """u32 [2]: the hash of an array, of any dtype whose elements have 1, 2, 4 or 8 bytes. To be called in a jitted function."""
    bits = element_bits(x)
    coordinates = [jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) for axis in range(bits.ndim)]
    high, low = position(coordinates, bits.shape)
    key = _mixed(low + jnp.uint32(GOLDEN) if high is None else (low + jnp.uint32(GOLDEN)) ^ _mixed(high))
    first = _mixed(bits ^ key)
    second = _mixed(bits * jnp.uint32(FACTORS[0]) + key * jnp.uint32(FACTORS[1]))
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


def position(coordinates: Sequence[jax.Array], shape: Sequence[int]) -> tuple[jax.Array | None, jax.Array]:
    """(high, low) 32 bits of the index in C order of the elements at ``coordinates`` (u32, one array for each axis) of an
    array of this shape; high is None where the array has no more than 2^32 elements, all of whose indices have 0 there."""
    low = jnp.zeros((), jnp.uint32)
    high = None if math.prod(shape) <= 1 << 32 else low
    for coordinate, size in zip(coordinates, shape, strict=True):
        if high is not None:
            high = high * jnp.uint32(size) + _high_product(low, size)
        low = low * jnp.uint32(size % (1 << 32)) + coordinate
        if high is not None:
            high = high + (low < coordinate)  # the carry
    return high, low


def _high_product(a: jax.Array, b: int) -> jax.Array:
    """The upper 32 bits of the product of a u32 and a number below 2^32, by parts of 16 bits."""
    half, sixteen = jnp.uint32(0xFFFF), jnp.uint32(16)
    a_high, a_low, b_high, b_low = a >> sixteen, a & half, jnp.uint32(b >> 16), jnp.uint32(b & 0xFFFF)
    middle = a_high * b_low + ((a_low * b_low) >> sixteen)
    other = a_low * b_high + (middle & half)
    return a_high * b_high + (middle >> sixteen) + (other >> sixteen)


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of u32 in which every bit depends on all (the finalizer of MurmurHash3, A. Appleby, public domain)."""
    for shift, factor in ROUNDS:
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))

"""The hash of an array: of what changes it has to differ, and that it is one number however the array lies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lawcat_jax.runtime.array_hash import array_hash, position

DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint16", "bool", "float8_e4m3fn")
hashed = jax.jit(array_hash)


def value(array) -> tuple[int, int]:
    return tuple(np.asarray(hashed(array)).tolist())


def by_hand(array: np.ndarray) -> tuple[int, int]:
    """The definition, element by element, in Python's integers."""

    def mixed(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    first = second = 0
    for place, bits in enumerate(array.reshape(-1).view(f"u{array.dtype.itemsize}").tolist()):
        key = mixed((place + 0x9E3779B9) % 2**32)
        first += mixed(bits ^ key)
        second += mixed((bits * 0x85EBCA77 + key * 0xC2B2AE3D) % 2**32)
    return first % 2**32, second % 2**32


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_the_definition_says_and_knows_places(dtype):
    array = np.random.default_rng(0).normal(0, 30, size=(3, 4, 6)).astype(dtype)
    if dtype == "bool":
        array = np.random.default_rng(0).integers(0, 2, size=(3, 4, 6)).astype(bool)
    own = value(jnp.asarray(array))
    assert own == by_hand(array)
    changed = {
        "layers": array[[1, 0, 2]],
        "rows": array[:, [0, 3, 2, 1]],
        "columns": array[:, :, [0, 1, 2, 3, 5, 4]],
        "reversed": array[::-1],
    }
    for name, other in changed.items():
        assert value(jnp.asarray(np.ascontiguousarray(other))) != own, name


# Values whose bits differ in few places: those on which a sum weighted by position would agree.
FLOATS = [(0.0, -0.0), (1.5, -1.5), (1.0, 2.0), (0.0, 1.0)]


@pytest.mark.parametrize("distance", [1, 2, 1 << 15, 1 << 16])
@pytest.mark.parametrize("values", FLOATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_exchanged_elements(dtype, values, distance):
    array = np.zeros(1 << 17, ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    for start in (0, 77):
        one, other = array.copy(), array.copy()
        one[[start, start + distance]] = values
        other[[start, start + distance]] = values[::-1]
        assert value(jnp.asarray(one)) != value(jnp.asarray(other))


def test_signs_and_bits_of_nan():
    array = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    seen = {value(jnp.asarray(array)), value(jnp.asarray(-array))}
    for bits in (0x7FC00000, 0x7FC00001, 0xFFC00000, 0x7FA00000):
        array.view(np.uint32)[3, 5] = bits
        seen.add(value(jnp.asarray(array)))
    zeros = np.zeros(4096, np.float32)
    seen |= {value(jnp.asarray(zeros)), value(jnp.asarray(-zeros))}
    assert len(seen) == 8


def test_layers_of_few_bits_reversed():
    """Values that came from bfloat16 have 16 low bits of 0, and rows of 2^16 elements lie at multiples of 2^16."""
    layers = np.random.default_rng(0).normal(size=(4, 256, 256)).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert value(jnp.asarray(layers)) != value(jnp.asarray(np.ascontiguousarray(layers[::-1])))


@pytest.mark.parametrize(
    ("dtype", "spec"),
    [("float32", ("x",)), ("float32", (None, "x")), ("bfloat16", (None, None, "x")), ("int32", ())],
)
def test_the_same_however_it_is_sharded(dtype, spec):
    array = jnp.asarray(np.random.default_rng(0).normal(0, 9, size=(8, 16, 24)), dtype)
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))
    split = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert len(split.sharding.device_set) == 8
    assert value(split) == value(array)


def test_positions_beyond_32_bits():
    shape = (80, 8192, 28672)
    places = np.array([[0, 0, 0], [18, 2340, 16383], [18, 2340, 16384], [79, 8191, 28671], [37, 4681, 4096]], np.uint32)
    high, low = position([jnp.asarray(axis) for axis in places.T], shape)
    expected = np.ravel_multi_index(tuple(places.astype(np.int64).T), shape)
    assert (np.asarray(high).astype(np.int64) * 2**32 + np.asarray(low)).tolist() == expected.tolist()
    assert (expected > 2**32).sum() >= 2
    assert position([jnp.uint32(3), jnp.uint32(4)], (5, 6))[0] is None

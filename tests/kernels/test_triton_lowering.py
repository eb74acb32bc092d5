"""Every Triton kernel lowers for an NVIDIA GPU on a machine without one, in the expected number of launches."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import kernels_pallas as kp

BF16, F32 = jnp.bfloat16, jnp.float32


def cuda_module(function, *shapes) -> str:
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def launches(function, *shapes) -> list[str]:
    """Names of the kernels in the CUDA module, in order."""
    text = cuda_module(function, *shapes)
    calls = re.findall(r"custom_call @(?:triton_kernel_call\w*|__gpu\$xla\.gpu\.triton)[^\n]*?name = \"(\w+)\"", text)
    assert len(calls) == len(re.findall(r"custom_call @(?:triton_kernel_call|__gpu\$xla\.gpu\.triton)", text))
    return calls


def ids(batch, length):
    return jax.ShapeDtypeStruct((batch, length), jnp.int32)


def gla(batch, length, d, dtype=BF16, *, heads=32, groups=1, gradient=False, state=False, segments=False, bound=-1.25):
    def struct(h, kind=dtype):
        return jax.ShapeDtypeStruct((batch, length, h, d), kind)

    arrays = (struct(heads), struct(heads), struct(heads // groups), struct(heads // groups, F32))
    given = None
    if state:
        given = (jax.ShapeDtypeStruct((batch, heads, d, d), F32), jax.ShapeDtypeStruct((batch, heads, d), F32))

    numbers = ids(batch, length) if segments else None

    def forward(arrays, given, numbers):
        options = {"segment_ids": numbers, "gate_lower_bound": bound, "implementation": "pallas_triton"}
        return kp.gated_linear_attention(*arrays, initial_state=given, **options)

    def both(arrays, given, numbers, cotangents):
        return jax.vjp(lambda *x: forward(*x, numbers), arrays, given)[1](cotangents)

    if not gradient:
        return launches(forward, arrays, given, numbers)
    final = (jax.ShapeDtypeStruct((batch, heads, d, d), F32), jax.ShapeDtypeStruct((batch, heads, d), F32))
    return launches(both, arrays, given, numbers, (struct(heads), final))


OUT, STATE, COMBINE = "gla_segment_out", "gla_segment_state", "gla_combine"
BACKWARD = ["gla_states", "gla_dstates", "gla_chunk_vjp"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch": 32, "length": 1024, "d": 64}, [OUT]),
        ({"batch": 32, "length": 1000, "d": 64, "groups": 4, "state": True}, [OUT]),
        ({"batch": 32, "length": 1024, "d": 128}, [OUT]),
        ({"batch": 32, "length": 1024, "d": 64, "dtype": F32}, [OUT]),
        ({"batch": 1, "length": 1024, "d": 64}, [STATE, OUT]),
        ({"batch": 1, "length": 65536, "d": 64, "heads": 4}, [STATE, COMBINE, OUT]),
        ({"batch": 32, "length": 256, "d": 64, "gradient": True}, [OUT, *BACKWARD]),
        ({"batch": 32, "length": 250, "d": 128, "groups": 4, "gradient": True, "state": True}, [OUT, *BACKWARD]),
        (
            {"batch": 1, "length": 2048, "d": 64, "gradient": True},
            [STATE, COMBINE, OUT, "gla_states", "gla_dstates", COMBINE, "gla_dstates", "gla_chunk_vjp"],
        ),
        # Packed documents take as many launches.
        ({"batch": 32, "length": 1000, "d": 64, "groups": 4, "segments": True}, [OUT]),
        (
            {"batch": 1, "length": 2000, "d": 128, "gradient": True, "segments": True},
            [STATE, COMBINE, OUT, "gla_states", "gla_dstates", COMBINE, "gla_dstates", "gla_chunk_vjp"],
        ),
        ({"batch": 32, "length": 250, "d": 64, "dtype": F32, "gradient": True, "segments": True}, [OUT, *BACKWARD]),
        ({"batch": 32, "length": 250, "d": 128, "gradient": True, "bound": None}, [OUT, *BACKWARD]),
    ],
)
def test_gla_launches(options, expected):
    assert sorted(gla(**options)) == sorted(expected)


@pytest.mark.parametrize(
    ("batch", "length", "expected"),
    [
        (32, 1024, ["lawcat_features", OUT]),
        (1, 1024, ["lawcat_features", STATE, OUT]),
        (64, 1, ["lawcat_decode"]),
    ],
)
@pytest.mark.parametrize("d", [64, 128])
def test_lawcat_launches(batch, length, expected, d):
    found = launches(by_kernel, lawcat_arrays(batch, length, d))
    assert sorted(found) == sorted(expected)


def by_kernel(arrays, lengths=None, segment_ids=None):
    known = {"lengths": lengths, "segment_ids": segment_ids}
    return kp.lawcat_attention(**arrays, **known, implementation="pallas_triton")


@pytest.mark.parametrize("segments", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("d", [64, 128])
def test_a_padded_layer_takes_the_launches_of_a_whole_one(d, segments):
    lengths, numbers = jax.ShapeDtypeStruct((32,), jnp.int32), ids(32, 1000) if segments else None
    arrays = lawcat_arrays(32, 1000, d)
    assert sorted(launches(by_kernel, arrays, lengths, numbers)) == sorted(["lawcat_features", OUT])

    def gradient(arrays, lengths, numbers):
        out, pullback = jax.vjp(lambda x: by_kernel(x, lengths, numbers), arrays)
        return pullback(out)

    # The backward pass forms the features again.
    assert sorted(launches(gradient, arrays, lengths, numbers)) == sorted(["lawcat_features"] * 2 + [OUT, *BACKWARD])


@pytest.mark.slow
def test_a_padded_layer_lowers_under_shard_map():
    """Batch and heads split over a mesh; lengths and documents with the batch."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    arrays, rows, heads, state = lawcat_arrays(4, 1000, 64), P("data", None, "model"), P("model"), P("data", "model")
    specs = dict.fromkeys(("q", "k", "v", "gate_logits"), rows) | dict.fromkeys(("conv_q", "conv_k", "phi"), heads)
    specs |= {"initial_state": (state, state), "conv_state": (rows, rows)}

    def gradient(arrays, lengths, numbers):
        out, pullback = jax.vjp(lambda x: by_kernel(x, lengths, numbers), arrays)
        return pullback(out)[0]

    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(specs, P("data"), P("data")), out_specs=specs)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(sharded).trace(arrays, jax.ShapeDtypeStruct((4,), jnp.int32), ids(4, 1000))
        assert "lawcat_features" in traced.lower(lowering_platforms=("cuda",)).as_text()


def lawcat_arrays(batch, length, d, kv_heads=8):
    def struct(*shape, dtype=BF16):
        return jax.ShapeDtypeStruct(shape, dtype)

    return {
        "q": struct(batch, length, 32, d),
        "k": struct(batch, length, kv_heads, d),
        "v": struct(batch, length, kv_heads, d),
        "gate_logits": struct(batch, length, kv_heads, d, dtype=F32),
        "conv_q": struct(32, 4, d, dtype=F32),
        "conv_k": struct(32, 4, d, dtype=F32),
        "phi": struct(32, d, d // 2, dtype=F32),
        "initial_state": (struct(batch, 32, d, d, dtype=F32), struct(batch, 32, d, dtype=F32)),
        "conv_state": (struct(batch, 3, 32, d), struct(batch, 3, kv_heads, d)),
    }


@pytest.mark.parametrize(("d", "kv_heads"), [(64, 8), (128, 32)])
def test_decode_writes_the_state_in_place(d, kv_heads):
    """S alone, input 9; the new tails come from the kernel, not from XLA."""
    text = cuda_module(by_kernel, lawcat_arrays(2, 1, d, kv_heads))
    assert re.findall(r"output_operand_alias<[^>]*operand_index = (\d+)", text) == ["9"]
    assert "stablehlo.concatenate" not in text

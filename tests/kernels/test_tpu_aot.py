"""TPU kernels compile ahead of time with libtpu on a CPU, for every chip: real Mosaic compilation, VMEM limits
included."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from kernels_pallas.benchmark import static_tpu

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")

# One process compiles all cases of a chip: starting libtpu costs more than a compilation, and it must not load in
# this process.
SCRIPT = """
import json, sys
from kernels_pallas.benchmark import static_tpu
chip, cases = json.loads(sys.argv[1])
for shape, mode, length, bound, dtype, *more in cases:
    options = {"batch": 1, "length": length, "bound": bound, "dtype": dtype} | (more[0] if more else {})
    compiled = static_tpu.compile_case(chip, static_tpu.Shape(*shape), mode, **options)
    text = compiled.as_text()
    kernels = static_tpu.KERNELS[mode]
    assert text.count('custom_call_target="tpu_custom_call"') == len(kernels), (shape, mode)
    assert all(kernel in text for kernel in kernels), (shape, mode)
    if mode == "decode":
        state = shape[0] * shape[2] * (shape[2] + 1) * 4 * options["batch"]
        assert compiled.memory_analysis().alias_size_in_bytes >= state
    print("compiled", flush=True)
"""
LLAMA, MISTRAL = (list(static_tpu.SHAPES[name]) for name in ("llama-3.2-1b", "mistral-7b"))
MODELS = [(shape, mode, 4096, -1.25, "bfloat16") for shape in (LLAMA, MISTRAL) for mode in static_tpu.MODES]
OTHERS = [
    ((32, 32, 64), "gradient", 1000, -1.25, "bfloat16"),
    ((32, 32, 128), "gradient", 1000, -1.25, "bfloat16"),
    ((8, 1, 128), "gradient", 1000, None, "bfloat16"),
    ((16, 1, 128), "gradient", 300, -1.25, "bfloat16"),
    ((8, 1, 64), "gradient", 300, -5.0, "float32"),
    ((4, 2, 32), "gradient", 17, -1.25, "float32"),
    ((4, 2, 256), "gradient", 300, -1.25, "bfloat16"),
    ((3, 3, 64), "gradient", 1, -1.25, "float32"),
    (LLAMA, "gradient", 4096, -1.25, "bfloat16", {"normalize": False}),
    (MISTRAL, "gradient", 4096, -5.0, "bfloat16", {"normalize": False}),
    # Packed heads whose scores are wider, or narrower, than the heads.
    (LLAMA, "gradient", 1000, -5.0, "bfloat16"),
    (LLAMA, "gradient", 1000, -1.25, "float32"),
    ((8, 2, 32), "gradient", 1000, -1.25, "bfloat16"),
    # Documents of packed rows.
    *((shape, "gradient", 4096, -1.25, "bfloat16", {"packed": True}) for shape in (LLAMA, MISTRAL)),
    ((8, 2, 64), "gradient", 1000, -1.25, "float32", {"packed": True, "batch": 3}),
]
CARRIED = {"carried": True}
PADDED = {"padded": True, "batch": 3}
LAWCAT = [
    *((shape, "prefill", 32768, -1.25, "bfloat16", options) for shape in (LLAMA, MISTRAL) for options in ({}, CARRIED)),
    *((shape, "decode", 1, -1.25, "bfloat16", {"batch": batch}) for shape in (LLAMA, MISTRAL) for batch in (11, 64)),
    *((shape, "prefill", 4096, -1.25, "bfloat16", PADDED | CARRIED) for shape in (LLAMA, MISTRAL)),
    ((32, 8, 64), "prefill", 1000, None, "bfloat16", PADDED),
    ((4, 2, 32), "prefill", 17, -1.25, "float32", PADDED),
    ((32, 32, 64), "prefill", 1000, -1.25, "bfloat16", CARRIED),
    ((32, 1, 128), "prefill", 300, -1.25, "bfloat16", CARRIED),
    ((32, 1, 64), "prefill", 300, -5.0, "bfloat16", {}),
    ((32, 8, 64), "prefill", 4096, None, "bfloat16", {}),
    ((6, 2, 64), "prefill", 300, -1.25, "bfloat16", CARRIED),
    ((8, 2, 128), "prefill", 300, None, "float32", CARRIED),
    ((4, 2, 32), "prefill", 17, -1.25, "float32", CARRIED),
    ((32, 8, 128), "decode", 1, -1.25, "float32", {"batch": 16}),
    ((6, 3, 48), "decode", 1, -1.25, "bfloat16", {"batch": 3}),
    ((4, 2, 16), "decode", 1, -1.25, "float32", {"batch": 2}),
    ((32, 8, 256), "decode", 1, -1.25, "bfloat16", {}),
]


def _compile(chip, cases):
    command = [sys.executable, "-c", SCRIPT, json.dumps([chip, cases])]
    done = subprocess.run(command, env=static_tpu.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == len(cases)


@pytest.mark.parametrize("chip", ["v5e"])
def test_models_compile(chip):
    _compile(chip, MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("chip", [name for name in static_tpu.CHIPS if name != "v5e"])
def test_models_compile_for_other_chips(chip):
    _compile(chip, MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("chip", static_tpu.CHIPS)
def test_other_shapes_compile(chip):
    _compile(chip, OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("chip", static_tpu.CHIPS)
def test_prefill_and_decode_compile(chip):
    _compile(chip, LAWCAT)


TRANSFORMS = """
import functools, sys
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import kernels_pallas as kp

devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)

def gradient(*arrays):
    run = lambda *x: kp.gated_linear_attention(*x, implementation="pallas_tpu")[0]
    o, pullback = jax.vjp(run, *arrays)
    return pullback(o)

def compiles(function, sharding, lead, kernels, key_heads=8):
    kinds = [(8, "bfloat16"), (key_heads, "bfloat16"), (4, "bfloat16"), (4, "float32")]
    arrays = [jax.ShapeDtypeStruct((*lead, 300, h, 64), kind, sharding=sharding) for h, kind in kinds]
    with kp.lowering_for("tpu"):
        text = jax.jit(function).lower(*arrays).compile().as_text()
    assert all(name in text for name in kernels)
    print("compiled", flush=True)

def layer(*arrays):
    shapes = [(4, 64), (4, 64), (64, 32)]
    heads = arrays[0].shape[2]
    parameters = [jax.numpy.ones((heads, *shape)) for shape in shapes]
    lengths = jax.numpy.full(arrays[0].shape[:1], 299)
    o, state, tails = kp.lawcat_attention(*arrays, *parameters, lengths=lengths, implementation="pallas_tpu")
    last = [x[:, -1:] for x in arrays]
    o2, state, tails = kp.lawcat_attention(
        *last, *parameters, initial_state=state, conv_state=tails, implementation="pallas_tpu"
    )
    return o, o2, *state

backward, layer_kernels = ("gla_states", "gla_backward"), ("lawcat_prefill", "lawcat_decode")
mesh = Mesh(devices.reshape(2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
rows = P("data", None, "model")
sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(rows,) * 4, out_specs=(rows,) * 4)
compiles(sharded, NamedSharding(mesh, rows), (2,), backward)
one = NamedSharding(Mesh(devices.flat[:1], ("x",)), P())
compiles(jax.vmap(gradient), one, (3, 2), backward)
out = (rows, rows, P("data", "model"), P("data", "model"))
sharded = jax.shard_map(layer, mesh=mesh, in_specs=(rows,) * 4, out_specs=out)
compiles(sharded, NamedSharding(mesh, rows), (2,), layer_kernels, 4)
compiles(jax.vmap(layer), one, (3, 2), layer_kernels, 4)
"""


@pytest.mark.slow
def test_shard_map_and_vmap_compile():
    command = [sys.executable, "-c", TRANSFORMS]
    done = subprocess.run(command, env=static_tpu.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 4


PACKED = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import kernels_pallas as kp
from kernels_pallas.benchmark import static_tpu

topology = static_tpu.CHIPS[sys.argv[1]].topology
devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
one = Mesh(devices.flat[:1], ("seq",))
all_chips = Mesh(devices.flatten(), ("seq",), axis_types=(AxisType.Auto,))

def outputs(layer, arrays, parameters, ids, lengths):
    o, state, rows = layer(*arrays, *parameters, segment_ids=ids, lengths=lengths, implementation=None)
    return o, *state, *rows

def gradient(layer, arrays, parameters, ids, lengths):
    out, pullback = jax.vjp(lambda *x: outputs(layer, *x, ids, lengths), arrays, parameters)
    return pullback(out)

rows = P(None, "seq")
sharded = jax.shard_map(
    functools.partial(outputs, functools.partial(kp.context_parallel.lawcat_attention, axis_name="seq")),
    mesh=all_chips, in_specs=(rows, P(), rows, P()), out_specs=(rows, *(P(),) * 4),
)

def sharded_gradient(arrays, parameters, ids, lengths):
    out, pullback = jax.vjp(lambda *x: sharded(*x, ids, lengths), arrays, parameters)
    return pullback(out)

layer = kp.lawcat_attention
for heads, kv_heads, size in static_tpu.SHAPES["llama-3.2-1b"], static_tpu.SHAPES["mistral-7b"]:
    for run, mesh, kernels in (
        (functools.partial(outputs, layer), one, ["gla_forward"]),
        (functools.partial(gradient, layer), one, ["gla_forward", "gla_states", "gla_backward"]),
        (sharded_gradient, all_chips, ["gla_forward", "gla_states", "gla_backward"]),
    ):
        def struct(*shape, kind="float32", spec=P()):
            return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))

        def tokens(heads, kind="bfloat16"):
            return struct(2, 4096, heads, size, kind=kind, spec=rows)

        arrays = [tokens(heads), tokens(kv_heads), tokens(kv_heads), tokens(kv_heads, "float32")]
        parameters = [struct(heads, 4, size), struct(heads, 4, size), struct(heads, size, size // 2)]
        ids, lengths = struct(2, 4096, kind="int32", spec=rows), struct(2, kind="int32")
        with kp.lowering_for("tpu"):
            text = jax.jit(run).lower(arrays, parameters, ids, lengths).compile().as_text()
        assert all(name in text for name in kernels) and "lawcat_prefill" not in text
        print("compiled", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("chip", static_tpu.CHIPS)
def test_packed_layers_compile(chip):
    """On one chip, and with tokens over a slice of four. The layer's own kernel takes no documents; those of the attention do."""
    command = [sys.executable, "-c", PACKED, chip]
    done = subprocess.run(command, env=static_tpu.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 6


@pytest.mark.slow
def test_static_report(tmp_path):
    options = [
        "--chips",
        "v5e",
        "--shapes",
        "llama-3.2-1b",
        "--length",
        "4096",
        "--json",
        str(tmp_path / "static.json"),
        "--modes",
        "forward,gradient,prefill,decode,front",
    ]
    command = [sys.executable, "-m", "kernels_pallas.benchmark.static_tpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads((tmp_path / "static.json").read_text())["records"]
    kernels = {"gla_forward", "gla_states", "gla_backward", "lawcat_prefill", "lawcat_decode"}
    assert {r["kernel"] for r in records} == kernels | {"xla_front"}
    for record in records:
        if record["kernel"] == "xla_front":
            assert record["core_ms"] > 0
            assert record["hbm_bytes"] > 0
            continue
        assert 10 < record["bundles_per_chunk_head"] < 2000
        assert 0 < record["vmem_bytes"] < 48 * 2**20
        assert f"| {record['bundles']} |" in done.stdout

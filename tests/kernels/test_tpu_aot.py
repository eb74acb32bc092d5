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
for shape, mode, length, bound, dtype in cases:
    static_tpu.compile_case(
        chip, static_tpu.Shape(*shape), mode, batch=1, length=length, bound=bound, dtype=dtype
    )
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

def compiles(function, sharding, lead):
    kinds = [(8, "bfloat16"), (8, "bfloat16"), (4, "bfloat16"), (4, "float32")]
    arrays = [jax.ShapeDtypeStruct((*lead, 300, h, 64), kind, sharding=sharding) for h, kind in kinds]
    with kp.lowering_for("tpu"):
        jax.jit(function).lower(*arrays).compile()
    print("compiled", flush=True)

mesh = Mesh(devices.reshape(2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
rows = P("data", None, "model")
sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(rows,) * 4, out_specs=(rows,) * 4)
compiles(sharded, NamedSharding(mesh, rows), (2,))
compiles(jax.vmap(gradient), NamedSharding(Mesh(devices.flat[:1], ("x",)), P()), (3, 2))
"""


@pytest.mark.slow
def test_shard_map_and_vmap_compile():
    command = [sys.executable, "-c", TRANSFORMS]
    done = subprocess.run(command, env=static_tpu.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 2


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
    ]
    command = [sys.executable, "-m", "kernels_pallas.benchmark.static_tpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads((tmp_path / "static.json").read_text())["records"]
    assert {r["kernel"] for r in records} == {"gla_forward", "gla_states", "gla_backward"}
    for record in records:
        assert 10 < record["bundles_per_chunk_head"] < 2000
        assert 0 < record["vmem_bytes"] < 48 * 2**20
        assert f"| {record['bundles']} |" in done.stdout

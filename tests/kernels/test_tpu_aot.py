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

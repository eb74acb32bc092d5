"""Peak memory of a conversion of the size of Llama-3.2-1B (2.5 GB of bfloat16)."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lawcat_jax.checkpoints.hf.config_map import model_config_to_hf
from lawcat_jax.checkpoints.hf.mapping import hf_slots
from lawcat_jax.checkpoints.hf.tensors import write_tensors
from lawcat_jax.config import ModelConfig, RopeScaling
from lawcat_jax.files import write_json

ROOT = Path(__file__).parents[2]
LLAMA_1B = ModelConfig(
    vocab_size=128256,
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_size=8192,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
    max_position_embeddings=131072,
    tie_embeddings=True,
    bos_token_id=128000,
    eos_token_ids=(128001,),
)
# VmHWM of the process at exit, not ru_maxrss: that one also counts the parent's pages before exec.
MEASURE = """
import sys
from pathlib import Path
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
start = status("VmRSS")
from lawcat_jax.checkpoints.conversion import convert
convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
print("PEAK", status("VmHWM") - start)
"""


def random_checkpoint(directory: Path, config: ModelConfig, shards: int = 3) -> int:
    """Write random bfloat16 weights file by file; returns their bytes."""
    rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
    names = list(hf_slots(config).items())
    size = -(-len(names) // shards)
    weight_map, total = {}, 0

    def draw(shape):  # random signs and mantissas around 2**-6, without a float64 intermediate
        words = rng.integers(0, 1 << 16, math.prod(shape), dtype=np.uint16) & np.uint16(0x80FF) | np.uint16(0x3C00)
        return words.view(dtype).reshape(shape)

    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * size : (number + 1) * size]
        write_tensors(directory / file, [(n, dtype, s.hf_shape, lambda s=s: draw(s.hf_shape)) for n, s in part])
        weight_map |= {name: file for name, _ in part}
        total += sum(math.prod(slot.hf_shape) for _, slot in part) * dtype.itemsize
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    write_json(directory / "config.json", model_config_to_hf(config, "bfloat16"))
    return total


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_conversion_of_a_1b_checkpoint_stays_under_one_and_a_half_times_its_bytes(tmp_path):
    source = tmp_path / "hf"
    source.mkdir()
    total = random_checkpoint(source, LLAMA_1B)
    assert total > 2.4e9
    report = {"bytes": total}
    for step, (here, there, to) in {
        "from_hf": (source, tmp_path / "model", "model"),
        "to_hf": (tmp_path / "model", tmp_path / "back", "hf"),
    }.items():
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(here), str(there), to],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.split("PEAK ")[1])
        report[step] = {"peak": peak, "ratio": round(peak / total, 3), "seconds": round(time.monotonic() - start, 1)}
    print(json.dumps(report))
    for step in ("from_hf", "to_hf"):
        assert report[step]["ratio"] < 1.5, report
    # 2.5 GB each: not left to pytest, which keeps the directories of the last three runs.
    for name in ("hf", "model", "back"):
        shutil.rmtree(tmp_path / name)

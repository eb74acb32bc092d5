"""Real compilation for TPU slices and GPUs on a CPU. Every case is a process of its own: libtpu must not load in this
one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lawcat_jax.analysis import packages

ROOT = Path(__file__).resolve().parents[2]

needs_cuda_plugin = pytest.mark.skipif(
    not packages.installed(packages.CUDA_PLUGINS), reason="needs the CUDA plugin of jax: pip install 'jax[cuda13]'"
)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


def aot(*arguments: str, timeout: int = 1500) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lawcat_jax.aot", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def report(*arguments: str) -> dict:
    """The report of a configuration that fits, by program."""
    done = aot("--json", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    values = json.loads(done.stdout)
    assert values["fits"]
    for program in values["programs"]:
        assert 0 < program["peak_bytes"] < values["chip"]["hbm_bytes"]
        assert program["argument_bytes"] + program["temp_bytes"] <= program["peak_bytes"]
        assert program["seconds"][0] > 0
        assert 0 < program["mfu"][0] < 1
        # Recomputation, and the halves of score blocks that causality masks, are traced but not needed.
        assert 0.5 < program["flops"] / program["model_flops"] < 3
    return {program["program"]: program for program in values["programs"]}


def error(*arguments: str) -> str:
    done = aot(*arguments)
    assert done.returncode == 2, (done.stdout, done.stderr)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology=v9:2x2",), "unknown chip 'v9'"),
        (("--stages=stage7",), "'stage7' is not one of this configuration's programs, stage1, stage2, prefill, decode"),
        (("--prefill_length=-1",), "--prefill_length=-1: must be at least 1"),
    ],
)
def test_mistakes(arguments, message):
    assert message in error("--config=configs/tiny.py", *arguments)


@needs_libtpu
def test_mistakes_that_libtpu_finds():
    wrong_mesh = "config.mesh: data=1, fsdp=3, tensor=1, sequence=1 does not fit 4 device(s)"
    assert wrong_mesh in error("--config=configs/tiny.py", "--topology=v5e:2x2", "--config.mesh.fsdp=3")


@pytest.mark.slow
@needs_libtpu
def test_a_small_model_on_four_chips():
    sizes = ["--config.mesh.tensor=2", "--config.stage1.seq_length=128"]
    programs = report("--config=configs/tiny.py", "--topology=v5e:2x2", "--stages=stage1,decode", *sizes)
    assert list(programs) == ["stage1", "decode"]
    assert {entry["kind"] for entry in programs["stage1"]["collectives"]} >= {"all-reduce"}


# name: configuration and slice of the models that must fit, and what runs on it
FITS = {
    "llama-3.2-1b v5e-8": ("llama1b", "v5e:2x4"),
    "llama-3.2-1b v5e-16": ("llama1b", "v5e:4x4"),
    "llama-3.1-8b v5e-64": ("llama8b", "v5e:8x8"),
    "llama-3.1-8b v6e-16": ("llama8b", "v6e:4x4"),
    "llama-3.1-8b v5p-16": ("llama8b", "v5p:2x2x2"),
    "qwen3-8b v5e-64": ("qwen3_8b", "v5e:8x8"),
    "mistral-7b v5e-64": ("mistral7b", "v5e:8x8"),
    "mistral-7b v6e-16": ("mistral7b", "v6e:4x4"),
    "mistral-7b v5p-16": ("mistral7b", "v5p:2x2x2"),
    "llama-3.1-70b v5p-512": ("llama70b", "v5p:4x8x8"),
}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_named_models_fit(name):
    config, topology = FITS[name]
    programs = report(f"--config=configs/{config}.py", f"--topology={topology}")
    assert list(programs) == ["stage1", "stage2", "prefill", "decode"]


@needs_libtpu
@pytest.mark.slow
def test_a_million_tokens_of_prefill():
    options = ["--prefill_length=1048576", "--prefill_batch=1", "--config.mesh.fsdp=1", "--config.mesh.sequence=-1"]
    programs = report("--config=configs/llama1b.py", "--topology=v5e:4x4", "--stages=prefill", *options)
    assert programs["prefill"]["tokens"] == 2**20


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_says_so():
    options = ["--stages=stage2", "--config.stage2.loss_chunk=0", "--config.stage2.batch_size=64"]
    done = aot("--config=configs/llama1b.py:paper", "--topology=v5e:2x2", "--config.stage2.seq_length=8192", *options)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "DOES NOT FIT" in done.stdout
    assert "stage2 does not fit" in done.stderr
    assert "loss_chunk=256" in done.stderr


@needs_cuda_plugin
@pytest.mark.slow
def test_llama_1b_for_a_gpu():
    programs = report("--config=configs/llama1b.py:paper", "--topology=h200:1", "--stages=stage1,stage2")
    assert list(programs) == ["stage1", "stage2"]
    for program in programs.values():
        assert program["collectives"] == []
        assert set(program["seconds_by"]) == {"compute", "hbm", "nvlink"}
    # The 1.24 billion weights in bfloat16, and the trained ones with Adam's moments in float32.
    assert 2.3 * 2**30 < programs["stage1"]["argument_bytes"] < 2.4 * 2**30
    assert 0.5 * 2**30 < programs["stage1"]["temp_bytes"] < programs["stage2"]["temp_bytes"] < 8 * 2**30


@needs_cuda_plugin
@pytest.mark.slow
def test_passing_states_costs_less_than_a_twentieth():
    """Of a step's memory, traffic and bounds of its time, at SmolLM2's shape."""
    rows = ("composed", "composed_shuffled")
    off, on = (
        report(f"--config=configs/study_smollm2.py:{row}_seed0", "--topology=h100:1", "--stages=stage2")["stage2"]
        for row in rows
    )
    assert off["peak_bytes"] < on["peak_bytes"] < 1.05 * off["peak_bytes"]
    assert on["hbm_traffic_bytes"] < 1.05 * off["hbm_traffic_bytes"]
    assert all(b < 1.05 * a for a, b in zip(off["seconds"], on["seconds"], strict=True))


@needs_cuda_plugin
@pytest.mark.slow
def test_qwen3_8b_for_eight_gpus():
    programs = report("--config=configs/qwen3_8b.py", "--topology=h100:8")
    assert list(programs) == ["stage1", "stage2", "prefill", "decode"]


@needs_cuda_plugin
@pytest.mark.slow
def test_llama_1b_on_two_machines():
    options = ["--topology=h100:2x8", "--stages=stage2", "--config.mesh.fsdp=16", "--config.mesh.tensor=1"]
    options += ["--config.stage1.batch_size=16", "--config.stage2.batch_size=16"]
    program = report("--config=configs/llama1b.py", *options)["stage2"]
    gathers = [entry for entry in program["collectives"] if entry["kind"] == "all-gather"]
    assert max(gathers, key=lambda entry: entry["bytes"])["group"] == 16
    assert {entry["local"] for entry in program["collectives"] if entry["group"] == 16} == {8}
    assert program["seconds_by"]["network"] > 0


@needs_cuda_plugin
@pytest.mark.slow
def test_what_does_not_fit_on_a_gpu_says_so():
    options = ["--stages=stage2", "--config.stage2.loss_chunk=0", "--config.stage2.batch_size=16"]
    done = aot("--config=configs/llama1b.py:paper", "--topology=a100:1", "--config.stage2.seq_length=4096", *options)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "DOES NOT FIT" in done.stdout
    assert "loss_chunk=256" in done.stderr

"""Errors, out-of-memory messages, operation counts, and the text of a report: nothing is compiled."""

from __future__ import annotations

import dataclasses
import json
import re
import types

import jax
import jax.numpy as jnp
import pytest

from lawcat_jax.analysis import compile_report, hlo, out_of_memory, topology
from lawcat_jax.analysis import compile_report_text as aot_text
from lawcat_jax.analysis.flops import traced_flops
from lawcat_jax.config import AttentionConfig, Config, MeshConfig, ModelConfig, StageConfig
from lawcat_jax.errors import UserError
from lawcat_jax.models import flops
from lawcat_jax.runtime import chips, sharding

MESSAGE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 23.11G of
15.75G hbm. Exceeded hbm capacity by 7.36G.

Total hbm usage >= 23.36G:
    reserved        258.00M

  Largest program allocations in hbm:

  1. Size: 7.83G
     Operator: op_name="jit(step)/jvp()/dot_general" source_file="llama.py"
     Shape: f32[16,1024,128256]{2,1,0:T(8,128)}
     Unpadded size: 7.83G
     XLA label: fusion.1
     Allocation type: HLO temp
     ==========================

  2. Size: 512.50M
     Shape: bf16[128256,2048]{1,0:T(8,128)(2,1)}
     Unpadded size: 501.00M
     Allocation type: HLO temp
     ==========================
"""


def test_memory_complaint():
    assert out_of_memory.needed_bytes(MESSAGE) == 23.11 * 2**30
    first, second = out_of_memory.largest_buffers(MESSAGE)
    assert first["shape"] == "f32[16,1024,128256]"
    assert first["operation"] == "jit(step)/jvp()/dot_general"
    assert (second["bytes"], second["kind"]) == (512.5 * 2**20, "HLO temp")


def test_memory_complaint_without_buffers():
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (72.80G) ..."
    assert out_of_memory.needed_bytes(message) == 72.8 * 2**30
    assert out_of_memory.largest_buffers(message) == []

    def outer(x):
        return jax.jit(lambda x: jnp.sum(x[:, None] * x[None, :]))(x)

    (first, *_) = out_of_memory.largest_arrays(jax.jit(outer).trace(jnp.zeros(64)).jaxpr, devices=2)
    assert (first["shape"], first["operation"], first["bytes"]) == ("float32[64, 64]", "mul", 64 * 64 * 4 / 2)


def test_advice_names_buffers_and_remedies():
    config = Config(stage2=StageConfig(batch_size=16, trainable=("^lora/",)))
    report = compile_report.Report("stage2", 1, False, 16 * 2**30, peak_bytes=int(23.11 * 2**30))
    report.largest = out_of_memory.largest_buffers(MESSAGE)
    line = compile_report.advice("stage2", report, config)
    assert "\n" not in line
    for word in ("23.11 GiB of 16 GiB", "f32[16,1024,128256]", "remat=layer", "loss_chunk=256", "config.mesh.fsdp"):
        assert word in line
    assert "--prefill_length" in compile_report.advice(
        "prefill", dataclasses.replace(report, program="prefill"), config
    )


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5f:2x2", "unknown chip 'v5f', known: v4, v5e"),
        ("v5e:2x2x2", "have 2 dimensions, as in v5e:2x2"),
        ("v5p:4x4", "have 3 dimensions, as in v5p:2x2x1"),
        ("v5e", "have 2 dimensions"),
        ("h200", "machines x GPUs of each, as in h200:8 or h200:2x8"),
        ("h200:2x2x2", "machines x GPUs of each"),
        ("h200:0", "machines x GPUs of each"),
        ("h100:32", "a machine has 8 GPUs at most; more are h100:4x8"),
    ],
)
def test_unknown_topologies(topology, message):
    with pytest.raises(UserError, match=message):
        chips.chip_of(topology)


def test_chips_that_show_two_devices():
    v4, v7 = chips.CHIPS["v4"], chips.CHIPS["tpu7x"]
    assert v4.as_devices(4, "v4:2x2x1") == v4
    assert v4.as_devices(8, "v4:2x2x1").hbm_bytes == v4.hbm_bytes / 2
    assert v7.as_devices(8, "tpu7x:2x2x1") == v7


def test_gpu_topologies():
    assert chips.gpu_shape("h200:1") == (1, 1)
    assert chips.gpu_shape("h100:8") == (1, 8)
    assert chips.gpu_shape("a100:2x4") == (2, 4)
    assert chips.chip_of("b200:2x8").as_devices(16, "b200:2x8") == chips.CHIPS["b200"]
    assert "450 GB/s sent over NVLink" in chips.chip_of("h200:8").assumptions()
    assert not chips.chip_of("v5e:2x2").is_gpu


@pytest.mark.parametrize("name", chips.GPUS)
def test_target_of_the_gpu_compiler(name):
    text = chips.gpu_target(name)
    assert text.count("{") == text.count("}") == 3
    fields = dict(re.findall(r"(\w+): ([\w.]+)", text))
    assert int(fields["core_count"]) == chips.GPUS[name].multiprocessors
    assert int(fields["device_memory_size"]) == round(chips.CHIPS[name].hbm_bytes)
    assert int(fields["shared_memory_per_block_optin"]) == int(fields["shared_memory_per_core"]) - 1024
    assert (fields["feature_extension"] == "NONE") == (name == "a100")
    assert f'device_description_str: "{chips.GPUS[name].kind}"' in text


def test_facts_of_the_h200():
    text = chips.gpu_target("h200")
    for line in ("core_count: 132", "memory_bandwidth: 4800000000000", "{ major: 9 minor: 0 feature_extension: ACC"):
        assert line in text


def test_memory_that_jax_may_allocate(monkeypatch):
    gpu, tpu = chips.CHIPS["h200"], chips.CHIPS["v5e"]
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert topology.memory_limit(gpu) == 0.75 * gpu.hbm_bytes
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert topology.memory_limit(gpu) == 0.9 * gpu.hbm_bytes
    assert topology.memory_limit(tpu) == tpu.hbm_bytes
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(UserError, match="XLA_CLIENT_MEM_FRACTION=most: must be a number above 0"):
        topology.memory_limit(gpu)


def test_links_of_gpus():
    chip = chips.CHIPS["h100"]
    inside, outside = hlo.Collective("all-gather", 8, 8, 1, 450e9), hlo.Collective("all-gather", 16, 8, 1, 400e9)
    assert compile_report._link_seconds([inside], chip) == {"nvlink": 1.0}
    assert compile_report._link_seconds([inside, outside], chip) == {"nvlink": 1.0, "network": 1.0}
    assert compile_report._link_seconds([inside], chips.CHIPS["v5e"]) == {"ici": 5.0}


def test_without_the_cuda_plugin(monkeypatch):
    monkeypatch.setattr("lawcat_jax.analysis.packages.installed", lambda names: {})
    with pytest.raises(UserError, match=rf"pip install 'jax\[cuda13\]=={re.escape(jax.__version__)}'"):
        topology.topology_devices("h200:8")


def test_without_cudnn(monkeypatch):
    def trace(*arguments):
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(compile_report, "_trace", trace)
    monkeypatch.setattr("lawcat_jax.analysis.packages.installed", lambda names: {"jax-cuda12-plugin": "0.10.2"})
    with pytest.raises(UserError, match=r"stage1: cuDNN not found\. pip install 'jax\[cuda12\]"):
        compile_report.compile_program("stage1", None, None, None, chips.CHIPS["h200"], compile_report.Options())


def test_a_compiler_whose_programs_jaxlib_cannot_read(monkeypatch):
    def as_text():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure async-update")

    compiled = types.SimpleNamespace(as_text=as_text)
    lowered = types.SimpleNamespace(compile=lambda compiler_options: compiled)
    traced = types.SimpleNamespace(lower=lambda: lowered, jaxpr=jax.make_jaxpr(jnp.sin)(1.0).jaxpr)
    monkeypatch.setattr(compile_report, "_trace", lambda *arguments: (traced, 8, 4))
    model = ModelConfig(
        hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=16, vocab_size=32
    )
    mesh = types.SimpleNamespace(size=1)
    with pytest.raises(UserError, match=r"decode: jaxlib cannot read .* pip install 'jax\[tpu\]==.*async-update"):
        compile_report.compile_program("decode", Config(), model, mesh, chips.CHIPS["v5e"], compile_report.Options())


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]=="):
        topology.topology_devices("v5e:2x2")


def test_traced_flops():
    def loop(x, w):
        return jax.lax.scan(lambda c, w: (jax.checkpoint(jnp.tanh)(c @ w), None), x, w)[0].sum()

    x, w = jnp.zeros((4, 8)), jnp.zeros((3, 8, 8))
    product = 2 * 4 * 8 * 8
    assert traced_flops(jax.jit(loop).trace(x, w).jaxpr) == 3 * product
    assert traced_flops(jax.jit(jax.grad(loop, argnums=(0, 1))).trace(x, w).jaxpr) == 9 * product


def test_model_flops_of_a_softmax_model():
    model = ModelConfig(
        hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=16, vocab_size=32
    )
    weights = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16) + 8 * 32
    attention = 2 * 4 * 8 * (10 + 1) / 2  # positions see 1 to 10 keys
    assert flops.model_flops("pretrain", Config(), model, 10) == 3 * (2 * weights + attention)
    windowed = dataclasses.replace(model, sliding_window=1)
    assert flops.softmax_attention(windowed, 10) == 4 * 8


def test_rest_of_the_mesh_goes_to_tensor():
    config = Config(stage1=StageConfig(batch_size=8), stage2=StageConfig(batch_size=8, grad_accum=2))
    assert sharding.common_rows(config) == 4
    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("needs 8 (simulated) devices")
    for mesh, expected in (
        (MeshConfig(), (1, 4, 2, 1)),
        (MeshConfig(data=2), (2, 2, 2, 1)),
        (MeshConfig(fsdp=1, data=-1), (4, 1, 2, 1)),
        (MeshConfig(fsdp=1, sequence=-1), (1, 1, 1, 8)),
        (MeshConfig(fsdp=8), (1, 8, 1, 1)),
    ):
        assert tuple(sharding.make_mesh(mesh, devices[:8], rows=4).shape.values()) == expected


def test_report_as_text_and_json():
    chip = chips.CHIPS["v5e"]
    report = compile_report.Report("stage1", 4096, True, chip.hbm_bytes, peak_bytes=2**30, argument_bytes=2**29)
    report.collectives = [{"kind": "all-gather", "group": 8, "local": 8, "count": 3, "bytes": 2.0**20}]
    report.seconds_by, report.seconds, report.mfu = {"compute": 0.5}, (0.5, 0.75), (0.4, 0.3)
    text = aot_text.text(report)
    assert "peak 1.00 GiB of 16.00 GiB (6%)" in text
    assert "3 x all-gather in groups of 8: 1.0 MiB" in text
    assert "MFU 30% to 40%" in text
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    values = json.loads(json.dumps(aot_text.as_json("v5e:2x2", chip, mesh, [report])))
    assert values["fits"] is True
    assert values["programs"][0]["peak_bytes"] == 2**30
    assert "16 GiB of HBM" in aot_text.heading("v5e:2x2", chip, mesh, Config(attention=AttentionConfig()))


def test_report_of_gpus(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    chip = chips.CHIPS["h200"]
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    assert "jax may allocate 90% of it" in aot_text.heading("h200:2x8", chip, mesh, Config())
    report = compile_report.Report("stage1", 4096, True, chip.hbm_bytes)
    report.collectives = [{"kind": "all-gather", "group": 16, "local": 8, "count": 3, "bytes": 2.0**20}]
    assert "3 x all-gather in groups of 16 (8 a machine): 1.0 MiB" in aot_text.text(report)
    assert "libtpu" not in aot_text.as_json("h200:2x8", chip, mesh, [report])["versions"]

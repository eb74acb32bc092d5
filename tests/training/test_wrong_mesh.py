"""A mesh that does not fit the machine or the model is one line from every command, before anything is compiled."""

from __future__ import annotations

import re

import jax
import pytest

from lawcat_jax.analysis import compile_report, fit
from lawcat_jax.config import AttentionConfig, Config, EvalConfig, MeshConfig, StageConfig, TeacherConfig
from lawcat_jax.errors import UserError
from lawcat_jax.training import run, stages

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (simulated) devices")

CASES = [
    ({"data": 16, "fsdp": 1}, "config.mesh: data=16, fsdp=1, tensor=1, sequence=1 does not fit 8 device(s)"),
    ({"tensor": 8, "fsdp": 1}, "config.mesh.tensor: 8 does not divide the 2 key-value heads of the model"),
    ({"data": 2, "fsdp": 4}, "config.stage1.batch_size: 4 in 1 micro-batch(es) does not split over data x fsdp = 8"),
    ({"sequence": 8, "fsdp": 1}, "config.stage1.seq_length: config.mesh.sequence=8 does not divide 100"),
]


def config(**mesh: int) -> Config:
    stage = {"batch_size": 4, "seq_length": 100, "steps": 1}
    return Config(
        teacher=TeacherConfig(source="asset:tiny_llama"),
        attention=AttentionConfig(gate_rank=4),
        stage1=StageConfig(trainable=("^mixers/",), **stage),
        stage2=StageConfig(trainable=("^lora/",), **stage),
        mesh=MeshConfig(distributed="off", **mesh),
        eval=EvalConfig(enabled=False),
    )


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    def too_far(*arguments, **options):
        pytest.fail("a step was built")

    monkeypatch.setattr(stages, "build", too_far)
    monkeypatch.setattr(compile_report, "compile_program", too_far)


@pytest.mark.parametrize(("mesh", "message"), CASES)
@pytest.mark.parametrize("dry", [False, True], ids=["train", "dry run"])
def test_train(mesh, message, dry, tmp_path):
    wrong = config(**mesh)
    wrong.workdir, wrong.dry_run = str(tmp_path / "run"), dry
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        run.run(wrong)
    assert "\n" not in str(caught.value)


PREFILL = ({"sequence": 8, "fsdp": 1}, "--prefill_length=100: config.mesh.sequence=8 does not divide it")


@pytest.mark.parametrize(
    ("mesh", "message", "program"), [*((*case, "stage1") for case in CASES), (*PREFILL, "prefill")]
)
def test_aot(mesh, message, program, monkeypatch):
    monkeypatch.setattr(fit.topologies, "prepare_environment", lambda: None)
    monkeypatch.setattr(fit.topologies, "topology_devices", lambda topology: jax.devices()[:8])
    sizes = {"prefill_length": 0, "prefill_batch": 0, "decode_batch": 0}
    with pytest.raises(UserError, match=re.escape(message)):
        fit.print_fit(config(**mesh), topology="h200:8", programs=[program], sizes=sizes, as_json=True)

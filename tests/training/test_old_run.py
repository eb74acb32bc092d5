"""A run that an earlier version (commit e4c2335) began, stopped by a signal in stage 2, goes on with this one as it would have
with that: ``tests/golden/run_of_2026-11-25.tar.gz`` holds it, its teacher, and the same run without the signal.

On the processor that computed the archive all bits are equal. Others add in another order, so the last bits may differ here; that
a run resumes bit for bit on one machine is tested in ``test_run_e2e.py``.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lawcat_jax.checkpoints import model_dir
from lawcat_jax.checkpoints.hf.mapping import flatten
from lawcat_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    StageConfig,
    TeacherConfig,
)
from lawcat_jax.runtime import sharding
from lawcat_jax.training import run

ARCHIVE = Path(__file__).parents[1] / "golden" / "run_of_2026-11-25.tar.gz"


def config() -> Config:
    """As that version was given it; evaluation may differ when a run is resumed."""
    data = DataConfig(passkey_words=0, min_length_fraction=0.8, num_samples=64, validation_samples=6)
    stage = {"steps": 4, "batch_size": 4, "grad_accum": 2, "seq_length": 128, "learning_rate": 1e-2, "eval_every": 2}
    return Config(
        workdir="interrupted",
        teacher=TeacherConfig(source="teacher"),
        attention=AttentionConfig(gate_rank=2),
        lora=LoraConfig(rank=2, dropout=0.1),
        stage1=StageConfig(trainable=("^mixers/",), data=data, **stage),
        stage2=StageConfig(trainable=("^lora/", "^mixers/"), data=data, **stage),
        checkpoint=CheckpointConfig(every_steps=1, keep=2),
        log=LogConfig(every_steps=1, tensorboard=False, progress="lines"),
        eval=EvalConfig(enabled=False),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(target, filter="data")
    return target


def arrays(student: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten(model_dir.load_model(student, dtype="keep").params)}


def losses(metrics: Path) -> list[dict]:
    names = ("step", "loss", "grad_norm", "validation/loss")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [{name: row[name] for name in names if name in row} for row in rows]
    return [row for row in rows if len(row) > 1]


@pytest.mark.slow
def test_it_goes_on_with_the_same_numbers(folder, monkeypatch):
    make, one = sharding.make_mesh, MeshConfig(data=1, fsdp=1)
    monkeypatch.setattr(sharding, "make_mesh", lambda *_, **__: make(one, sharding.jax.devices()[:1]))
    monkeypatch.chdir(folder)
    assert run.run(config()) == 0
    straight, resumed = (arrays(folder / name / "student") for name in ("straight", "interrupted"))
    assert straight.keys() == resumed.keys()
    assert len(straight) == 25
    for path, array in straight.items():
        np.testing.assert_allclose(resumed[path], array, rtol=1e-5, atol=1e-7, err_msg=path)
    ours, theirs = (losses(folder / name / "metrics.jsonl") for name in ("interrupted", "straight"))
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)

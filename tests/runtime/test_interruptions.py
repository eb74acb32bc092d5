"""However a run is cut into pieces, it ends where the straight run ends."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from doubles import ROOT, STEPS, Run

from lawcat_jax.config import Config, MeshConfig
from lawcat_jax.runtime import sharding
from lawcat_jax.training import loop, run


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("straight")).go()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_sigterm_at_random_steps(straight, tmp_path, seed):
    """Real signals, each during a step drawn at random; every piece saves what it has."""
    random = np.random.default_rng(seed)
    done = 0
    while done < STEPS:
        moment = int(random.integers(done + 1, STEPS + 3))
        piece = Run(tmp_path, every_steps=int(random.integers(1, 6)))
        inner = piece.stage.train_step

        def step(state, batch, piece=piece, inner=inner, moment=moment):
            if piece.batches.index == moment:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(state, batch)

        piece.stage.train_step = step
        with piece.stop:
            if moment > STEPS:
                assert_same(piece.go(), straight)
                return
            with pytest.raises(loop.InterruptedRunError, match=f"step {moment}"):
                piece.go()
        done = moment
    assert_same(Run(tmp_path).go(), straight)


_SAVES_EVERY_STEP = """
import sys
sys.path[:0] = {paths!r}
from doubles import Run
from pathlib import Path
run = Run(Path({workdir!r}), every_steps=1, keep=2)
run.go()
"""


def finished(checkpoints: Path) -> set[int]:
    """Steps of committed checkpoints."""
    if not checkpoints.exists():
        return set()
    return {int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", range(3))
def test_kills_in_mid_save_lose_no_finished_step(straight, tmp_path, seed):
    """kill -9 a random moment after a save has begun, again and again until a process gets through."""
    random = np.random.default_rng(seed)
    code = _SAVES_EVERY_STEP.format(paths=[str(ROOT), str(Path(__file__).parent)], workdir=str(tmp_path))
    checkpoints = tmp_path / "checkpoints" / "stage1"
    kills = 0
    while kills < 4:
        newest = max(finished(checkpoints), default=0)
        child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        while child.poll() is None and (not finished(checkpoints) or max(finished(checkpoints)) <= newest):
            time.sleep(0.0005)
        time.sleep(float(random.uniform(0, 0.05)))
        child.kill()
        if child.wait(timeout=60) == 0:
            break
        kills += 1
        assert max(finished(checkpoints)) > newest
    assert kills
    assert_same(Run(tmp_path, every_steps=1).go(), straight)


MESHES = {
    "eight": (8, MeshConfig()),
    "four": (4, MeshConfig(fsdp=2, tensor=2)),
    "eight again": (8, MeshConfig(data=2, fsdp=2, sequence=2)),
}


def numbers(workdir: Path) -> dict[tuple[str, int], dict]:
    found: dict[tuple[str, int], dict] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        found.setdefault((values["stage"], values["step"]), {}).update(values)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_resumed_on_other_devices_and_meshes(tmp_path, monkeypatch):
    """8 -> 4 -> 8 devices, three mesh shapes, both stages: the same batches, losses within 1e-5."""
    where = {"stage": ""}
    inner = loop.Loop.run

    def named(self, stop):
        where["stage"] = self._stage.name
        return inner(self, stop)

    monkeypatch.setattr(loop.Loop, "run", named)

    def go(workdir: Path, which: str, until: tuple[str, int] | None) -> int:
        count, mesh = MESHES[which]
        config: Config = tiny.get_config()
        config.workdir, config.mesh, config.log.progress = str(workdir), mesh, "off"
        config.stage1.learning_rate = config.stage2.learning_rate = 1e-3
        with monkeypatch.context() as patch:
            devices = functools.partial(sharding.make_mesh, devices=jax.devices()[:count])
            patch.setattr(sharding, "make_mesh", devices)
            if until is not None:
                patch.setattr(loop.StopSignal, "requested", lambda self, step: (where["stage"], step) == until)
            return run.run(config)

    assert go(tmp_path / "straight", "eight", None) == 0
    for which, until in [("eight", ("stage1", 1)), ("four", ("stage1", 3)), ("eight again", ("stage2", 1))]:
        assert go(tmp_path / "pieces", which, until) == loop.EXIT_INTERRUPTED
    assert go(tmp_path / "pieces", "four", ("stage2", 3)) == loop.EXIT_INTERRUPTED
    assert go(tmp_path / "pieces", "eight", None) == 0
    expected, found = numbers(tmp_path / "straight"), numbers(tmp_path / "pieces")
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        for name in values.keys() & {"loss", "validation/loss"}:
            np.testing.assert_allclose(found[key][name], values[name], rtol=1e-5, err_msg=f"{key} {name}")
        assert found[key].get("weight") == values.get("weight")  # tokens in the loss: the same batch

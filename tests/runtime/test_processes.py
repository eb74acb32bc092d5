"""Several processes through ``jax.distributed``: training, files, signals, and that no process outlives another."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from processes import TRAIN, Processes

BOUND = 60.0  # seconds in which the others end, documented in lawcat_jax.runtime.distributed
PEER = str(Path(__file__).with_name("peer.py"))
STEPS = 10


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_process_ends_the_other(tmp_path, victim):
    with Processes(tmp_path, [[PEER], [PEER]]) as both:
        both.until(lambda: all("ready" in both.output(index) for index in range(2)), 60)
        both.kill(victim)
        started = time.monotonic()
        statuses = both.wait(BOUND)
        assert time.monotonic() - started < BOUND
        assert statuses[victim] == -signal.SIGKILL
        assert statuses[1 - victim] != 0


@pytest.mark.parametrize(("how", "status"), [pytest.param("fails", 1, marks=pytest.mark.slow), ("user-error", 2)])
def test_failing_process_ends_the_other(tmp_path, how, status):
    """Process 0, where the coordinator lives, is slower to leave; the other one is tested with training below."""
    with Processes(tmp_path, [[PEER, how], [PEER]]) as both:
        statuses = both.wait(BOUND)
        assert statuses[0] == status, both.report("status")
        assert statuses[1] != 0, both.report("status")
        assert "this process f" in both.output(0)


def train(folder: Path, workdir: Path, *options: str, count: int = 2, devices: int = 4) -> Processes:
    steps = [f"--config.{stage}.steps={STEPS}" for stage in ("stage1", "stage2")]
    command = [*TRAIN, f"--workdir={workdir}", *steps, *options]
    return Processes(folder, [command] * count, devices=devices)


def numbers(workdir: Path) -> dict[tuple[str, int], dict]:
    """Losses and norms by stage and step."""
    found: dict[tuple[str, int], dict] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        kept = {name: value for name, value in values.items() if name.endswith("loss") or name == "grad_norm"}
        found.setdefault((values["stage"], values["step"]), {}).update(kept)
    return found


def reached(workdir: Path, stage: str, step: int) -> bool:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return False
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return any(line["stage"] == stage and line["step"] >= step and "loss" in line for line in lines)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Both stages by two processes of four devices each."""
    workdir = tmp_path_factory.mktemp("straight")
    with train(workdir / "logs", workdir / "run") as both:
        assert both.wait(280) == [0, 0], both.report("straight")
        assert "finished:" in both.output(0)
        for text in ("finished:", "stage1", "loading"):  # lines come from process 0
            assert text not in both.output(1)
    return workdir / "run"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_both_stages(straight):
    manifest = json.loads((straight / "manifest.json").read_text())
    assert (manifest["process_count"], manifest["device_count"], manifest["status"]) == (2, 8, "finished")
    found = numbers(straight)
    assert {stage for stage, _ in found} == {"stage1", "stage2"}
    assert len([1 for values in found.values() if "loss" in values]) == 2 * STEPS
    assert (straight / "student" / "model.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_process_gives_the_same(straight, tmp_path):
    with train(tmp_path / "logs", tmp_path / "run", count=1, devices=8) as one:
        assert one.wait(280) == [0], one.report("one")
    expected, found = numbers(straight), numbers(tmp_path / "run")
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        for name, value in values.items():
            np.testing.assert_allclose(found[key][name], value, rtol=1e-5, err_msg=f"{key} {name}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_signals_and_kills(straight, tmp_path):
    """SIGTERM to one process, kill -9 of each: all end in time, and the run that goes on is the straight one."""
    workdir = tmp_path / "run"
    with train(tmp_path / "0", workdir) as both:
        both.until(lambda: reached(workdir, "stage1", 4))
        both.kill(1, signal.SIGTERM)
        assert both.wait(BOUND) == [75, 75], both.report("SIGTERM")
    for turn, (victim, stage, step) in enumerate([(0, "stage1", 8), (1, "stage2", 4)], start=1):
        with train(tmp_path / str(turn), workdir) as both:
            both.until(lambda stage=stage, step=step: reached(workdir, stage, step))
            both.kill(victim)
            started = time.monotonic()
            statuses = both.wait(BOUND)
            assert time.monotonic() - started < BOUND
            assert statuses[victim] == -signal.SIGKILL
            assert statuses[1 - victim] not in (0, 75), both.report("kill")
    with train(tmp_path / "last", workdir) as both:
        assert both.wait(280) == [0, 0], both.report("resumed")
        assert "resumed at step" in both.output(0)
    assert numbers(workdir) == numbers(straight)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_half_the_processes_go_on(straight, tmp_path):
    """Four processes of one device each are killed in stage 2; two go on with the same batches, as their losses tell."""
    workdir = tmp_path / "run"
    with train(tmp_path / "four", workdir, count=4, devices=1) as four:
        four.until(lambda: reached(workdir, "stage2", 4), 400)
        for index in range(4):
            four.kill(index)
        assert four.wait(BOUND) == [-signal.SIGKILL] * 4
    assert json.loads((workdir / "manifest.json").read_text())["process_count"] == 4
    before = numbers(workdir)
    with train(tmp_path / "two", workdir, count=2, devices=1) as two:
        assert two.wait(280) == [0, 0], two.report("two")
        assert re.search(r"stage2: resumed at step [2-9] of", two.output(0)), two.report("two")
    assert json.loads((workdir / "manifest.json").read_text())["process_count"] == 2
    expected, found = numbers(straight), numbers(workdir)
    assert found.keys() == expected.keys()
    assert before.keys() < found.keys()  # both sides of the kill are compared
    losses = sorted(values["loss"] for values in expected.values() if "loss" in values)
    assert min(np.diff(losses)) > 3e-5 * max(losses)  # a batch out of turn would show
    for key, values in expected.items():
        for name, value in values.items():
            np.testing.assert_allclose(found[key][name], value, rtol=1e-5, err_msg=f"{key} {name}")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mistake_that_one_process_finds(tmp_path):
    """A folder that only process 0 needs cannot be made; the other does not wait for it."""
    (tmp_path / "file").write_text("")
    with train(tmp_path / "logs", tmp_path / "run", f"--config.checkpoint.directory={tmp_path}/file/x") as both:
        statuses = both.wait(120)
        assert statuses[0] == 2, both.report("status")
        assert 0 not in statuses

"""The loop over doubles: resume, damage, signals, non-finite steps, best parameters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from training_doubles import STEPS, Run

from lawcat_jax.config import StageConfig
from lawcat_jax.errors import UserError
from lawcat_jax.training import checkpoint
from lawcat_jax.training.loop import InterruptedRunError, TrainingError


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> list[tuple]:
    """Every number that must not depend on interruptions: losses, rates, norms, validation."""
    speed = {"tokens_per_second", "first_step_seconds"}
    return [
        tuple(sorted((k, v) for k, v in line.items() if k not in {"time", *speed}))
        for line in lines(workdir)
        if not speed & {*line} or "loss" in line
    ]


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    return Run(workdir).go(), losses(workdir), workdir


def test_straight_run_logs_every_step(straight):
    _, numbers, _ = straight
    steps = [dict(line)["step"] for line in numbers if "loss" in dict(line)]
    assert steps == list(range(1, STEPS + 1))
    assert any("validation/loss" in dict(line) for line in numbers)


@pytest.mark.parametrize("moments", [(1,), (4, 5, 6), (11, 12)])
def test_interrupted_and_resumed_is_bit_identical(straight, tmp_path, moments):
    for moment in moments:
        with pytest.raises(InterruptedRunError, match=f"step {moment}"):
            Run(tmp_path, stop_after=moment).go()
    assert_same(Run(tmp_path).go(), straight[0])
    assert losses(tmp_path) == straight[1]


def test_finished_stage_returns_at_once(straight, tmp_path):
    shutil.copytree(straight[2], tmp_path, dirs_exist_ok=True)
    run = Run(tmp_path)
    assert_same(run.go(), straight[0])
    assert run.batches.index == 0
    assert losses(tmp_path) == straight[1]


def test_sigterm_finishes_the_step_and_saves(straight, tmp_path):
    run = Run(tmp_path)
    inner = run.stage.train_step

    def step(state, batch):
        if run.batches.index == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(state, batch)

    run.stage.train_step = step
    before = signal.getsignal(signal.SIGTERM)
    with run.stop, pytest.raises(InterruptedRunError):
        run.go()
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same(Run(tmp_path).go(), straight[0])
    assert losses(tmp_path) == straight[1]


def damage(step: Path, how: str) -> None:
    # Every data file: which of them the arrays are read from depends on how Orbax' writers were scheduled.
    data = [file for file in step.rglob("d/*") if file.is_file() and file.stat().st_size]
    if how == "truncated":
        for file in data:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "flipped":
        for file in data:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(bytes(content))
    elif how == "missing_file":
        for file in data:
            file.unlink()
    elif how == "meta":
        (step / "meta" / "metadata").write_text("{")
    elif how == "edited_meta":
        values = json.loads((step / "meta" / "metadata").read_text())
        assert "iterator" in values, list(values)
        values["iterator"] = json.loads(json.dumps(values["iterator"]).replace("8", "7"))
        (step / "meta" / "metadata").write_text(json.dumps(values))
    elif how == "missing_item":
        shutil.rmtree(step / "state")


def test_checkpoints_without_a_digest_of_their_metadata_load(straight, tmp_path, capsys):
    """As earlier versions wrote them."""
    run = Run(tmp_path, stop_after=8)
    with pytest.raises(InterruptedRunError):
        run.go()
    file = run.directory / "8" / "meta" / "metadata"
    values = json.loads(file.read_text())
    del values["digest"]
    values["format"] = 1
    file.write_text(json.dumps(values))
    assert_same(Run(tmp_path).go(), straight[0])
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("sound", [True, False])
def test_checkpoints_with_sums_of_bits_load(straight, tmp_path, monkeypatch, capsys, sound):
    """As earlier versions wrote them; what they do not describe is refused as ever."""
    describe = checkpoint._describe

    def sums(tree, kind="hash"):
        found = describe(tree, "sum")
        if not sound:
            next(iter(found.values()))["sum"] ^= 1
        return found

    with monkeypatch.context() as earlier:
        earlier.setattr(checkpoint, "_describe", sums)
        with pytest.raises(InterruptedRunError):
            Run(tmp_path, stop_after=4).go()
    if sound:
        assert_same(Run(tmp_path).go(), straight[0])
        assert "damaged" not in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="have changed since they were saved"):
            Run(tmp_path).go()


def test_exchanged_rows_are_another_tree():
    rows = np.arange(24, dtype=np.float32).reshape(4, 6)
    one, other = ({"layers": jax.numpy.asarray(array)} for array in (rows, rows[[1, 0, 2, 3]]))
    assert checkpoint.tree_digest(one) != checkpoint.tree_digest(other)
    assert checkpoint.tree_digest(one, "sum") == checkpoint.tree_digest(other, "sum")  # as earlier versions had it
    assert checkpoint.tree_digest(one) == checkpoint.tree_digest(checkpoint.copy(one))
    assert checkpoint.tree_digest({}) != checkpoint.tree_digest(one)


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing_file", "meta", "edited_meta", "missing_item"])
def test_damaged_newest_checkpoint_falls_back(straight, tmp_path, how, capsys):
    with pytest.raises(InterruptedRunError):
        Run(tmp_path, stop_after=8).go()
    run = Run(tmp_path)
    assert sorted(p.name for p in run.directory.iterdir()) == ["5", "8"]
    damage(run.directory / "8", how)
    assert_same(run.go(), straight[0])
    assert losses(tmp_path) == straight[1]
    assert (run.directory / "8.damaged").exists()
    assert "damaged" in capsys.readouterr().out


def test_no_silent_fresh_start(tmp_path):
    with pytest.raises(InterruptedRunError):
        Run(tmp_path, stop_after=8).go()
    run = Run(tmp_path)
    for step in ("5", "8"):
        damage(run.directory / step, "truncated")
    with pytest.raises(UserError, match=r"none of the checkpoints \[8, 5\] loads"):
        run.go()
    assert sorted(p.name for p in run.directory.iterdir()) == ["5", "8"]  # nothing was touched


def test_other_shape_is_refused(tmp_path):
    with pytest.raises(InterruptedRunError):
        Run(tmp_path, stop_after=8).go()
    with pytest.raises(UserError, match="none of the checkpoints"):
        Run(tmp_path, config=StageConfig(trainable=("conv_q",))).go()


def test_bad_steps_are_skipped_and_counted(tmp_path):
    run = Run(tmp_path, poison=(2, 5, 6), max_bad_steps=3)
    result = run.go()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    counts = [line["bad_total"] for line in lines(tmp_path) if "bad_total" in line]
    assert counts == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3]
    assert int(run.loop._state.opt_state[0].count) == STEPS - 3


def test_too_many_bad_steps_stop_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"3 bad steps in a row, the last at step 9 .*not finite"):
        Run(tmp_path, poison=(6, 7, 8, 9), max_bad_steps=3).go()
    assert [line["loss"] for line in lines(tmp_path) if line.get("bad_in_row")] == ["nan"] * 3


def test_best_parameters_are_restored(tmp_path):
    config = StageConfig(trainable=("^mixers/",), eval_every=4)
    best = Run(tmp_path / "best", config=config, steps=STEPS, losses=[3.0, 1.0, 2.0])
    result = best.go()
    with pytest.raises(InterruptedRunError):
        Run(tmp_path / "cut", config=config, losses=[3.0, 1.0], stop_after=8, every_steps=0).go()
    resumed = Run(tmp_path / "cut", config=config, losses=[2.0])
    assert_same(resumed.go(), result)
    last = jax.device_get(best.loop._state.params)
    assert np.abs(last["mixers"]["conv_q"] - result["mixers"]["conv_q"]).max() > 0
    at_8 = Run(tmp_path / "cut8", config=config, losses=[3.0, 1.0], stop_after=8)
    with pytest.raises(InterruptedRunError):
        at_8.go()
    assert_same(jax.device_get(at_8.loop._state.params), result)


def test_plateau_lowers_the_rate(tmp_path):
    config = StageConfig(
        trainable=("^mixers/",), eval_every=2, schedule="plateau", plateau_patience=1, warmup_fraction=0
    )
    Run(tmp_path, config=config, losses=[1.0, 2.0, 2.0, 0.5, 3.0, 3.0]).go()
    rates = [line["learning_rate"] for line in lines(tmp_path) if "learning_rate" in line]
    np.testing.assert_allclose(rates, [1e-3] * 6 + [1e-4] * 6, rtol=1e-6)


def test_data_that_ends_early_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="data ended at step 7"):
        Run(tmp_path, limit=7).go()


def test_step_compiles_once_and_frozen_stays(tmp_path):
    config = StageConfig(learning_rate=0.01, trainable=("^mixers/",), schedule="plateau", eval_every=2)
    run = Run(tmp_path, config=config, losses=[float(9 - i) for i in range(6)])
    frozen = jax.device_get(run.frozen)
    with pytest.raises(InterruptedRunError):
        Run(tmp_path, config=config, losses=[9.0, 8.0], stop_after=5).go()
    run.go()
    assert run.train_step._cache_size() == 1
    assert_same(jax.device_get(run.frozen), frozen)


_KILLED = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import training_doubles as doubles
run = doubles.Run(Path({workdir!r}), every_steps=1, keep=2)
run.go()
"""


def test_kill_in_mid_save_loses_no_finished_step(straight, tmp_path):
    root = Path(__file__).parents[2]
    code = _KILLED.format(paths=[str(root), str(Path(__file__).parent)], workdir=str(tmp_path))
    checkpoints = tmp_path / "checkpoints" / "stage1"
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL
    )
    killed = threading.Event()

    def kill_when_saving() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and child.poll() is None:
            names = {p.name for p in checkpoints.iterdir()} if checkpoints.exists() else set()
            finished = {n for n in names if n.isdigit() and (checkpoints / n / "_CHECKPOINT_METADATA").exists()}
            if len(finished) >= 2 and names - finished:  # a save is under way beside finished ones
                break
            time.sleep(0.0005)
        child.kill()
        killed.set()

    thread = threading.Thread(target=kill_when_saving)
    thread.start()
    child.wait(timeout=90)
    thread.join()
    assert child.returncode == -signal.SIGKILL
    assert_same(Run(tmp_path, every_steps=1).go(), straight[0])
    assert losses(tmp_path) == straight[1]

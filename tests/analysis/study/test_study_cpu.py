"""``configs/study_cpu.py`` from end to end: straight, and ended and killed in the middle, with the same ledger and results.

Takes minutes: two whole studies, and one of their rows trained alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lawcat_jax.checkpoints.model_dir import open_checkpoint

ROOT = Path(__file__).parents[3]
CONFIG = "configs/study_cpu.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def start(output: Path, *flags: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, as for users
    environment |= {"PYTHONPATH": str(ROOT), "LAWCAT_JAX_COMPILATION_CACHE": str(output.parent / "programs")}
    command = [sys.executable, "-m", "lawcat_jax.study", f"--config={CONFIG}", f"--output={output}", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(output: Path, *flags: str) -> str:
    study = start(output, *flags)
    told, _ = study.communicate()
    assert study.returncode == 0, told
    return told


def wait_for(log: Path, pattern: str, study: subprocess.Popen) -> None:
    deadline = time.monotonic() + 900
    while not (log.exists() and re.search(pattern, log.read_text(errors="replace"))):
        assert study.poll() is None, study.stdout and study.stdout.read()
        assert time.monotonic() < deadline, log
        time.sleep(0.05)


def params(student: Path):
    return open_checkpoint(str(student)).params()


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("straight") / "study"
    finish(output)
    return output


def lasting(output: Path) -> tuple[dict, dict]:
    """Ledger and results without times and places, and without the commit, which an edit in the meantime would change."""
    ledger = json.loads((output / "study.json").read_text().replace(str(output), "OUT"))["jobs"]
    for entry in ledger.values():
        for name in ("started", "finished", "minutes", "starts", "commit"):
            entry.pop(name)
    results = json.loads((output / "results.json").read_text().replace(str(output), "OUT"))
    results.pop("date")
    for cost in results["costs"]:
        for name in ("started", "minutes", "evaluation_minutes", "commit"):
            cost.pop(name)
    return ledger, results


def test_every_row_is_trained_and_measured_and_stage_1_once(straight):
    ledger, results = lasting(straight)
    assert {entry["status"] for entry in ledger.values()} == {"finished"}
    stages = [name for name, entry in ledger.items() if entry["kind"] == "stage1"]
    assert len(stages) == 1
    shared = [name for name, entry in ledger.items() if f"{stages[0]}/student" in entry["command"]]
    assert shared == ["lawcat_short_seed0", "shuffled_seed0"]
    assert all(set(ledger[name]["stages"]) == {"stage2"} for name in shared)
    assert set(ledger["no_conv_seed0"]["stages"]) == {"stage1", "stage2"}
    student = json.loads((straight / "runs/shuffled_seed0/student/model.json").read_text())
    assert student["extra"]["source"] == "asset:tiny_llama"  # the teacher, not the student of stage 1
    (measure,) = results["measures"].values()
    assert set(measure["rows"]) == {row["name"] for row in results["rows"]}
    assert measure["rows"]["teacher"]["pooled"]["128"]["accuracy"] >= 0.9  # its context; the students learn for seconds
    assert {claim["verdict"] for claim in results["claims"]} <= {"confirmed", "contradicted", "not decided"}
    assert "Not run" not in (straight / "results.md").read_text()
    told = finish(straight)
    assert "start" not in told  # nothing is left


def test_a_row_trained_alone_is_the_one_that_shared_its_stage_1(straight, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["LAWCAT_JAX_COMPILATION_CACHE"] = str(straight.parent / "programs")
    command = [sys.executable, "-m", "lawcat_jax.train", f"--config={CONFIG}:shuffled_seed0", f"--workdir={tmp_path}"]
    subprocess.run([*command, "--config.eval.enabled=False"], cwd=ROOT, env=environment, check=True)
    assert_same(params(tmp_path / "student"), params(straight / "runs/shuffled_seed0/student"))


def test_ended_and_killed_it_ends_as_the_straight_one(straight, tmp_path):
    output = tmp_path / "study"
    (tmp_path / "programs").symlink_to(straight.parent / "programs")
    study = start(output)
    (stage1,) = [path.name for path in (straight / "runs").glob("stage1_*")]
    wait_for(output / f"logs/{stage1}.log", r"stage1 10/", study)
    study.send_signal(signal.SIGTERM)
    told, _ = study.communicate()
    assert study.returncode == 75, told
    assert f"left: {stage1}, " in told
    study = start(output)
    wait_for(output / "logs/no_conv_seed0.log", r"stage2 10/", study)
    study.kill()
    study.communicate()
    told = finish(output)
    assert "start    teacher.passkey" not in told
    ledger = json.loads((output / "study.json").read_text())["jobs"]
    assert (ledger[stage1]["starts"], ledger["no_conv_seed0"]["starts"], ledger["teacher.passkey"]["starts"]) == (
        2,
        2,
        1,
    )
    assert lasting(output) == lasting(straight)
    for run in ("no_conv_seed0", "shuffled_seed0"):
        assert_same(params(output / f"runs/{run}/student"), params(straight / f"runs/{run}/student"))


def test_a_row_that_was_changed_is_refused_by_name(straight, tmp_path):
    changed = tmp_path / "study_cpu.py"
    changed.write_text((ROOT / CONFIG).read_text().replace("ABLATION = (12, 16)", "ABLATION = (12, 17)"))
    command = [
        sys.executable,
        "-m",
        "lawcat_jax.study",
        f"--config={changed}",
        f"--output={straight}",
        "--only=no_conv",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = [line for line in done.stdout.splitlines() if "refused" in line]
    assert "no_conv_seed0: it finished with other settings (config.stage2.steps: 16 there, 17 here)" in line

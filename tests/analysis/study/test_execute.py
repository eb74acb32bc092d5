"""Jobs side by side: order, slots, failures, ends by time and by signal, and going on afterwards. Real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lawcat_jax.analysis.study import execute as execution
from lawcat_jax.analysis.study.execute import Stop, alone, execute, make_slots
from lawcat_jax.analysis.study.ledger import Ledger
from lawcat_jax.errors import UserError

from .small import PROGRAM, program

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "a_job.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("LAWCAT_JAX_COMPILATION_CACHE", raising=False)
    return tmp_path


def go(folder: Path, jobs, slots=None, seconds: float | None = None):
    told: list[str] = []
    with Stop(time.monotonic(), seconds) as stop:
        outcome = execute(
            jobs,
            Ledger(folder),
            slots or make_slots([], 1),
            output=folder,
            stop=stop,
            echo=told.append,
        )
    return outcome, told


def events(folder: Path, event: str) -> list[dict]:
    lines = (folder / "events").read_text().splitlines() if (folder / "events").exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == event]


def test_a_job_begins_when_what_it_waits_for_is_done_and_a_failure_holds_up_no_other(folder):
    jobs = [
        program(folder, "a"),
        program(folder, "b", code=3, after=("a",)),
        program(folder, "c", after=("b",)),
        program(folder, "d", after=("c",)),
        program(folder, "e", after=("a",)),
    ]
    outcome, told = go(folder, jobs)
    assert (outcome.finished, outcome.failed, outcome.blocked, outcome.left) == (["a", "e"], ["b"], ["c", "d"], [])
    (line,) = [line for line in told if "FAILED" in line]
    assert "exit code 3: error: no luck with b" in line
    assert "a line of b" in (folder / "logs/b.log").read_text()
    assert [entry["job"] for entry in events(folder, "end")] == ["a", "e"]
    ledger = Ledger(folder)
    assert {name: entry["status"] for name, entry in ledger.jobs.items()} == {
        "a": "finished",
        "b": "failed",
        "e": "finished",
    }
    # Again: what is finished is not run, what failed is tried once more, after the others.
    mended = [*jobs[:1], program(folder, "b", after=("a",)), *jobs[2:]]
    outcome, told = go(folder, [*mended, program(folder, "f")])
    assert outcome.finished == ["a", "e", "f", "b", "c", "d"]
    assert Ledger(folder).jobs["b"]["starts"] == 2


def test_slots_share_devices_and_hold_one_job_each(folder):
    slots = make_slots(["0", "5"], 2)
    jobs = [program(folder, name, seconds=1.5) for name in "abcdef"]  # longer than four processes take to start
    outcome, _ = go(folder, jobs, slots)
    assert sorted(outcome.finished) == list("abcdef")
    begins = events(folder, "begin")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in begins[:4]].count("0") == 2
    assert {e["XLA_PYTHON_CLIENT_MEM_FRACTION"] for e in begins} == {"0.460"}
    assert {e["LAWCAT_JAX_COMPILATION_CACHE"] for e in begins} == {str(folder / "programs")}
    device_of = {e["job"]: e["CUDA_VISIBLE_DEVICES"] for e in begins}
    marks = [(e["time"], 1, e["job"]) for e in begins] + [(e["time"], -1, e["job"]) for e in events(folder, "end")]
    running, most = {"0": 0, "5": 0}, 0
    for _, change, job in sorted(marks):
        running[device_of[job]] += change
        assert max(running.values()) <= 2
        most = max(most, sum(running.values()))
    assert most == 4


def test_without_devices_the_environment_is_left_alone(folder, monkeypatch):
    monkeypatch.setenv("LAWCAT_JAX_COMPILATION_CACHE", "off")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    go(folder, [program(folder, "a")])
    (begin,) = events(folder, "begin")
    assert (begin["CUDA_VISIBLE_DEVICES"], begin["LAWCAT_JAX_COMPILATION_CACHE"]) == ("7", "off")
    assert begin["XLA_PYTHON_CLIENT_MEM_FRACTION"] is None


@pytest.mark.parametrize(
    ("devices", "per_device", "message"),
    [([], 2, "name the devices"), (["0", "0"], 1, "named twice"), (["0"], 0, "at least 1")],
)
def test_slots_that_cannot_be(devices, per_device, message):
    with pytest.raises(UserError, match=message):
        make_slots(devices, per_device)


def test_when_time_is_up_jobs_save_and_the_next_start_goes_on(folder):
    jobs = [program(folder, "a", seconds=60), program(folder, "b", after=("a",))]
    start = time.monotonic()
    outcome, told = go(folder, jobs, seconds=1.0)
    assert time.monotonic() - start < 10
    assert outcome.left == ["a", "b"]
    assert any("time is up: 1 running job(s) save and end" in line for line in told)
    assert Ledger(folder).status(jobs[0]) == "interrupted"
    outcome, _ = go(folder, jobs)
    assert outcome.finished == ["a", "b"]
    assert [e["resumed"] for e in events(folder, "begin")] == [False, True, False]
    entry = Ledger(folder).jobs["a"]
    assert entry["starts"] == 2
    assert entry["minutes"] > 0.9 / 60  # of both starts together


def test_nothing_begins_when_no_time_is_left(folder):
    outcome, _ = go(folder, [program(folder, "a")], seconds=0.0)
    assert outcome.left == ["a"]
    assert not events(folder, "begin")


def test_a_job_that_does_not_end_is_killed(folder, monkeypatch):
    monkeypatch.setattr(execution, "GRACE_SECONDS", 0.3)
    (folder / "a_job.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    )
    outcome, _ = go(folder, [program(folder, "a")], seconds=1.5)
    assert outcome.left == ["a"]


STUDY = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from lawcat_jax.analysis.study.execute import Stop, alone, execute, make_slots
from lawcat_jax.analysis.study.ledger import Ledger
from tests.analysis.study.small import program
folder = Path({folder!r})
jobs = [program(folder, "a", seconds=60), program(folder, "b", after=("a",))]
with Stop(time.monotonic(), None) as stop, alone(folder) as held:
    outcome = execute(jobs, Ledger(folder), make_slots([], 1), output=folder, stop=stop, held=held)
print(outcome.left)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_study_that_is_ended_or_killed_goes_on(folder, number):
    """Also of a killed study the jobs save; the next start waits for them."""
    text = textwrap.dedent(STUDY).format(paths=[str(ROOT)], folder=str(folder))
    study = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not events(folder, "begin"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(study.pid, number)
    output, _ = study.communicate(timeout=30)
    if number != signal.SIGKILL:
        assert output.splitlines()[-1] == "['a', 'b']"
    with alone(folder) as held:  # free once the job has ended
        assert (folder / "a.saved").exists()
        jobs = [program(folder, "a", seconds=60), program(folder, "b", after=("a",))]
        with Stop(time.monotonic(), None) as stop:
            outcome = execute(jobs, Ledger(folder), make_slots([], 1), output=folder, stop=stop, held=held)
    assert outcome.finished == ["a", "b"]


def test_one_study_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(execution, "_LOCK_SECONDS", 0.2)
    with (
        alone(folder),
        pytest.raises(UserError, match=r"--output=.* another run is at work in it .* use another --output"),
        alone(folder, lambda _: None),
    ):
        pass


def test_a_finished_job_with_other_settings_is_refused_and_the_others_go_on(folder):
    go(folder, [program(folder, "a")])
    outcome, told = go(folder, [program(folder, "a", seconds=0.01), program(folder, "b")])
    assert (outcome.failed, outcome.finished) == (["a"], ["b"])
    assert any("refused" in line and "evaluate.seconds: 0.0 there, 0.01 here" in line for line in told)


def test_a_model_is_made_again_only_where_something_unfinished_reads_it(folder):
    jobs = [dataclasses.replace(program(folder, "model"), does="train"), program(folder, "measured", after=("model",))]
    go(folder, jobs)
    (folder / "model.done").unlink()
    assert Ledger(folder).left(jobs) == []
    more = [*jobs, program(folder, "other", after=("model",))]
    assert [job.name for job in Ledger(folder).left(more)] == ["model", "other"]
    (folder / "measured.done").unlink()  # a report that is gone is measured again, and needs the model
    assert [job.name for job in Ledger(folder).left(jobs)] == ["model", "measured"]


@pytest.mark.parametrize(
    ("status", "checkpoints", "moved"),
    [("finished", False, True), ("finished", True, False), ("running", False, False)],
)
def test_a_run_that_came_without_its_model_and_checkpoints_begins_anew(folder, status, checkpoints, moved):
    workdir = folder / "runs" / "model"
    (workdir / "checkpoints" if checkpoints else workdir).mkdir(parents=True)
    (workdir / "manifest.json").write_text(json.dumps({"status": status}))
    job = dataclasses.replace(program(folder, "model"), does="train", workdir=workdir)
    outcome, _ = go(folder, [job])
    assert outcome.finished == ["model"]
    assert (folder / "runs" / "model.incomplete" / "manifest.json").exists() == moved
    assert workdir.exists() != moved


def test_a_damaged_ledger_is_one_line(folder):
    (folder / "study.json").write_text('{"jobs": 3}')
    with pytest.raises(UserError, match=r"study\.json is damaged"):
        Ledger(folder)

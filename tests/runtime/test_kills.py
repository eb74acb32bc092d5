"""Fifty kills at random moments of a run, from its start to its reports: it ends where the straight run ends, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from doubles import ROOT
from forks import Forks

from lawcat_jax.checkpoints.hf.mapping import flatten
from lawcat_jax.checkpoints.model_dir import load_model

KILLS = 50
COMMAND = ["lawcat_jax.train", f"--config={Path(__file__).with_name('killed.py')}", "--workdir=run"]
# What a run makes on its way, as patterns in its folder; a kill comes soon after one of them has appeared.
MARKS = (
    "manifest.json",
    *(f"checkpoints/{stage}/{step}*" for stage in ("stage1", "stage2") for step in (1, 2, 3)),
    ".student.tmp-*",
    "student/model.json",
    "eval/unfinished/passkey_96_*",
    "eval/unfinished/passkey_112_*",
    "eval/passkey.json",
    "eval/passkey.md",
)


def outcome(run: Path) -> tuple[dict, dict, dict]:
    """(arrays of the student, numbers of every step, results) of a finished run."""
    arrays = dict(flatten(load_model(run / "student", dtype="keep").params))
    numbers: dict = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        kept = {name: value for name, value in values.items() if name.endswith(("loss", "grad_norm", "learning_rate"))}
        for name, value in kept.items():
            key = values["stage"], values["step"], name
            assert key not in numbers, f"{key} stands there twice"
            numbers[key] = value
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    reports = {
        name: json.loads((run / "eval" / name).read_text())["results"]
        for name in ("passkey.json", "passkey_teacher.json")
    }
    return arrays, numbers, {"manifest": manifest["results"], "stages": manifest["stages"], "reports": reports}


def files_of(run: Path) -> set[Path]:
    """Everything in a run but for the insides of checkpoints and models, whose names orbax draws."""
    inside = ("checkpoints", "student")
    return {path.relative_to(run) for path in run.rglob("*") if not set(path.relative_to(run).parts[:-1]) & set(inside)}


def moment(random: np.random.Generator, run: Path, whole: float) -> Callable[[float], bool]:
    """A little later than one of the next marks appears, or a time within that of a run that is not killed."""
    late = float(random.uniform(0, whole))
    passed = max((number for number, mark in enumerate(MARKS) if any(run.glob(mark))), default=-1)  # some go away again
    following = MARKS[passed + 1 :][:4]
    if not following or random.random() < 0.2:
        return lambda seconds: seconds > late
    mark, delay, seen = following[int(random.integers(len(following)))], float(random.exponential(0.05)), []

    def reached(seconds: float) -> bool:
        if not seen and any(run.glob(mark)):
            seen.append(seconds)
        return bool(seen) and seconds > seen[0] + delay

    return reached


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills(tmp_path, capsys):
    random = np.random.default_rng(12)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "LAWCAT_JAX_COMPILATION_CACHE": str(tmp_path / "programs"),  # compiled once, the smallest ones too
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HF_HUB_OFFLINE": "1",
    }
    log = tmp_path / "log"
    with Forks(environment) as forks:
        for folder in ("first", "straight"):  # the second one with compiled programs, to be timed
            (tmp_path / folder).mkdir()
            started = time.monotonic()
            assert forks.run(COMMAND, tmp_path / folder, log) == 0, log.read_text()[-3000:]
            whole = time.monotonic() - started
        expected = outcome(tmp_path / "straight" / "run")
        kills, runs, statuses = 0, 0, []
        while kills < KILLS:
            folder = tmp_path / f"killed{runs}"
            folder.mkdir()
            runs, status = runs + 1, None
            while status != 0:
                number = signal.SIGTERM if random.random() < 0.3 else signal.SIGKILL
                when = moment(random, folder / "run", whole) if kills < KILLS else None
                log.unlink(missing_ok=True)
                begins, started = not (folder / "run").exists(), time.monotonic()
                status = forks.run(COMMAND, folder, log, number, when)
                if begins and status == 0:  # the machine may have become less busy
                    whole = min(whole, time.monotonic() - started)
                kills += status != 0
                statuses.append(status)
                # 75: SIGTERM, saved; -15: it came before the program had begun to listen
                assert status in (0, -signal.SIGKILL, 75, -signal.SIGTERM), (statuses, log.read_text()[-3000:])
            arrays, numbers, results = outcome(folder / "run")
            assert arrays.keys() == expected[0].keys()
            for path, array in arrays.items():
                np.testing.assert_array_equal(array, expected[0][path], err_msg=path)
            assert numbers == expected[1]
            assert results == expected[2]
            left = files_of(folder / "run") - files_of(tmp_path / "straight" / "run")
            assert not left, f"left behind: {left}"
            with capsys.disabled():
                print(f"{kills} kills in {runs} runs: {Counter(statuses)}", flush=True)

"""``python -m lawcat_jax.study`` as a user meets it, as far as it needs no model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def study(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lawcat_jax.study", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config: name the file of a study"),
        (["--config=configs/tiny.py"], "--config=configs/tiny.py: the file has no get_study()"),
        (["--config=configs/study_cpu.py", "--only=no_cvon"], "no row 'no_cvon'; did you mean 'no_conv"),
        (["--config=configs/study_cpu.py", "--page=docs/results.md"], "--page: goes with --report"),
        (["--config=configs/study_cpu.py", "--runs_per_device=2"], "name the devices"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, message):
    done = study(*flags, f"--output={tmp_path / 'out'}")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_list_shows_all_jobs_and_report_writes_what_there_is(tmp_path):
    flags = ["--config=configs/study_cpu.py", f"--output={tmp_path / 'out'}"]
    lines = study(*flags, "--list").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["to", "do"]] * 14
    assert not (tmp_path / "out").exists()
    assert study(*flags, "--report").returncode == 0
    assert "Not run: teacher; " in (tmp_path / "out/results.md").read_text()
    page = tmp_path / "page.md"
    page.write_text("<!-- study:begin results/study_cpu.json -->\n<!-- study:end -->\n")
    assert study(*flags, "--report", f"--page={page}").returncode == 0
    assert json.loads((tmp_path / "results/study_cpu.json").read_text())["study"] == "study_cpu"
    assert "### Claims" in page.read_text()

"""A full disk: one clear line, finished checkpoints stay, and the run goes on when there is room again."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from doubles import Run

from lawcat_jax.checkpoints import orbax_errors
from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.config import Config
from lawcat_jax.errors import UserError
from lawcat_jax.training import checkpoint, loop, metrics, run

LEFT = 100_000  # bytes: room for one of the doubles' checkpoints, not for all


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MB, where the tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


def finished(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.name.isdigit()}


def fill(disk: Path, left: int = LEFT) -> Path:
    room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler = disk / "filler"
    filler.write_bytes(b"0" * (room - left))
    return filler


def test_full_disk_stops_the_run_and_keeps_what_is_finished(disk, tmp_path, capfd):
    expected = Run(tmp_path / "straight", every_steps=2, keep=99).go()
    with pytest.raises(loop.InterruptedRunError):
        Run(disk / "run", every_steps=2, keep=99, stop_after=2).go()
    filler = fill(disk)
    full = Run(disk / "run", every_steps=2, keep=99)
    with pytest.raises(UserError, match=rf"^checkpoint in {full.directory} could not be written: no space left on"):
        full.go()
    kept = finished(full.directory)
    assert "2" in kept
    assert "Traceback" not in capfd.readouterr().err
    filler.unlink()
    again = Run(disk / "run", every_steps=2, keep=99)
    jax.tree.map(np.testing.assert_array_equal, again.go(), expected)
    assert kept <= finished(again.directory)


def test_a_model_that_does_not_fit_is_one_line(disk, caplog):
    """Neither orbax nor asyncio print tracebacks of their own beside it, and nothing is left."""
    with pytest.raises(UserError, match=f"^cannot write {disk}/model: No space left on device$"):
        convert("asset:tiny_llama", str(disk / "model"))
    assert not caplog.records
    assert not list(disk.iterdir())


def no_space(*_args, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_failed_save_is_noticed_before_the_next_one(tmp_path, monkeypatch):
    """Nothing is saved between step 2 and the end, yet the run stops within a few steps."""
    run = Run(tmp_path, every_steps=100, stop_after=None)
    taken = []
    monkeypatch.setattr(checkpoint.Checkpointer, "check", lambda self: taken.append(1) or raise_failed(self))

    def raise_failed(self):
        if len(taken) == 3:
            raise self._failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    with pytest.raises(UserError, match="no space left"):
        run.go()
    assert run.batches.index <= 5


def test_other_files_of_a_run(tmp_path, monkeypatch):
    """metrics.jsonl or the manifest cannot be written: the same line, with the folder's name."""
    config = Config(workdir=str(tmp_path))
    monkeypatch.setattr(metrics.Manifest, "open", no_space)
    with pytest.raises(UserError, match=f"^{tmp_path}: no space left on the device; free some"):
        run.run(config)


def test_damaged_last_line_of_metrics_is_dropped(tmp_path):
    config = metrics.LogConfig(tensorboard=False)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "stage1", "step": 1, "loss": 2.0}\n{"stage": "sta')
    writer = metrics.MetricsWriter(tmp_path, config)
    writer.rewind("stage1", 1)
    writer.write("stage1", 2, {"loss": 1.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


@pytest.mark.parametrize(
    ("problem", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EACCES, "x"), False),
        (ValueError("RESOURCE_EXHAUSTED: Failed to write 236 bytes to file 5: No space left on device"), True),
        (ValueError("RESOURCE_EXHAUSTED: out of memory"), False),
    ],
)
def test_what_counts_as_full(problem, full):
    assert orbax_errors.is_disk_full(problem) is full

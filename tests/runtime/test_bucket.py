"""Runs whose folder is in a bucket: a file system of fsspec in memory stands for it."""

from __future__ import annotations

import json
from typing import ClassVar

import fsspec
import jax
import pytest
import tiny
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from lawcat_jax.checkpoints import model_dir
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import sharding
from lawcat_jax.training import loop, run
from lawcat_jax.training.workdir import Workdir


class Bucket(MemoryFileSystem):
    """Answers to gs://; ``broken`` refuses to write."""

    protocol = ("gcs", "gs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    broken: ClassVar[bool] = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://").removeprefix("gcs://"))

    def _open(self, path, mode="rb", **options):
        if self.broken and "w" in mode:
            raise OSError("503 try again")
        return super()._open(path, mode, **options)


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    old = dict(fsspec.registry)
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: Bucket(skip_instance_cache=True))
    monkeypatch.setattr(Bucket, "store", {})
    yield Bucket
    if "gcs" in old:
        fsspec.register_implementation("gcs", old["gcs"], clobber=True)


def names(bucket) -> set[str]:
    return {name.removeprefix("/b/run/") for name in bucket.store}


def test_uploads_what_changed_and_fetches_what_a_resumed_run_reads(bucket):
    with Workdir("gs://b/run/") as folder:
        assert folder.child("checkpoints") == "gs://b/run/checkpoints"
        (folder.local / "manifest.json").write_text("{}")
        (folder.local / "metrics.jsonl").write_text("1\n")
        (folder.local / "student").mkdir()
        (folder.local / "student" / "model.json").write_text("{}")
        (folder.local / ".half-written").write_text("")
        folder.sync()  # it is not time yet
        assert not bucket.store
        folder.sync(now=True)
        (folder.local / "metrics.jsonl").write_text("1\n2\n")
    assert not folder.local.exists()
    assert names(bucket) == {"manifest.json", "metrics.jsonl", "student/model.json"}
    with Workdir("gs://b/run") as again:
        assert (again.local / "metrics.jsonl").read_text() == "1\n2\n"
        assert not (again.local / "student").exists()
    with Workdir("gs://b/run", primary=False) as other:
        (other.local / "mine").write_text("")
    assert "mine" not in names(bucket)


def test_bucket_that_does_not_answer(bucket, monkeypatch, capsys):
    monkeypatch.setattr(Bucket, "broken", True)
    folder = Workdir("gs://b/run")
    (folder.local / "metrics.jsonl").write_text("1\n")
    folder.sync(now=True)
    assert "not uploaded, trying again later (503 try again)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^--workdir=gs://b/run: cannot be written .* is in /"), folder:
        pass
    assert (folder.local / "metrics.jsonl").exists()  # nothing is lost


def test_plain_folder_stays_where_it_is(tmp_path):
    with Workdir(str(tmp_path / "a" / "b")) as folder:
        (folder.local / "x").write_text("")
        folder.sync(now=True)
    assert (tmp_path / "a" / "b" / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        Workdir(str(tmp_path / "file" / "run"))


STRANGERS = {
    "model.json": "the folder holds no run, but model.json; name a new or an empty folder",
    "thesis.tex": "the folder holds no run, but thesis.tex;",
}
LEFT = (
    ".lock",
    ".manifest.json.tmp",
    "metrics.jsonl",
    "student",
    "student.damaged1",
    "eval",
    "train.log",
    "lost+found",
)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_folder_of_other_things_is_no_workdir(stranger, tmp_path, bucket):
    """Of a disk and of a bucket; what starts that failed leave is no other thing, and a run may have notes beside it."""
    for name in LEFT:
        (tmp_path / name).write_text("")
    with Workdir(str(tmp_path)):
        pass
    (tmp_path / ".lock").unlink()
    (tmp_path / stranger).write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=STRANGERS[stranger]):
        Workdir(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "manifest.json").write_text("{}")
    with Workdir(str(tmp_path)):
        pass
    files = Bucket(skip_instance_cache=True)
    files.pipe("/b/run/metrics.jsonl", b"")
    with Workdir("gs://b/run"):
        pass
    files.pipe(f"/b/run/{stranger}", b"mine")
    with pytest.raises(UserError, match=STRANGERS[stranger]):
        Workdir("gs://b/run")
    files.pipe("/b/run/manifest.json", b"{}")
    with Workdir("gs://b/run"):
        pass


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_run_in_a_bucket_is_resumed_on_a_new_machine(bucket, tmp_path, monkeypatch):
    """Checkpoints go to a local folder here: orbax talks to real buckets only."""
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *a, **k: make(*a, **{**k, "devices": jax.devices()[:1]}))

    def go() -> int:
        config = tiny.get_config()
        config.workdir, config.checkpoint.directory, config.log.progress = "gs://b/run", f"{tmp_path}/kept/", "off"
        config.stage2.steps = 2
        return run.run(config)

    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "requested", lambda self, step: step == 3)
        assert go() == loop.EXIT_INTERRUPTED
    assert json.loads(bucket.store["/b/run/manifest.json"].getvalue())["status"] == "interrupted"
    assert go() == 0
    manifest = json.loads(bucket.store["/b/run/manifest.json"].getvalue())
    assert (manifest["status"], manifest["model"]) == ("finished", "gs://b/run/student")
    steps = [json.loads(line) for line in bucket.store["/b/run/metrics.jsonl"].getvalue().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4, 1, 2]
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"stage1", "stage2"}
    for name, file in bucket.store.items():  # the exported model, as a user would fetch it
        if "/student/" in name:
            target = tmp_path / name.removeprefix("/b/run/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.getvalue())
    assert model_dir.load_model(tmp_path / "student").attention is not None

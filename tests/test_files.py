"""Directories that appear whole: links, mount points, and what was there before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lawcat_jax.errors import UserError
from lawcat_jax.files import new_directory, new_file, read_json, remove_leftovers, write_json


def write(target, text="new", overwrite=False):
    with new_directory(target, overwrite=overwrite) as directory:
        (directory / "model.json").write_text(text)
        (directory / "params").mkdir()
        (directory / "params" / "b").write_text(text)


def content(directory):
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def fail_halfway(target):
    with new_directory(target, overwrite=True) as directory:
        (directory / "model.json").write_text("half")
        raise RuntimeError


NEW = {"model.json": "new", "params/b": "new"}  # the names of a model: nothing else is replaced


@pytest.mark.parametrize("there", ["empty", "absent"])
def test_what_a_link_leads_to_is_written(tmp_path, there):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.parent.mkdir()
    if there == "empty":
        real.mkdir()
    link.symlink_to(real)
    write(link)
    assert link.is_symlink()
    assert content(real) == NEW
    with pytest.raises(UserError, match="exists and is not empty"):
        write(link, "newer")
    write(link, "newer", overwrite=True)
    assert link.is_symlink()
    assert content(real) == {name: "newer" for name in NEW}
    assert [entry.name for entry in real.parent.iterdir()] == ["real"]


@pytest.fixture
def mount(tmp_path, monkeypatch):
    """A directory that behaves as a mount point: it can neither be renamed nor removed, nothing moves in or out."""
    target, rename = tmp_path / "mount", os.rename
    target.mkdir()
    (target / "lost+found").mkdir()

    def checked(source, to):
        inside = [Path(path) != target and target in Path(path).parents for path in (source, to)]
        if not all(inside):
            raise OSError(18, "Invalid cross-device link")
        rename(source, to)

    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    monkeypatch.setattr(os, "rename", checked)
    return target


def test_a_mount_point_is_filled_and_replaced(mount):
    write(mount)
    assert content(mount) == NEW
    with pytest.raises(UserError, match="exists and is not empty"):
        write(mount, "newer")
    (mount / "README.md").write_text("gone with --overwrite")
    write(mount, "newer", overwrite=True)
    assert content(mount) == {name: "newer" for name in NEW}
    assert sorted(entry.name for entry in mount.iterdir()) == ["lost+found", "model.json", "params"]
    with pytest.raises(RuntimeError):
        fail_halfway(mount)
    assert content(mount) == {name: "newer" for name in NEW}


def test_a_failed_move_brings_back_what_was_there(mount, monkeypatch):
    write(mount)
    rename = os.rename

    def failing(source, to):
        if Path(to) == mount / "params" and ".old-" not in str(source):
            raise OSError(5, "Input/output error")
        rename(source, to)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(UserError, match="Input/output error"):
        write(mount, "newer", overwrite=True)
    assert content(mount) == NEW
    assert sorted(entry.name for entry in mount.iterdir()) == ["lost+found", "model.json", "params"]


def test_targets_that_cannot_be_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for target in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "loop", tmp_path / ("n" * 300), "a\0b"):
        with pytest.raises(UserError) as caught:
            write(target)
        assert "\n" not in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "loop"]


def test_json_that_is_none_is_one_line(tmp_path):
    for text, message in (
        ('{"a":' * 100_000, "nested too deeply|not valid JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("[1]", "should hold a JSON object"),
        ("{", "not valid JSON"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"\xff{}")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path)


def test_file_names_that_are_no_unicode_are_written_and_read_back(tmp_path):
    value = {"model": os.fsdecode(b"a\xff") + "é", "\ud83d": ["\ud83d", "\\ud83d", "\U0001f600"]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    with new_directory(tmp_path / "student", overwrite=True) as directory, new_file(tmp_path / "passkey.json") as file:
        left = {directory.name, file.name, ".student.old-abcd_12x"}
        kept = {
            "student",
            "passkey.json",
            ".lock",
            ".passkey.json",
            ".other.tmp-abcd_12x",
            ".notes.settings",
            "x.abcd_12x",
        }
        for name in left | kept:
            (tmp_path / name).mkdir(exist_ok=True) if "student" in name else (tmp_path / name).write_text("")
        remove_leftovers(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == kept
        for name in (directory.name, "student"):  # for the end of the block
            (tmp_path / name).mkdir(exist_ok=True)
        file.write_text("")
    remove_leftovers(tmp_path / "nothing")

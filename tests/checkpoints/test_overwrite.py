"""--overwrite replaces models that this program wrote, and nothing else."""

import os
from pathlib import Path

import pytest

from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.checkpoints.model_dir import load_model
from lawcat_jax.errors import UserError
from tests.checkpoints import students


@pytest.fixture
def teacher(tmp_path):
    return students.write_teacher(tmp_path / "teacher")


def tree(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(folder, text, source, target, **options):
    before = tree(folder)
    with pytest.raises(UserError, match=text) as caught:
        convert(str(source), str(target), overwrite=True, **options)
    assert "\n" not in str(caught.value)
    assert tree(folder) == before


def test_own_models_are_replaced(teacher, tmp_path):
    student = students.write_student(tmp_path / "student", teacher=teacher)
    for to, source in (("model", teacher), ("hf", teacher), ("hf-base", student), ("peft", student)):
        for _ in range(2):
            convert(str(source), str(tmp_path / "out"), to=to, overwrite=True)
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_anything_else_is_kept(teacher, tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "page.md").write_text("words")
    refused(tmp_path, r"docs has page.md in it; remove it yourself", teacher, docs)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "model.json").write_text("{}")
    refused(tmp_path, "run has checkpoints in it", teacher, run)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    (foreign / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    refused(tmp_path, "has weights of another program", teacher, foreign)
    os.symlink(docs, tmp_path / "link")
    refused(tmp_path, "link has page.md in it", teacher, tmp_path / "link")
    target = tmp_path / "model"
    convert(str(teacher), str(target))
    monkeypatch.chdir(target)
    refused(tmp_path, "is or holds the current directory", teacher, ".")
    monkeypatch.chdir(target / "params")
    refused(tmp_path, "is or holds the current directory", teacher, target)


def test_nothing_that_holds_or_is_held_by_the_source(teacher, tmp_path):
    model = tmp_path / "model"
    convert(str(teacher), str(model))
    refused(tmp_path, "lies inside the source", model, model / "params", to="hf")
    inner = model / "tokenizer" / "copy"
    convert(str(teacher), str(inner))
    refused(tmp_path, "holds the source", inner, model)
    os.symlink(model, tmp_path / "alias")
    refused(tmp_path, "same directory", model, tmp_path / "alias")
    refused(tmp_path, "same directory", tmp_path / "alias", model)


def test_a_link_as_target_stands_for_what_it_points_to(teacher, tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "target")
    convert(str(teacher), str(tmp_path / "target"))
    assert (tmp_path / "target").is_symlink()
    assert (tmp_path / "disk" / "model.json").is_file()
    convert(str(teacher), str(tmp_path / "target"), overwrite=True)
    assert (tmp_path / "target").is_symlink()


def test_a_mount_point_is_filled_in_place(teacher, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    (disk / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == disk)
    for _ in range(2):
        convert(str(teacher), str(disk), overwrite=True)
        assert {entry.name for entry in disk.iterdir()} == {"lost+found", "model.json", "params"}
    assert students.same_bits(load_model(disk).params, load_model(teacher).params)


def test_a_student_does_not_lose_its_mixers_silently(teacher, tmp_path, capsys):
    student = students.write_student(tmp_path / "student", teacher=teacher)
    with pytest.raises(UserError, match="no place for its linear attention: take --to=transformers"):
        convert(str(student), str(tmp_path / "hf"), to="hf")
    assert not (tmp_path / "hf").exists()
    convert(str(student), str(tmp_path / "hf"), to="hf-base")
    assert "its linear attention is left out, its adapters are merged" in capsys.readouterr().out
    with pytest.raises(UserError, match="is no student"):
        convert(str(teacher), str(tmp_path / "x"), to="hf-base")
    convert(str(student), str(tmp_path / "peft"), to="peft")
    assert "another model than the student" in capsys.readouterr().out
    assert "not the student" in (tmp_path / "peft" / "README.md").read_text()

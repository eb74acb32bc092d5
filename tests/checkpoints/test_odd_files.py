"""Names and files that cannot be read: one line from every reader, nothing left by a writer."""

from __future__ import annotations

import os
import shutil

import pytest

from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.checkpoints.model_dir import load_model
from lawcat_jax.data.tokenize import load_tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.files import atomic_file
from lawcat_jax.inference.loading import load_for_inference

READERS = {
    "load_model": load_model,
    "load_tokenizer": load_tokenizer,
    "load_for_inference": load_for_inference,
}


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree("lawcat_jax/assets/tiny_llama", tmp_path / "m")


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("name", ["n" * 300, "./a\0b", "/dev/null", "", "/proc/self/mem", "/" + "d/" * 3000])
def test_odd_names_are_one_line(read, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        read(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["directory", "pipe", "dangling", "loop", "binary", "deep", "empty"])
def test_odd_files_of_a_checkpoint_are_one_line_or_as_if_absent(copy, file, kind, tmp_path):
    (copy / file).unlink()
    if kind == "directory":
        (copy / file).mkdir()
    elif kind == "pipe":
        os.mkfifo(copy / file)
    elif kind in ("dangling", "loop"):
        (copy / file).symlink_to(copy / (file if kind == "loop" else "nothing"))
    else:
        content = {"binary": b"\xff\x00" * 500, "deep": b'{"a":' * 100_000, "empty": b""}[kind]
        (copy / file).write_bytes(content)
    try:
        convert(str(copy), str(tmp_path / "out"))
        load_tokenizer(tmp_path / "out")
    except UserError as problem:
        message = str(problem)
    else:
        message = ""
        assert file in ("generation_config.json", "tokenizer.json")
    assert "\n" not in message
    if message and file != "tokenizer.json":
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_unreadable_tokenizer_files_are_not_called_unwritable(copy, tmp_path, monkeypatch):
    from pathlib import Path

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read .*tokenizer\.json.*Permission denied"):
        convert(str(copy), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    def write():
        with atomic_file(tmp_path / "a.txt") as out:
            out.write("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left"):
        write()
    assert not list(tmp_path.iterdir())

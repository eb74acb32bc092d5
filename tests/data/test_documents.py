"""Documents and rows of text sources: what counts as one, which files are read, and one clear line for every bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lawcat_jax.data.documents import documents, rows
from lawcat_jax.data.source_files import files_here, keeps_returns, local_files
from lawcat_jax.data.text import load_tokens
from lawcat_jax.data.tokenize import decode
from lawcat_jax.errors import UserError
from tests.data import tokenizers as small
from tests.data.texts import STORIES, write_stories


def test_hugging_face_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hfcache"))
    write_stories(tmp_path)
    assert list(documents(f"hf:{tmp_path / 'hf'}:train")) == STORIES
    with pytest.raises(UserError, match=r"no field 'body'.*it has text"):
        list(documents(f"hf:{tmp_path / 'hf'}", "body"))
    with pytest.raises(UserError, match="cannot be opened"):
        list(documents(f"hf:{tmp_path / 'hf'}:nosplit"))
    with pytest.raises(UserError, match="expected hf:"):
        list(documents("hf:a:b:c:d"))


def test_tfds_without_tensorflow(tmp_path):
    import sys

    import tensorflow_datasets as tfds

    class Stories(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # no checksum files beside the code

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, manager):
            return {"train": ((number, {"text": story}) for number, story in enumerate(STORIES))}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Stories(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = f"tfds:{builder.data_dir}"
    assert list(documents(f"{source}:train")) == STORIES
    assert list(documents(source)) == STORIES
    assert len(list(documents(f"{source}:train[:2]"))) == 2
    with pytest.raises(UserError, match="no field 'body'"):
        list(documents(source, "body"))
    with pytest.raises(UserError, match="cannot be opened"):
        list(documents(f"{source}:nosplit"))
    assert "tensorflow" not in sys.modules


def test_documents_of_an_unknown_dataset(monkeypatch):
    with pytest.raises(UserError, match="cannot be opened"):
        list(documents("tfds:no_such_dataset_at_all"))


def test_markdown_is_text_and_no_part_of_a_directory_of_other_files(tmp_path):
    (tmp_path / "README.md").write_text("about")
    assert list(documents(str(tmp_path))) == ["about"]
    assert list(documents(str(tmp_path / "README.md"))) == ["about"]
    (tmp_path / "a.txt").write_text("a text")
    assert list(documents(str(tmp_path))) == ["a text"]


def test_of_a_directory_hidden_files_are_skipped_and_others_are_counted(tmp_path, capsys):
    names = ["a.TXT", ".hidden.txt", ".ipynb_checkpoints/a.txt", "b/.git/c.txt", "b/d.Jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "row"}' if name.endswith("Jsonl") else f"text of {name}")
    assert list(documents(str(tmp_path))) == ["text of a.TXT", "row"]
    assert [row["text"] for _, row in rows(str(tmp_path / "b"))] == ["row"]
    assert capsys.readouterr().err == ""
    for name in ("c.text", "b/e.json", "f.txt.gz", "README.md"):
        (tmp_path / name).write_text("other")
    for _ in range(2):  # said once
        assert list(documents(str(tmp_path))) == ["text of a.TXT", "row"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "4 files are passed over (for example README.md)" in said[0]
    assert list(documents(str(tmp_path / "a.TXT"))) == ["text of a.TXT"]


def test_byte_order_marks_are_no_text(tmp_path):
    for name, content in (("a.txt", "The sky"), ("b.md", "The sky"), ("c.jsonl", '{"text": "The sky"}')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert list(documents(str(tmp_path / name))) == ["The sky"]
    (tmp_path / "d.jsonl").write_text('{"text": "\\ufeffThe sky"}')
    assert list(documents(str(tmp_path / "d.jsonl"))) == ["The sky"]
    for encoding, name in {
        "utf-16": "UTF-16",
        "utf-32": "UTF-32",
        "utf-16-le": "UTF-16",
        "utf-16-be": "UTF-16",
    }.items():
        for file, content in (("e.txt", "The sky"), ("e.jsonl", '{"text": "The sky"}')):
            (tmp_path / file).write_text(content, encoding=encoding)
            with pytest.raises(UserError, match=rf"{file}': it is {name}.*; save it as UTF-8"):
                list(documents(str(tmp_path / file)))


def test_linked_files_are_read_once_and_linked_folders_are_read(tmp_path, capsys):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "sub" / "b.txt").write_text("two")
    (elsewhere / "c.txt").write_text("three")
    (folder / "linked").symlink_to(elsewhere)
    assert sorted(documents(str(folder))) == ["one", "three", "two"]
    assert [file.name for file in files_here(f"hf:{folder}")] == ["a.txt", "c.txt", "b.txt"]
    assert capsys.readouterr().err == ""
    (folder / "d.txt").symlink_to(folder / "a.txt")
    os.link(folder / "a.txt", folder / "e.txt")
    (folder / "sub" / "again").symlink_to(elsewhere)
    (folder / "sub" / "up").symlink_to(folder)
    assert sorted(documents(str(folder))) == ["one", "three", "two"]
    assert "4 link(s) to what is read already are passed over" in capsys.readouterr().err
    assert list(documents(str(folder / "*.txt"))) == ["one"]
    (folder / "f.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match=r"f\.txt is a link to nothing"):
        list(documents(str(folder)))


def test_names_that_look_like_patterns_are_names_first(tmp_path):
    for folder in ("data[1]", "data1"):
        (tmp_path / folder / "sub*").mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text(folder)
        (tmp_path / folder / "sub*" / "b[2].txt").write_text(f"below {folder}")
    read = lambda source: list(documents(str(tmp_path / source)))  # noqa: E731
    assert read("data[1]") == ["data[1]", "below data[1]"]
    assert read("data[1]/*.txt") == ["data[1]"]
    assert read("data[1]/sub*/b[2].txt") == ["below data[1]"]
    assert read("data[1]/sub*/*.txt") == ["below data[1]"]
    assert read("data?/a.txt") == ["data1"]
    assert read("data[1]/**/*.txt") == ["data[1]", "below data[1]"]


def test_bytes_and_characters_that_are_no_unicode_are_replaced_and_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    import pyarrow
    import pyarrow.parquet

    lines = [b'{"text": "caf\xe9 \xff"}', b'{"text": "a\\ud83d b \\ud83d\\ude42"}', b'{"text": "plain"}']
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    expected = ["caf\ufffd \ufffd", "a\ufffd b \U0001f642", "plain"]
    assert list(documents(str(tmp_path / "a.jsonl"))) == expected
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert "3 bytes or characters" in said[0]
    assert [row["text"] for _, row in rows(str(tmp_path / "a.jsonl"))] == expected
    assert len(load_tokens(str(tmp_path / "a.jsonl"), small.byte_level())) > 10
    column = pyarrow.array([b"caf\xe9", b"good"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == ["caf\ufffd", "good"]


def test_unreadable_and_deep_and_damaged_files_give_one_clear_line(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "deep.jsonl").write_text("[" * 200_000 + "]" * 200_000)
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {n}" * 50 for n in range(4000)]}), tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[200:4000] = b"\xff" * 3800
    (tmp_path / "corrupt.parquet").write_bytes(content)
    for name, message in (("deep.jsonl", "nested too deeply"), ("corrupt.parquet", "damaged after row|not a readable")):
        for read in (documents, rows):
            with pytest.raises(UserError, match=message) as caught:
                list(read(str(tmp_path / name)))
            assert "\n" not in str(caught.value)
    (tmp_path / "a.txt").write_text("text")

    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="cannot be read"):
        list(documents(str(tmp_path / "a.txt")))
    with pytest.raises(UserError, match="text source"):
        local_files("a\0b")


def test_line_ends_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    text, tokenizer = "One.\r\nTwo.\rThree.\n", small.byte_level()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}))
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_bytes(text.encode())
        assert list(documents(str(tmp_path / name))) == [text] == list(documents(str(tmp_path / "rows.jsonl")))
        assert decode(tokenizer, load_tokens(str(tmp_path / name), tokenizer)) == text
        assert keeps_returns(tmp_path / name)
        (tmp_path / name).write_text("One.\n")
        assert not keeps_returns(tmp_path / name)
    assert not keeps_returns(tmp_path / "rows.jsonl")  # they were kept by earlier versions too

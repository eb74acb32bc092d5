"""Text sources: reading, packing, caching, and one clear line for every bad input."""

from __future__ import annotations

import hashlib
import json
import os
import time

import numpy as np
import pytest
import tokenizers

from lawcat_jax.data import text, tokenize
from lawcat_jax.data.documents import documents
from lawcat_jax.data.source_files import digests, files_here
from lawcat_jax.data.tokenize import decode, encode
from lawcat_jax.errors import UserError
from tests.data import tokenizers as small
from tests.data.texts import STORIES, write_stories


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_local_form_gives_the_same_documents_and_tokens(tmp_path):
    tokenizer = small.byte_level()
    expected = [token for story in STORIES for token in [*encode(tokenizer, story), tokenizer.eos_token_id]]
    for source in write_stories(tmp_path):
        assert list(documents(source)) == STORIES
        tokens = text.load_tokens(source, tokenizer)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == expected


def test_remote_sources_are_read_only_as_far_as_needed(tmp_path, monkeypatch):
    read = []

    def endless(source, text_key="text"):
        while True:
            read.append(1)
            yield "The sky is blue. " * 50

    monkeypatch.setattr(text, "documents", endless)
    tokens = text.load_tokens("hf:endless", small.byte_level(), max_tokens=5000)
    assert len(tokens) == 5000
    assert len(read) < 200


def test_cache_is_used_and_follows_changes(tmp_path, monkeypatch, cache):
    tokenizer = small.byte_level()
    file = tmp_path / "a.txt"
    file.write_text("The sky is blue.")
    first = text.load_tokens(str(file), tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(text, "token_chunks", None)  # not needed a second time
        assert np.array_equal(text.load_tokens(str(file), tokenizer), first)
    assert not list(cache.glob("*.partial"))
    file.write_text("The sky is blue. Here we go.")
    assert len(text.load_tokens(str(file), tokenizer)) > len(first)
    assert len(text.load_tokens(str(file), small.metaspace())) != 0
    assert len(list(cache.iterdir())) == 3


def test_a_file_of_other_contents_is_another_source(tmp_path, cache):
    """Also where its size and time, and even its path, are the same."""
    tokenizer, file = small.byte_level(), tmp_path / "a.txt"
    file.write_text("The sky is blue.")
    first, stamp = text.load_tokens(str(file), tokenizer), file.stat().st_mtime_ns
    file.write_text("The sky is grey.")
    os.utime(file, ns=(stamp, stamp))
    second = text.load_tokens(str(file), tokenizer)
    assert decode(tokenizer, second[:-1].tolist()) == "The sky is grey."
    assert len(list(cache.iterdir())) == 2
    (tmp_path / "moved").mkdir()
    file.rename(tmp_path / "moved" / "b.txt")
    assert np.array_equal(text.load_tokens(str(tmp_path / "moved"), tokenizer), second)
    assert len(list(cache.iterdir())) == 2
    assert first.tolist() != second.tolist()


def test_a_file_that_changes_while_it_is_read_leaves_no_cache(tmp_path, monkeypatch, cache):
    """Its name would be the old text's, and what it holds the new one's."""
    tokenizer, file = small.byte_level(), tmp_path / "a.txt"
    file.write_text("The sky is blue.")
    chunks = text.token_chunks

    def changing(*args):
        file.write_text("The sky is grey.")
        yield from chunks(*args)

    monkeypatch.setattr(text, "token_chunks", changing)
    with pytest.raises(UserError, match=r"a\.txt': its files changed while they were read"):
        text.load_tokens(str(file), tokenizer)
    assert not cache.exists() or not list(cache.iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    file.write_text("The sky is blue.")
    assert decode(tokenizer, text.load_tokens(str(file), tokenizer)[:-1].tolist()) == "The sky is blue."


def test_digests_of_files(tmp_path, monkeypatch):
    for name in ("a", "b", ".hidden"):
        (tmp_path / name).write_text(name)
    files = files_here(f"tfds:{tmp_path}:train")
    assert files == files_here(f"hf:{tmp_path}") == [tmp_path / "a", tmp_path / "b"]
    assert files_here("hf:") == files_here("tfds:pg19:test") == files_here("hf:a/b") == []
    long_ago = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: long_ago)
    expected = [hashlib.sha256(name.encode()).hexdigest()[:32] for name in ("a", "b")]
    assert digests(files) == expected
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)  # not needed a second time
        assert digests(files[::-1]) == expected[::-1]
    (tmp_path / "a").write_text("c")
    assert digests(files) == [hashlib.sha256(b"c").hexdigest()[:32], expected[1]]
    with pytest.raises(UserError, match=r"gone: cannot be read \(No such file"):
        digests([tmp_path / "gone"])


def test_unwritable_cache_falls_back_to_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "file" / "below"))
    (tmp_path / "a.txt").write_text("The sky is blue.")
    assert len(text.load_tokens(str(tmp_path / "a.txt"), small.byte_level())) > 3


def test_packing_predicts_each_token_once():
    tokens = np.arange(10, 10 + 23).astype(np.uint16)
    packed = text.PackedText(tokens, 5, bos_id=1)
    assert len(packed) == 4
    assert [packed[i].tolist()[0] for i in range(4)] == [1] * 4
    assert np.concatenate([packed[i][1:] for i in range(4)]).tolist() == tokens[:20].tolist()
    plain = text.PackedText(tokens, 5, bos_id=None)
    assert len(plain) == 4
    assert np.concatenate([plain[i][1:] for i in range(4)]).tolist() == tokens[1:21].tolist()
    assert plain[3].dtype == np.int32
    with pytest.raises(UserError, match="do not fill one sequence"):
        text.PackedText(tokens[:4], 5, bos_id=1, source="s")


def _bad(folder):
    import pyarrow
    import pyarrow.parquet

    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "other.jsonl").write_text('{"body": "a"}\n')
    (folder / "number.jsonl").write_text('{"text": 3}\n')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "twice.jsonl").write_text('{"text": "a", "meta": {"text": 1}}\n{"text": "a", "text": "b"}\n')
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "bad.parquet").write_bytes(b"PAR1 nothing")
    (folder / "table.csv").write_text("a,b")
    (folder / "nothing").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), folder / "other.parquet")
    return {
        "empty.txt": "the file is empty",
        "latin.txt": "not UTF-8 at byte 3",
        "bad.jsonl": "line 2: not JSON",
        "other.jsonl": "line 1: no field 'text'.*it has body",
        "number.jsonl": "holds a int, not text",
        "list.jsonl": "it is a list",
        "twice.jsonl": "line 2: not JSON .'text' stands twice in an object",
        "blank.jsonl": "holds no text",
        "bad.parquet": "not a readable parquet file",
        "other.parquet": "no column 'text'.*it has body",
        "table.csv": "unknown suffix",
        "nothing": "the directory holds no",
        "absent.txt": "no such file",
        "*.text": "no such file, and no file matches",
    }


def test_bad_sources_give_one_clear_line(tmp_path, cache):
    for name, message in _bad(tmp_path).items():
        with pytest.raises(UserError, match=message) as caught:
            text.load_tokens(str(tmp_path / name), small.byte_level())
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list(cache.glob("*")), "a failed source must leave nothing in the cache"


def _damaged(good: bytes) -> dict[str, bytes]:
    flipped = bytearray(good)
    flipped[-3] ^= 0x40
    return {"truncated": good[:-10], "odd": good + b"x", "flipped": bytes(flipped), "empty": b"", "foreign": good[64:]}


@pytest.mark.parametrize("kind", ["truncated", "odd", "flipped", "empty", "foreign", "directory"])
def test_a_damaged_cache_is_made_again(kind, tmp_path, cache, capsys):
    file = tmp_path / "a.txt"
    file.write_text("The sky is blue. Here we go. " * 20)
    expected = np.array(text.load_tokens(str(file), small.byte_level()))
    (cached,) = cache.iterdir()
    good = cached.read_bytes()
    if kind == "directory":
        cached.unlink()
        cached.mkdir()
    else:
        cached.write_bytes(_damaged(good)[kind])
    assert np.array_equal(text.load_tokens(str(file), small.byte_level()), expected)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert str(cached) in lines[0]
    if kind != "directory":
        assert cached.read_bytes() == good
        assert "damaged" in lines[0]


def test_empty_documents_are_left_out_and_counted(tmp_path, capsys):
    rows = ["The sky", "", " \n", "is blue"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    tokenizer = small.byte_level()
    tokens = text.load_tokens(str(tmp_path / "a.jsonl"), tokenizer).tolist()
    assert tokens.count(tokenizer.eos_token_id) == 2
    assert "2 documents are empty and left out" in capsys.readouterr().out
    (tmp_path / "b.txt").write_text("\ufeff\n")
    with pytest.raises(UserError, match="holds no text"):
        text.load_tokens(str(tmp_path / "b.txt"), tokenizer)


def test_tokens_beyond_the_embedding_are_refused_where_they_occur(tmp_path, cache):
    """An added token that no text holds is harmless; one that a text holds is named, also when the cache knew it."""
    import transformers

    backend = tokenizers.Tokenizer.from_str(small.byte_level().backend_tokenizer.to_str())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    (tmp_path / "good.txt").write_text("The sky is blue.")
    (tmp_path / "bad.txt").write_text("The sky <pad> is blue.")
    assert rows in text.load_tokens(str(tmp_path / "bad.txt"), tokenizer)
    tokenize.fit_embedding(tokenizer, rows, "here")
    assert tokenize.pad_id(tokenizer) == tokenizer.eos_token_id
    assert max(text.load_tokens(str(tmp_path / "good.txt"), tokenizer)) < rows
    for read in (
        lambda: text.load_tokens(str(tmp_path / "bad.txt"), tokenizer),
        lambda: tokenize.encode(tokenizer, "<pad>"),
        lambda: tokenize.encode_prompt(tokenizer, "<pad>"),
        lambda: tokenize.encode_offsets(tokenizer, "<pad>"),
    ):
        with pytest.raises(UserError, match=rf"holds the token '<pad>' \(id {rows}\)"):
            read()
    with pytest.raises(UserError, match="vocabulary only 9"):
        tokenize.fit_embedding(tokenizer, 9, "here")
    tokenizer.bos_token = "<pad>"
    with pytest.raises(UserError, match="the bos token '<pad>' has id"):
        tokenize.fit_embedding(tokenizer, rows, "here")


def test_a_vocabulary_with_gaps_keeps_its_ids(tmp_path, monkeypatch):
    """The ids of a trimmed vocabulary may be larger than its size, and than 16 bits."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "far": 70005}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    (tmp_path / "a.txt").write_text("a far a far")
    for _ in range(2):  # made, and read from the cache
        tokens = text.load_tokens(str(tmp_path / "a.txt"), tokenizer)
        assert np.asarray(tokens).tolist()[:4] == [3, 70005, 3, 70005]

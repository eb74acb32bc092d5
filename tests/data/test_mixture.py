"""Mixtures, packing, pieces of long samples, and instruction data, through the pipeline."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from lawcat_jax.config import Config, ConfigError, DataConfig, MixtureSource, StageConfig, from_dict, to_dict
from lawcat_jax.data.pieces import cut
from lawcat_jax.data.pipeline import Samples, make_dataset
from lawcat_jax.data.rows import pack
from lawcat_jax.data.sources import Document
from lawcat_jax.data.tokenize import decode
from lawcat_jax.errors import UserError
from tests.data import tokenizers as small
from tests.data.texts import prose, write_babi


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text(prose(6000))
    (books / "b.txt").write_text(prose(3000, 1))
    babi = tmp_path / "babi"
    babi.mkdir()
    write_babi(babi)
    rows = [{"instruction": f"Count {i}", "input": "", "output": f"{i} times."} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return (
        MixtureSource(kind="text", source=str(books), weight=2, text_weight=0.25),
        MixtureSource(kind="passkey", wording="varied"),
        MixtureSource(kind="niah", wording="varied", hay="books", hay_source=str(books), answer_weight=2.0),
        MixtureSource(kind="babilong", babi_source=str(babi), hay_source=str(books), prompt_weight=0.125),
        MixtureSource(kind="instruction", source=str(tmp_path / "rows.jsonl")),
    )


def _config(mixture, **options):
    data = DataConfig(kind="mixture", mixture=mixture, num_samples=60, validation_samples=12, **options)
    Config(stage1=StageConfig(data=data), stage2=StageConfig()).validate()
    return data


def _make(data, **options):
    defaults = {"seq_length": 400, "batch_size": 4, "seed": 3}
    return make_dataset(data, small.byte_level(), **(defaults | options))


def _take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def _same(first, second):
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"pieces": 4}, {"num_workers": 2, "pieces": 3}])
def test_resume_and_sharding(mixture, options):
    data = _config(mixture, **options)
    straight = _take(_make(data), 8)
    iterator = iter(_make(data))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    assert state == {"next_index": 3}
    resumed = iter(_make(data))
    resumed.set_state(state)
    assert _same(list(itertools.islice(resumed, 5)), straight[3:])
    parts = [_take(_make(data, process_index=p, process_count=2), 8) for p in range(2)]
    for step, whole in enumerate(straight):
        for name, value in whole.items():
            rows = np.empty_like(value)
            rows[0::2], rows[1::2] = parts[0][step][name], parts[1][step][name]
            assert np.array_equal(rows, value), name


def test_shares_and_loss_weights(mixture):
    data = _config(mixture)
    samples = Samples(data, small.byte_level(), seq_length=400, seed=3, split="train")
    assert len(samples) == 60
    largest = [samples[i]["loss_weights"].max() for i in range(60)]
    assert largest == [0.25] * 20 + [1.0] * 10 + [2.0] * 10 + [1.0] * 20
    answers = samples[25]
    assert set(np.unique(answers["loss_weights"])) == {0.0, 1.0}
    babilong = samples[45]["loss_weights"]
    assert set(np.unique(babilong)) == {0.0, 0.125, 1.0}
    assert (babilong == 1).sum() >= 3  # separator, answer and eos are labels
    assert (samples[20]["tokens"] != samples[30]["tokens"]).any()
    held = Samples(data, small.byte_level(), seq_length=400, seed=3, split="validation")
    assert 10 <= len(held) <= 13
    texts = [decode(small.byte_level(), samples[i]["tokens"]) for i in range(60)]
    assert not set(texts) & {decode(small.byte_level(), held[i]["tokens"]) for i in range(len(held))}


def test_a_source_of_whose_share_no_row_is_left_is_refused(mixture):
    lost = dataclasses.replace(mixture[0], weight=0.01)
    parts = (*mixture[1:], lost)
    data = DataConfig(kind="mixture", mixture=parts, num_samples=1000, validation_samples=12)
    config = Config(stage1=StageConfig(data=data), stage2=StageConfig())
    with pytest.raises(ConfigError, match=r"mixture\[4\].weight: 0.01 of 4.01 .*validation_samples 12, .*books.*raise"):
        config.validate()
    assert len(Samples(data, small.byte_level(), seq_length=400, seed=3, split="train")) == 998
    with pytest.raises(UserError, match=r"data.mixture\[4\].weight"):
        Samples(data, small.byte_level(), seq_length=400, seed=3, split="validation")
    data.num_samples, data.validation_samples = 100, 0
    with pytest.raises(ConfigError, match=r"mixture\[4\].weight.*num_samples 100"):
        config.validate()
    data.pieces = 4  # an endless stream has each source by its share
    config.validate()


def test_a_validation_smaller_than_its_share_says_so(mixture, capsys):
    data = DataConfig(kind="mixture", mixture=mixture[:2], num_samples=60, validation_samples=600)
    held = Samples(data, small.byte_level(), seq_length=400, seed=3, split="validation")
    count = next(count for source, count in held._parts)
    assert f"{count:,} sequences of 400 for validation (400 were asked for; at most a tenth" in held.described()
    assert len(held) == count + 200
    assert (
        f"books': 2 document(s) of {len(held._parts[0][0]._tokens):,} tokens, {count:,} seq" in capsys.readouterr().err
    )
    own = dataclasses.replace(mixture[0], validation_source=mixture[0].source)
    data = DataConfig(kind="mixture", mixture=(own, mixture[1]), num_samples=60, validation_samples=600)
    held = Samples(data, small.byte_level(), seq_length=400, seed=3, split="validation")
    assert "400 were asked for; no more are there" in held.described()


def test_validation_of_the_varied_wording_is_the_selection_wording(mixture):
    from lawcat_jax.data import wordings

    def starts(split, **options):
        data = DataConfig(kind="passkey", wording="varied", num_samples=30, validation_samples=30, **options)
        samples = Samples(data, small.byte_level(), seq_length=400, seed=3, split=split)
        return {decode(small.byte_level(), samples[i]["tokens"])[:8] for i in range(30)}

    selection = {task[:8] for task in wordings.SELECTION.tasks}
    assert starts("validation") <= selection
    assert not starts("train") & selection
    assert not starts("validation", validation_wording="varied") & selection


def test_packing_is_best_fit_and_complete():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 100, size=2000).tolist()
    rows = pack(sizes.__getitem__, 2000, 100, seed=1)
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(2000))
    assert all(sum(sizes[i] for i in row) <= 100 for row in rows)
    assert len(rows) < 1.05 * sum(sizes) / 100
    assert rows == pack(sizes.__getitem__, 2000, 100, seed=1)
    assert rows != pack(sizes.__getitem__, 2000, 100, seed=2)


def test_packed_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    rows = [{"instruction": f"Count {i}", "input": "" if i % 3 else "x", "output": f"{i} times."} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = small.byte_level()
    data = DataConfig(kind="instruction", source=str(tmp_path / "rows.jsonl"), pack=True, validation_samples=5)
    samples = Samples(data, tokenizer, seq_length=700, seed=0, split="train")
    seen = []
    for index in range(len(samples)):
        row = samples[index]
        length, ids = row["lengths"], row["segment_ids"]
        assert ids.dtype == np.int32
        assert (ids[length:] == 0).all()
        assert (np.diff(ids[:length]) >= 0).all()
        assert ids[0] == 1
        for segment in range(1, ids.max() + 1):
            (at,) = np.nonzero(ids == segment)
            tokens, weights = row["tokens"][at], row["loss_weights"][at]
            assert tokens[0] == tokenizer.bos_token_id
            assert tokens[-1] == tokenizer.eos_token_id
            assert weights[-1] == 0  # the next document's first token is no label
            answer = decode(tokenizer, row["targets"][at][weights > 0])
            assert f"### Instruction:\nCount {answer.split(' ')[0]}\n" in decode(tokenizer, tokens)
            assert row["targets"][at][weights > 0][-1] == tokenizer.eos_token_id
            seen.append(answer)
    assert sorted(seen) == sorted(f"{i} times." for i in range(45))


def test_packed_generated_samples_are_whole():
    tokenizer = small.byte_level()
    data = DataConfig(kind="passkey", wording="varied", min_length_fraction=0.3, num_samples=40, pack=True)
    samples = Samples(data, tokenizer, seq_length=800, seed=0, split="train")
    assert 20 < len(samples) < 34
    rows = [samples[index] for index in range(len(samples))]
    assert sum(int(row["segment_ids"].max()) for row in rows) == 40
    assert np.mean([row["lengths"] for row in rows]) > 640
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            at = row["segment_ids"] == segment
            assert row["tokens"][at][-1] == tokenizer.eos_token_id
            answer = decode(tokenizer, row["targets"][at][row["loss_weights"][at] > 0]).strip()
            assert decode(tokenizer, row["tokens"][at]).count(answer) == 2


def test_packed_text_separates_documents(tmp_path, monkeypatch):
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    lines = [{"text": prose(30, i)} for i in range(200)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = small.byte_level()
    data = DataConfig(kind="text", source=str(tmp_path / "t.jsonl"), pack=True, validation_samples=2)
    row = Samples(data, tokenizer, seq_length=500, seed=0, split="train")[3]
    ends = np.flatnonzero(row["tokens"] == tokenizer.eos_token_id)
    assert len(ends) >= 2
    assert np.flatnonzero(np.diff(row["segment_ids"])).tolist() == [end for end in ends if end < 499]
    assert (row["loss_weights"][ends] == 0).all()
    assert row["loss_weights"].sum() == 500 - len(ends)


@pytest.mark.parametrize("pieces", [2, 5])
def test_pieces_follow_each_other(mixture, pieces):
    tokenizer = small.byte_level()
    data = _config(mixture[1:4], pieces=pieces)
    batches = _take(_make(data), 24)
    assert batches[0]["continues"].dtype == np.bool_
    assert not batches[0]["continues"].any()
    lengths = set()
    for row in range(4):
        starts = [step for step, batch in enumerate(batches) if not batch["continues"][row]]
        for start, end in itertools.pairwise(starts):
            lengths.add(end - start)
            parts = [
                {name: batches[step][name][row] for name in ("tokens", "targets", "loss_weights", "lengths")}
                for step in range(start, end)
            ]
            tokens = np.concatenate([part["tokens"][: part["lengths"]] for part in parts])
            targets = np.concatenate([part["targets"][: part["lengths"]] for part in parts])
            assert np.array_equal(tokens[1:], targets[:-1])  # across the cuts too
            assert tokens[-1] == tokenizer.eos_token_id
            labelled = [part["loss_weights"].max() >= 1 for part in parts]
            assert labelled[-1]
            assert not any(labelled[:-1])
            if end - start > 1:
                weights = np.concatenate([part["loss_weights"][: part["lengths"]] for part in parts])
                answer = decode(tokenizer, targets[(weights >= 1) & (targets != tokenizer.eos_token_id)]).strip()
                assert answer
                last = parts[-1]
                held = last["tokens"][: last["lengths"]][last["loss_weights"][: last["lengths"]] < 1]
                if len(answer) > 3 and any(c.isdigit() for c in answer):  # the needle is in an earlier piece
                    assert answer not in decode(tokenizer, held)
                    assert answer in decode(tokenizer, tokens[: -parts[-1]["lengths"]])
    assert max(lengths) == pieces
    assert _same(_take(_make(data, seed=3), 3), batches[:3])
    assert not _same(_take(_make(data, seed=4), 3), batches[:3])


def test_pieces_of_text_are_running_text(mixture):
    batches = _take(_make(_config(mixture[:1], pieces=3)), 9)
    going_on = 0
    for before, after in itertools.pairwise(batches):
        for row in np.flatnonzero(after["continues"]):
            assert before["targets"][row, -1] == after["tokens"][row, 0]
            assert before["loss_weights"][row, -1] == 0.25
            going_on += 1
    assert going_on > 8
    assert all((batch["lengths"] == 400).all() for batch in batches)
    with pytest.raises(UserError, match="the text has only"):
        _make(_config(mixture[:1], pieces=4000))


def test_cut_parts_needle_and_question():
    rng = np.random.default_rng(0)
    for _ in range(300):
        pieces = int(rng.integers(2, 9))
        size = int(rng.integers(pieces * 20, (pieces - 1) * 100 + 1)) if pieces * 20 < (pieces - 1) * 100 else 60
        question = size - int(rng.integers(10, 20))
        needle = int(rng.integers(5, question + 1))
        document = Document(np.zeros(size, np.int32), np.zeros(size, np.float32), needle, question)
        cuts = cut(document, pieces, 100, rng)
        assert len(cuts) == pieces + 1
        assert cuts[0] == 0
        assert cuts[-1] == size
        assert (np.diff(cuts) > 0).all()
        assert np.diff(cuts).max() <= 100
        assert needle <= cuts[-2] <= question


def test_config_round_trip_and_problems(mixture):
    data = _config(mixture)
    again = from_dict(DataConfig, json.loads(json.dumps(to_dict(data))))
    assert again == data
    assert isinstance(again.mixture[0], MixtureSource)
    bad = StageConfig(
        data=DataConfig(
            kind="mixture",
            mixture=(MixtureSource(kind="text"), MixtureSource(kind="niah", hay="books", weight=-1.0)),
            pieces=1,
            wording="landmark",
        )
    )
    with pytest.raises(ValueError) as problem:
        Config(stage1=bad).validate()
    for part in (
        "stage1.data.mixture[0].source: name a text source",
        "stage1.data.mixture[1].hay_source: name books",
        "stage1.data.mixture[1].weight: -1.0 must not be negative",
        "stage1.data.pieces: 1 must be 0",
        "stage1.data.wording: 'landmark' is not one of",
    ):
        assert part in str(problem.value)
    with pytest.raises(ValueError, match="mixture: name at least one source"):
        Config(stage1=StageConfig(data=DataConfig(kind="mixture"))).validate()

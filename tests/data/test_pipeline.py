"""The grain pipeline: layout of batches, determinism, resuming, process sharding, mixing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lawcat_jax.config import DataConfig
from lawcat_jax.data.pipeline import Samples, make_dataset
from lawcat_jax.data.tokenize import decode, load_tokenizer
from lawcat_jax.errors import UserError
from tests.data import tokenizers as small

PASSKEY = DataConfig(kind="passkey", passkey_words=0, num_samples=20, validation_samples=6)


@pytest.fixture
def text_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.txt"
    file.write_text(" ".join(f"The sky is blue {number}." for number in range(1500)))
    return file


def _take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def _same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


def _make(data=PASSKEY, **options):
    defaults = {"seq_length": 160, "batch_size": 4, "seed": 0}
    return make_dataset(data, small.byte_level(), **(defaults | options))


def test_batch_layout():
    tokenizer = small.byte_level()
    (batch,) = _take(_make(), 1)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "tokens": ((4, 160), np.int32),
        "targets": ((4, 160), np.int32),
        "loss_weights": ((4, 160), np.float32),
        "lengths": ((4,), np.int32),
        "mask": ((4, 160), np.bool_),
    }
    for row in range(4):
        tokens, targets, weights = (batch[name][row] for name in ("tokens", "targets", "loss_weights"))
        length = batch["lengths"][row]
        assert length >= 158
        assert np.array_equal(tokens[1:length], targets[: length - 1])
        assert (tokens[length:] == tokenizer.pad_token_id).all()
        answer = decode(tokenizer, targets[weights > 0])
        assert f"The pass key is {answer}. Remember it." in decode(tokenizer, tokens[:length])
        assert set(weights) == {0.0, 1.0}
        assert weights.sum() == 5
        assert batch["mask"][row].sum() == length - 1  # all but eos
        assert tokens[length - 1] == tokenizer.eos_token_id


def test_the_end_is_a_label_where_it_has_a_weight():
    (batch,) = _take(_make(DataConfig(passkey_words=0, end_weight=0.5, answer_weight=2.0, num_samples=20)), 1)
    for row in range(4):
        length = batch["lengths"][row]
        assert batch["targets"][row, length - 2] == small.byte_level().eos_token_id
        assert batch["loss_weights"][row, length - 2] == 0.5
        assert batch["loss_weights"][row].sum() == 5 * 2.0 + 0.5


def test_loss_weights_of_the_prompt():
    (batch,) = _take(_make(DataConfig(passkey_words=0, prompt_weight=0.25, num_samples=20)), 1)
    length = batch["lengths"][0]
    assert batch["loss_weights"][0].sum() == pytest.approx(5 + 0.25 * (length - 7))  # neither bos nor eos predicted
    (batch,) = _take(_make(DataConfig(passkey_words=0, answer_only=False, num_samples=20)), 1)
    assert batch["loss_weights"][0].sum() == batch["lengths"][0] - 1


def test_same_seed_same_batches_other_seed_others():
    assert _same(_take(_make(), 12), _take(_make(), 12))
    assert not _same(_take(_make(), 3), _take(_make(seed=1), 3))


def test_each_pass_sees_every_sample_once_in_a_new_order():
    rows = [row.tobytes() for batch in _take(_make(), 10) for row in batch["tokens"]]
    first, second = rows[:20], rows[20:]
    assert len(set(first)) == 20
    assert set(first) == set(second)
    assert first != second


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_any_step(workers):
    data = DataConfig(passkey_words=0, num_samples=20, num_workers=workers, min_length_fraction=0.6)
    straight = _take(_make(data), 9)
    for step in (0, 1, 4, 8):
        iterator = iter(_make(data))
        for _ in range(step):
            next(iterator)
        state = iterator.get_state()
        assert state == {"next_index": step}
        resumed = iter(_make(data))
        resumed.set_state(state)
        assert _same(list(itertools.islice(resumed, 9 - step)), straight[step:])


def test_the_number_of_workers_changes_no_batch_also_not_after_resuming():
    def data(workers: int) -> DataConfig:
        return DataConfig(passkey_words=0, num_samples=20, num_workers=workers, min_length_fraction=0.6)

    alone = _take(_make(data(0)), 12)
    for workers in (1, 3, 8):
        assert _same(_take(_make(data(workers)), 12), alone)
    iterator = iter(_make(data(3)))
    for _ in range(5):
        next(iterator)
    for workers in (0, 8):
        resumed = iter(_make(data(workers)))
        resumed.set_state(iterator.get_state())
        assert _same(list(itertools.islice(resumed, 7)), alone[5:])


def test_processes_share_the_global_batches():
    def rows(batches):
        return [sorted(row.tobytes() for row in batch["tokens"]) for batch in batches]

    alone = rows(_take(_make(), 8))
    for count in (2, 4):
        parts = [_take(_make(process_index=p, process_count=count), 8) for p in range(count)]
        assert all(part[0]["tokens"].shape == (4 // count, 160) for part in parts)
        joined = [{"tokens": np.concatenate([p["tokens"] for p in step])} for step in zip(*parts, strict=True)]
        assert rows(joined) == alone
    # and a run may go on with another number of processes
    iterator = iter(_make())
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    resumed = []
    for p in range(2):
        part = iter(_make(process_index=p, process_count=2))
        part.set_state(state)
        resumed.append(next(part))
    assert rows([{"tokens": np.concatenate([part["tokens"] for part in resumed])}]) == alone[3:4]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_validation_is_one_pass_filled_up_with_weightless_rows(count):
    parts = [list(_make(split="validation", repeat=False, process_index=p, process_count=count)) for p in range(count)]
    assert all(len(part) == 2 for part in parts)  # 6 samples in batches of 4
    rows = [row for part in parts for batch in part for row in batch["loss_weights"]]
    assert len(rows) == 8
    assert sum(row.sum() > 0 for row in rows) == 6
    masks = [row for part in parts for batch in part for row in batch["mask"]]
    assert sum(mask.any() for mask in masks) == 6


def test_validation_differs_from_training():
    train = {row.tobytes() for batch in _take(_make(), 5) for row in batch["tokens"]}
    validation = {row.tobytes() for batch in _make(split="validation", repeat=False) for row in batch["tokens"]}
    assert not train & validation


def test_mixed_lengths():
    data = DataConfig(passkey_words=0, num_samples=200, min_length_fraction=0.5)
    lengths = np.concatenate([batch["lengths"] for batch in _take(_make(data, seq_length=300), 50)])
    assert lengths.min() < 175
    assert lengths.max() > 285
    assert lengths.max() <= 300


def test_the_word_form_needs_room():
    with pytest.raises(UserError, match=r"seq_length 160 is too short for passkey_words 870.*\d+ tokens"):
        _make(DataConfig(passkey_words=870, num_samples=20))
    (batch,) = _take(_make(DataConfig(passkey_words=38, num_samples=20), seq_length=256), 1)
    assert np.ptp(batch["lengths"]) <= 2
    with pytest.raises(UserError, match="too short for its frame"):
        _make(seq_length=40)


def test_text_batches(text_file):
    tokenizer = small.byte_level()
    data = DataConfig(kind="text", source=str(text_file), text_weight=0.5, validation_samples=5)
    samples = Samples(data, tokenizer, seq_length=64, seed=0, split="train")
    first = samples[0]
    assert first["tokens"][0] == tokenizer.bos_token_id
    assert decode(tokenizer, first["tokens"]).startswith("The sky is blue 0. The sky is blue 1.")
    assert np.array_equal(first["tokens"][1:], first["targets"][:-1])
    assert (first["loss_weights"] == 0.5).all()
    assert first["lengths"] == 64
    (batch,) = _take(_make(data, seq_length=64), 1)
    assert batch["tokens"].shape == (4, 64)
    # the last sequences are held out
    held = Samples(data, tokenizer, seq_length=64, seed=0, split="validation")
    assert len(held) == 5
    train = {samples[i]["tokens"].tobytes() for i in range(len(samples))}
    assert not train & {held[i]["tokens"].tobytes() for i in range(5)}
    assert "blue 1499." in decode(tokenizer, held[4]["tokens"]) or "blue 149" in decode(tokenizer, held[4]["tokens"])


def test_separate_validation_text(text_file, tmp_path):
    other = tmp_path / "v.txt"
    other.write_text("Here we go. " * 300)
    data = DataConfig(kind="text", source=str(text_file), validation_source=str(other), validation_samples=3)
    held = Samples(data, small.byte_level(), seq_length=64, seed=0, split="validation")
    assert len(held) == 3
    assert "Here we go." in decode(small.byte_level(), held[2]["tokens"])


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_passkey_share_of_a_text(text_file, fraction):
    data = DataConfig(kind="text", source=str(text_file), passkey_fraction=fraction, text_weight=0.1, num_samples=40)
    samples = Samples(data, small.byte_level(), seq_length=160, seed=0, split="train")
    kinds = [samples[i]["loss_weights"].max() == 1.0 for i in range(len(samples))]
    assert np.mean(kinds) == pytest.approx(fraction, abs=0.02)
    assert _same(_take(_make(data), 4), _take(_make(data), 4))
    if fraction == 0.5:  # the two kinds are mixed within batches
        batches = _take(_make(data), 10)
        shares = [np.mean(batch["loss_weights"].max(axis=1) == 1.0) for batch in batches]
        assert 0.2 < np.mean(shares) < 0.8


def test_bad_requests(text_file):
    with pytest.raises(UserError, match="not divisible by the 3 processes"):
        _make(process_count=3)
    with pytest.raises(UserError, match="not one of 'train'"):
        _make(split="test")
    with pytest.raises(UserError, match="name a text source"):
        _make(DataConfig(kind="text"))
    with pytest.raises(UserError, match="do not fill one sequence"):
        _make(DataConfig(kind="text", source=str(text_file)), seq_length=10**6)


def test_no_validation(text_file):
    data = DataConfig(kind="text", source=str(text_file), validation_samples=0)
    assert len(Samples(data, small.byte_level(), seq_length=64, seed=0, split="train")) > 100
    with pytest.raises(UserError, match="validation split has no samples"):
        _make(data, split="validation", repeat=False)
    (tmp := text_file.with_name("b.txt")).write_text("The sky is blue. " * 12)
    with pytest.raises(UserError, match="single sequence"):
        _make(DataConfig(kind="text", source=str(tmp)), seq_length=40)


def test_files_that_are_trained_and_validated_on_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    for folder, names in {"train": "ab", "other": "cd", "mixed": "ce"}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.txt").write_text("The sky is blue. Here we go. " * 20 + name)
    (tmp_path / "mixed" / "again.txt").write_text((tmp_path / "train" / "b.txt").read_text())
    for folder, said in (("other", 0), ("mixed", 1)):
        data = DataConfig(kind="text", source=str(tmp_path / "train"), validation_source=str(tmp_path / folder))
        for _ in range(2):
            make_dataset(data, small.byte_level(), seq_length=16, batch_size=2, seed=0, split="validation")
        lines = [line for line in capsys.readouterr().err.splitlines() if "validation_source" in line]
        assert len(lines) == said
    assert "1 of 3 file(s) are trained on as well" in lines[0]
    assert "again.txt" in lines[0]


@pytest.mark.parametrize(("kind", "length"), [("passkey", 256), ("niah", 512)])
def test_packing_cuts_no_sample_that_is_longer_than_drawn(kind, length):
    """A sample whose drawn length is below its frame takes what the frame needs."""
    options = {"passkey_words": 0, "wording": "paper"} if kind == "passkey" else {"wording": "varied"}
    data = DataConfig(
        kind=kind, pack=True, min_length_fraction=0.1, num_samples=60, validation_samples=5, answer_weight=2.0,
        end_weight=0.5, **options,
    )  # fmt: skip
    samples = Samples(data, load_tokenizer("asset:tiny_llama"), seq_length=length, seed=0, split="train")
    weights = np.concatenate([samples[row]["loss_weights"] for row in range(len(samples))])
    assert (weights == 0.5).sum() == 60  # the end of each sample

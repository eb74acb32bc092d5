"""Tokenizer loading, incremental decoding, and the trainer of the small tokenizer."""

from __future__ import annotations

import json

import pytest

from lawcat_jax.data import train_tokenizer as trainer
from lawcat_jax.data.passkey import HAY, QUESTION
from lawcat_jax.data.tokenize import (
    StreamDecoder,
    adds_bos,
    bos_rule,
    decode,
    decode_behind,
    encode,
    encode_behind,
    encode_many,
    encode_offsets,
    encode_prompt,
    load_tokenizer,
    opening,
    set_bos_rule,
    stream_text,
)
from lawcat_jax.errors import UserError
from tests.data import tokenizers as small

TEXT = "The sky is blue. naïve café — 東京 🙂 ok 12345\n\nThe end"


def test_byte_level_stream_gives_whole_characters():
    tokenizer = small.byte_level()
    ids = encode(tokenizer, TEXT)
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 20  # it does stream


def test_metaspace_stream_keeps_spaces():
    tokenizer = small.metaspace()
    text = "The sky is blue. The sun is yellow."
    prompt, rest = encode(tokenizer, text)[:4], encode(tokenizer, text)[4:]
    streamed = "".join(stream_text(tokenizer, rest, context=prompt))
    assert decode(tokenizer, prompt) + streamed == text
    assert streamed.startswith(" ") or not decode(tokenizer, rest).startswith(" ")


@pytest.mark.parametrize("name", ["byte_level", "metaspace", "metaspace_first", "prepending"])
def test_texts_go_on_behind_others(name):
    """Without a space of their own, in tokens and in text."""
    tokenizer = getattr(small, name)()
    for before, text in (
        ("the cat", " sat on"),
        ("the c", "at sat"),
        ("the", "  mat."),
        ("a", ".\n" if name == "byte_level" else "t"),
    ):
        ids = encode_behind(tokenizer, text)
        first = encode(tokenizer, before)
        assert decode(tokenizer, [*first, *ids], special=True) == before + text
        assert decode_behind(tokenizer, encode(tokenizer, " sat"), first).strip() == "sat"
        if text.startswith(" sat"):
            assert [*first, *ids] == encode(tokenizer, before + text)
    with_space = name != "byte_level"
    assert (decode_behind(tokenizer, encode(tokenizer, "at"), encode(tokenizer, "the")) == " at") == with_space


def test_the_context_of_a_stream_is_one_that_shows():
    tokenizer = small.metaspace_first()
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = encode(tokenizer, "the cat")
    assert decode_behind(tokenizer, ids, [*ids, *[mark] * 20]) == " the cat"
    assert decode_behind(tokenizer, ids, [mark] * 20) == "the cat"


def test_stream_flushes_an_incomplete_character():
    tokenizer = small.byte_level()
    decoder = StreamDecoder(tokenizer)
    first_byte_of_emoji = encode(tokenizer, "\U0001f9ff")[0]
    assert decoder.push(first_byte_of_emoji) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_stream_splits_after_any_prefix():
    tokenizer = small.byte_level()
    ids = encode(tokenizer, TEXT)
    for cut in range(len(ids)):
        head, tail = ids[:cut], ids[cut:]
        if not decode(tokenizer, head).endswith("\ufffd"):
            assert decode(tokenizer, head) + "".join(stream_text(tokenizer, tail, context=head)) == TEXT


def test_trained_tokenizer_round_trip(tmp_path):
    tokenizer = small.byte_level()
    target = trainer.save_tokenizer(tokenizer, tmp_path / "tok")
    loaded = load_tokenizer(target)
    assert encode(loaded, TEXT) == encode(tokenizer, TEXT)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == trainer.SPECIAL_TOKENS
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    assert loaded("a")["input_ids"] == encode_prompt(loaded, "a")  # the template adds bos
    assert decode(loaded, encode(loaded, TEXT)) == TEXT
    digits = encode(loaded, f"{QUESTION}12345")[-5:]
    assert [decode(loaded, [token]) for token in digits] == list("12345")
    assert len(encode(loaded, HAY)) <= 30  # the frame was part of the training text
    assert json.loads((target / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not list(tmp_path.glob(".tok*"))
    # again, into the existing directory: other files stay
    (target / "keep.txt").write_text("x")
    trainer.save_tokenizer(tokenizer, target)
    assert (target / "keep.txt").exists()


@pytest.mark.parametrize("name", ["config.json", "model.json", "model.safetensors", "../model.json"])
def test_the_tokenizer_of_a_model_is_not_replaced(name, tmp_path):
    target = tmp_path / "tokenizer"
    target.mkdir()
    trainer.check_tokenizer_target(target)
    (target / name).write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"is a model's, whose tokenizer is not replaced"):
            trainer.check_tokenizer_target(target, overwrite=overwrite)


def test_an_earlier_tokenizer_is_replaced_on_demand_only(tmp_path):
    trainer.save_tokenizer(small.byte_level(), tmp_path / "t")
    with pytest.raises(UserError, match=r"t' holds a tokenizer; pass --overwrite to replace it"):
        trainer.check_tokenizer_target(tmp_path / "t")
    trainer.check_tokenizer_target(tmp_path / "t", overwrite=True)


def test_training_is_deterministic():
    again = trainer.train_tokenizer(small.TEXTS, vocab_size=420, passkey_repeats=20)
    assert again.backend_tokenizer.to_str() == small.byte_level().backend_tokenizer.to_str()


def test_bad_tokenizer_sources(tmp_path):
    with pytest.raises(UserError, match="no such embedded asset"):
        load_tokenizer("asset:nothing")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="too small"):
        trainer.train_tokenizer([], vocab_size=100)
    with pytest.raises(UserError, match="not a directory"):
        trainer.save_tokenizer(small.byte_level(), tmp_path / "tokenizer.json")


def test_bare_tokenizer_file(tmp_path):
    small.byte_level().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token_id == 1
    assert encode(loaded, TEXT) == encode(small.byte_level(), TEXT)


def test_truncation_padding_and_dropout_of_a_saved_tokenizer_are_switched_off(tmp_path):
    tokenizer = small.byte_level()
    expected = encode(tokenizer, TEXT)
    for name, keep in (("with_config", True), ("bare", False)):
        target = trainer.save_tokenizer(tokenizer, tmp_path / name)
        values = json.loads((tmp_path / name / "tokenizer.json").read_text())
        values["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        padding = {"strategy": {"Fixed": 300}, "direction": "Left", "pad_to_multiple_of": None}
        values["padding"] = padding | {"pad_id": 2, "pad_type_id": 0, "pad_token": "<|pad|>"}
        values["model"]["dropout"] = 0.9
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(values))
        if not keep:
            (tmp_path / name / "tokenizer_config.json").unlink()
        loaded = load_tokenizer(target)
        assert encode(loaded, TEXT) == expected
        assert encode_many(loaded, [TEXT, "a"]) == [expected, encode(tokenizer, "a")]
        assert encode_offsets(loaded, TEXT).ids == expected


def test_special_tokens_that_only_the_map_names(tmp_path):
    """As transformers finds them: the map counts, alone and over tokenizer_config.json."""
    import transformers

    target = trainer.save_tokenizer(small.byte_level(), tmp_path / "tok")
    config = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    named = {"bos_token": "<|bos|>", "eos_token": {"content": "<|pad|>", "lstrip": False}}
    (tmp_path / "tok" / "special_tokens_map.json").write_text(json.dumps(named))
    (tmp_path / "tok" / "tokenizer_config.json").unlink()
    for others in (None, {"tokenizer_class": "PreTrainedTokenizerFast"}, config):
        if others is not None:
            (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(others))
        loaded, reference = load_tokenizer(target), transformers.AutoTokenizer.from_pretrained(str(target))
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(loaded, role) == getattr(reference, role)
        assert loaded.bos_token == "<|bos|>"


def test_bos_follows_the_tokenizer_and_is_never_double():
    """auto gives what transformers gives for a prompt."""
    for make, adds in ((small.byte_level, True), (small.metaspace, False), (small.byte_level_merged_digits, False)):
        tokenizer = make()
        assert adds_bos(tokenizer) is adds
        assert encode_prompt(tokenizer, "The sky is", add_bos="auto") == tokenizer("The sky is").input_ids
        bos, plain = tokenizer.bos_token_id, encode(tokenizer, "The sky is")
        assert encode_prompt(tokenizer, "The sky is", add_bos="always") == [bos, *plain]
        assert encode_prompt(tokenizer, "The sky is", add_bos="never") == plain
        for rule in ("auto", "always", True):
            twice = encode_prompt(tokenizer, tokenizer.bos_token + "The sky is", add_bos=rule)
            assert twice.count(bos) == 1
    assert opening(small.byte_level(), False) == []
    tokenizer = load_tokenizer("asset:tiny_llama")
    assert adds_bos(tokenizer)  # so the default gives the tiny demo the tokens that it has always had
    assert bos_rule(tokenizer) == "auto"
    assert bos_rule(set_bos_rule(tokenizer, "never")) == "never"

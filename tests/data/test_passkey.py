"""Passkey samples: golden text, label spans, lengths, and the published evaluation prompts byte for byte."""

from __future__ import annotations

import numpy as np
import pytest

from lawcat_jax.data import passkey
from lawcat_jax.data.tokenize import decode, encode
from lawcat_jax.errors import UserError
from tests.data import tokenizers as small

GREEN = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INTRO = (
    "There is an important piece of info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
GOLDEN = [("01537", 4), ("82643", 6), ("95394", 5)]


@pytest.fixture(params=list(small.ALL))
def tokenizer(request):
    return small.ALL[request.param]()


def _train_rng(index, seed=0):
    return passkey.sample_rng("train", seed, index)


def test_the_870_word_form_is_the_authors_text():
    sample = passkey.PasskeyGenerator(small.byte_level()).sample_words(_train_rng(3), 870)
    intro, hay, question = sample.text.split("\n")
    assert intro == INTRO
    assert question == f"What is the pass key? The pass key is {sample.answer}"
    needle = f"The pass key is {sample.answer}. Remember it."
    before, after = hay.split(needle)
    assert before.endswith(" ")
    assert after.startswith(" ")
    assert before.rstrip() + after == " ".join([GREEN] * 46)
    assert len((before + after).split()) == 874
    assert len(sample.answer) == 5
    assert sample.answer.isdigit()


def test_golden_samples_do_not_change():
    generator = passkey.PasskeyGenerator(small.byte_level())
    seen = []
    for index in range(3):
        sample = generator.sample_words(_train_rng(index), 19)
        words = sample.text.split("\n")[1].split(" ")
        seen.append((sample.answer, words.index("pass") - 1))
    assert seen == GOLDEN  # (key, words before the needle): a change here changes every published run


def test_needle_position_is_uniform_over_the_gaps_between_words():
    generator = passkey.PasskeyGenerator(small.byte_level())
    places = [
        generator.sample_words(_train_rng(i), 1).text.split("\n")[1].split(" ").index("pass") - 1 for i in range(600)
    ]
    counts = np.bincount(places, minlength=20)
    assert counts[0] == 0
    assert counts[19] == 0  # always between two words
    assert counts[1:19].min() > 12  # 33 expected


@pytest.mark.parametrize("max_tokens", [None, 300, 700])
def test_label_span_decodes_to_the_answer(tokenizer, max_tokens):
    generator = passkey.PasskeyGenerator(tokenizer)
    for index in range(30):
        if max_tokens is None:
            sample = generator.sample_words(_train_rng(index), 30)
        else:
            sample = generator.sample_tokens(_train_rng(index), max_tokens)
        assert passkey.answer_text(sample, tokenizer) == sample.answer
        assert sample.tokens[0] == tokenizer.bos_token_id
        assert sample.tokens[-1] == tokenizer.eos_token_id
        assert sample.answer_end == len(sample.tokens) - 1
        # one tokenizer call on the whole string
        assert sample.tokens[1:-1].tolist() == encode(tokenizer, sample.text)
        assert decode(tokenizer, sample.prompt).rstrip().endswith("The pass key is")


def test_length_in_tokens_is_as_long_as_words_allow(tokenizer):
    generator = passkey.PasskeyGenerator(tokenizer)
    for length in (*range(260, 300, 7), 1000, 4096):
        for index in range(4):
            sample = generator.sample_tokens(_train_rng(index), length)
            assert len(sample.tokens) <= length
            hay = sample.text.split("\n")[1].split(" ")
            next_word = GREEN.split(" ")[(len(hay) - 7) % 19]  # the needle has 7 words
            longer = sample.text.replace("\nWhat is", f" {next_word}\nWhat is")
            assert len(encode(tokenizer, longer)) + 2 > length, "one more word of hay would have fitted"


def test_one_tokenizer_call_a_sample(monkeypatch):
    generator = passkey.PasskeyGenerator(small.byte_level())
    generator.sample_tokens(_train_rng(0), 300)  # measures the tokenizer
    calls = []
    original = passkey.encode_offsets
    monkeypatch.setattr(passkey, "encode_offsets", lambda *args: calls.append(1) or original(*args))
    for index in range(20):
        generator.sample_tokens(_train_rng(index), 4096)
    assert len(calls) == 20


def test_too_short_a_length_names_the_minimum(tokenizer):
    generator = passkey.PasskeyGenerator(tokenizer)
    minimum = generator.minimum_tokens
    with pytest.raises(UserError, match=r"too short.*minimum is \d+ tokens"):
        generator.sample_tokens(_train_rng(0), 40)
    assert len(generator.sample_tokens(_train_rng(0), minimum + 2).tokens) <= minimum + 2
    # a shorter target than the frame gives the shortest sample instead
    short = generator.sample_tokens(_train_rng(0), 500, target_tokens=10)
    assert len(short.tokens) <= minimum + 2


def test_streams_never_share_a_state():
    draws = {
        (s, i): passkey.sample_rng(s, seed, i).random()
        for s in ("train", "validation", "eval")
        for i in range(50)
        for seed in (0,)
    }
    assert len(set(draws.values())) == len(draws)
    # a seed that equals another stream's seed makes no difference
    train = passkey.sample_rng("train", 1_000_003, 7).random(4)
    evaluation = passkey.sample_rng("eval", 1_000_003, 7).random(4)
    assert not np.array_equal(train, evaluation)


def _reference_prompt(n, j):
    """The published script, written out again: global seeding included."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(j)  # noqa: NPY002
    prefix = np.random.randint(0, n)  # noqa: NPY002
    key = np.random.randint(1, 50000)  # noqa: NPY002
    np.random.set_state(state)  # noqa: NPY002
    endless = " ".join(
        ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * 5000
    )
    lines = [
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.",
        endless[:prefix],
        f"The pass key is {key}. Remember it. {key} is the pass key.",
        endless[: n - prefix],
        "What is the pass key? The pass key is",
    ]
    return "\n".join(lines), str(key)


def test_landmark_prompts_equal_the_reference_byte_for_byte():
    assert passkey.landmark_characters(0) == 3072
    assert [passkey.landmark_characters(i) for i in (1, 2, 31)] == [7168, 10240, 119808]
    for i in (0, 1, 7, 31):
        n = 1024 * int((i + 1) * 3750 // 1024)
        for j in (0, 1, 2, 9, 49):
            expected, key = _reference_prompt(n, j)
            prompt, answer = passkey.landmark_prompt(n, j)
            assert prompt.encode() == expected.encode()
            assert answer == key


def test_landmark_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    passkey.landmark_prompt(5000, 3)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_landmark_by_tokens_fits_closely(tokenizer):
    for length in (400, 1000, 3000):
        for j in range(6):
            sample = passkey.landmark_sample_tokens(tokenizer, length, j)
            whole = len(encode(tokenizer, f"{sample.text} {sample.answer}")) + 1
            assert length - 12 <= whole <= length
            assert sample.text.endswith("The pass key is")
            hay = len("".join(sample.text.split("\n")[i] for i in (1, 3)))
            assert sample.text == passkey.landmark_prompt(hay, j)[0]
    with pytest.raises(UserError, match="minimum is"):
        passkey.landmark_sample_tokens(tokenizer, 30, 0)
    with pytest.raises(UserError, match="at least 1 character"):
        passkey.landmark_prompt(0, 0)


def test_unknown_form():
    with pytest.raises(UserError, match="not one of"):
        passkey.eval_samples(small.byte_level(), form="other", length=300, samples=1, seed=0)


def test_slow_tokenizer_is_refused():
    class Slow:
        eos_token_id = bos_token_id = 0
        name_or_path = "slow"

    with pytest.raises(UserError, match="character offsets"):
        passkey.PasskeyGenerator(Slow()).sample_tokens(_train_rng(0), 100)

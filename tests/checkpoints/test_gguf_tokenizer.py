"""Tokenizers of GGUF files against the tokenizers that they were written from, and against transformers."""

import json
import random

import pytest

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers  # noqa: E402

from lawcat_jax.checkpoints.gguf.file import GgufFile  # noqa: E402
from lawcat_jax.checkpoints.gguf.tokenizer import write_tokenizer  # noqa: E402
from lawcat_jax.data.tokenize import load_tokenizer  # noqa: E402

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
_WORDS = [
    word
    for line in (
        "hello the THE we're it'S I'LL don't def f(x): return x**2 import numpy as np; for i in range(10): naïve ünï",
        "Straße 日本語 中文 한국어 русский Ελληνικά עברית العربية हिन्दी 👍 👨‍👩‍👧 e\u0301 ½ ² Ⅷ ٣ 1 12 123 4567 3.14159 1e-5",
        "<tag> </tag> {'a': [1, 2]} -- ... !? #include //comment https://example.org/a?b=c&d=1 $100 50% a_b CamelCase",
    )
    for word in line.split()
]
_GAPS = ["", " ", " ", " ", " ", "  ", "   ", "\t", "\n", "\n\n", " \n ", "\r\n", "\u00a0", "\u3000", "    \t"]


def lines(count: int, special: tuple[str, ...] = (), seed: int = 0) -> list[str]:
    """Lines of words, code, digits, many scripts and many kinds of white space, the same on every call."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        text = ""
        for _ in range(draw.randint(1, 16)):
            kind = draw.random()
            if kind < 0.06 and special:
                text += draw.choice(special)
            elif kind < 0.12:
                text += "".join(chr(draw.choice((draw.randint(32, 126), draw.randint(160, 0x2FFF)))) for _ in range(4))
            elif kind < 0.2:
                text += str(draw.randint(0, 10 ** draw.randint(1, 9)))
            else:
                text += draw.choice(_WORDS)
            text += draw.choice(_GAPS)
        made.append(text)
    return made


def trained(steps, normalizer=None, whole=False):
    """A byte-level BPE of some hundred merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(3000, seed=1), trainer)
    return tokenizer


def written(path, tokens, types, **extra):
    """A GGUF file with a tokenizer alone, its files made, and the tokenizer loaded from them."""
    writer = gguf.GGUFWriter(str(path / "t.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in extra.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = path / "tokenizer"
    out.mkdir()
    write_tokenizer(path / "t.gguf", GgufFile(path / "t.gguf").metadata, out)
    return load_tokenizer(out)


def parts(tokenizer):
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern):
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False)]


# How the models' own tokenizer.json files cut text, in the form that each of them has.
RULES = {
    "gpt-2": ([byte_level(True)], None, False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), byte_level(True)], None, False),
    "llama-bpe": (
        split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ),
        None,
        True,
    ),
    "qwen2": (
        split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ),
        tokenizers.normalizers.NFC(),
        False,
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_byte_level_ids_equal_the_original(rule, tmp_path):
    original = trained(*RULES[rule])
    tokens, merges = parts(original)
    types = [CONTROL if token in ("<|bos|>", "<|eos|>") else NORMAL for token in tokens]
    ours = written(
        tmp_path,
        tokens,
        types,
        tokenizer_model="gpt2",
        tokenizer_pre=rule,
        token_merges=merges,
        bos_token_id=tokens.index("<|bos|>"),
        eos_token_id=tokens.index("<|eos|>"),
        chat_template="{{ messages[0]['content'] }}",
    )
    for text in lines(2000, ("<|bos|>", "<|eos|>")):
        ids = ours.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == original.encode(text, add_special_tokens=False).ids, repr(text)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|bos|>", "<|eos|>", None)
    assert ours.chat_template == "{{ messages[0]['content'] }}"
    assert ours.model_max_length == 64
    # Llama 3 puts bos in front although its files do not say so.
    assert (ours("a").input_ids[0] == ours.bos_token_id) == (rule == "llama-bpe")
    text = "Straße 日本語  12\n"
    assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (True, False), (False, False)])
def test_bos_and_eos_are_added_as_the_file_says(bos, eos, tmp_path):
    tokens, merges = parts(trained([byte_level(True)]))
    ours = written(
        tmp_path,
        tokens,
        [NORMAL] * len(tokens),
        tokenizer_model="gpt2",
        tokenizer_pre="llama-bpe",
        token_merges=merges,
        bos_token_id=0,
        eos_token_id=1,
        add_bos_token=bos,
        add_eos_token=eos,
    )
    ids = ours("hello").input_ids
    assert (ids[0] == 0, ids[-1] == 1) == (bos, eos)
    assert ours.encode("hello", add_special_tokens=False) == ids[bos : len(ids) - eos]


def test_user_defined_tokens_stay_whole_and_are_not_special(tmp_path):
    tokens, merges = parts(trained([byte_level(True)]))
    tokens += ["<think>", "   "]
    ours = written(
        tmp_path,
        tokens,
        [NORMAL] * (len(tokens) - 2) + [USER_DEFINED] * 2,
        tokenizer_model="gpt2",
        tokenizer_pre="gpt-2",
        token_merges=merges,
    )
    ids = ours("a<think>b   c").input_ids
    assert len(tokens) - 2 in ids
    assert len(tokens) - 1 in ids
    assert ours.decode(ids, skip_special_tokens=True) == "a<think>b   c"
    assert len(ours) == len(tokens)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_equal_transformers(prefix, tmp_path):
    import transformers

    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    base = tokenizers.Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.Metaspace()
    base.train_from_iterator(lines(3000, seed=1), trainer)
    pieces, merges = parts(base)
    learned = ["".join(merge.split(" ")) for merge in merges]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(learned)]
    tokens += [piece for piece in pieces if piece not in set(tokens)]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(tokens) - 259)
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
    extra = {} if prefix else {"add_space_prefix": False}
    ours = written(
        tmp_path,
        tokens,
        types,
        tokenizer_model="llama",
        token_scores=scores,
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
        **extra,
    )
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    if not prefix:  # transformers ignores add_space_prefix of the file
        reference.backend_tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        reference.backend_tokenizer.pre_tokenizer = None
    for text in lines(1500):
        expected = reference.backend_tokenizer.encode(text.strip(), add_special_tokens=False).ids
        assert ours.backend_tokenizer.encode(text.strip(), add_special_tokens=False).ids == expected, repr(text)
    assert ours("a").input_ids[0] == 1
    text = "hello  日本語\t12"
    assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == text

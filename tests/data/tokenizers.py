"""Small tokenizers of the two common families, trained in a moment."""

from __future__ import annotations

import copy
import functools

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lawcat_jax.data.train_tokenizer import passkey_sentences, train_tokenizer

TEXTS = [
    *passkey_sentences(),
    "It was the best of times, it was the worst of times.",
    "héllo wörld — naïve café 東京 🙂",
    "0 1 2 3 4 5 6 7 8 9 12 23 34 45 56 67 78 89 90",
]


def byte_level():
    """Byte-level BPE with single digits, as the embedded teacher's tokenizer. The caller's own: a BOS rule set on it is not seen
    by other tests."""
    return copy.copy(_byte_level())


def byte_level_merged_digits():
    """Byte-level BPE that merges digits (and so cuts a key into uneven tokens)."""
    return copy.copy(_byte_level_merged_digits())


@functools.cache
def _byte_level():
    return train_tokenizer(TEXTS, vocab_size=420, passkey_repeats=20)


@functools.cache
def _byte_level_merged_digits():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    numbers = [f" {number} {number * 7}" for number in range(10, 1000)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 20 + numbers, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@functools.cache
def metaspace():
    """Unigram with a prefix space and byte fallback off, as SentencePiece tokenizers."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([*TEXTS * 20, *(f"{number}" for number in range(3000))], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@functools.cache
def metaspace_first():
    """Unigram of 420 tokens, whose prefix space stands at the beginning of a text only, and whose decoder takes one space from
    the beginning, as those of Llama 2 and Mistral."""
    backend = Tokenizer(models.Unigram(_PIECES, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = _strip()
    return _sentencepiece(backend)


@functools.cache
def prepending():
    """The same, where the normalizer puts the space in front, behind every special token too, as that of Llama 1."""
    backend = Tokenizer(models.Unigram(_PIECES, unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = _strip()
    return _sentencepiece(backend)


@functools.cache
def characters(count=420):
    """A token a character, so that any tokens are those of their text; the last one is the end token ``</s>``."""
    letters = [chr(i) for i in (*range(32, 127), 10)]
    letters += [chr(0x4E00 + i) for i in range(count - len(letters))]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


_LETTERS = "abcdefhimnorst"
_WORDS = ("▁the", "▁cat", "▁sat", "▁on", "▁a", "▁mat", "at", "he", "▁", *_LETTERS, *"[]:.")
_PAIRS = [f"{space}{a}{b}" for a in _LETTERS for b in _LETTERS for space in ("▁", "")]
_PIECES = [
    *((name, -20.0) for name in ("<unk>", "<s>", "</s>")),
    *((word, -5.0 if len(word) == 1 else -4.0) for word in _WORDS),
    *((pair, -15.0) for pair in _PAIRS if pair not in _WORDS),
][:419]


def _strip():
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(parts)


def _sentencepiece(backend):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return tokenizer


ALL = {"byte_level": byte_level, "byte_level_merged_digits": byte_level_merged_digits, "metaspace": metaspace}

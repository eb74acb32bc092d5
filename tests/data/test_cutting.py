"""Long documents: in pieces or whole, their ids are those of the whole document."""

from __future__ import annotations

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lawcat_jax.data import cutting, text
from lawcat_jax.data.cutting import cutter
from lawcat_jax.data.tokenize import encode
from tests.data import tokenizers as small
from tests.data.texts import prose


def sentencepiece(vocabulary: str, **added):
    """As Llama 2's: no pre-tokenizer, spaces are a letter of their own, one in front of every text."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *dict.fromkeys(vocabulary.replace(" ", ""))]
    merges = [("▁", token) for token in tokens[4:]]
    tokens += [a + b for a, b in merges]
    model = models.BPE({token: index for index, token in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if added:
        made.add_tokens([tokenizers.AddedToken(**added)])
    return made


def bytes_with_added(token: str):
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(small.byte_level().backend_tokenizer.to_str()),
        eos_token="<|eos|>",
    )
    made.add_tokens([tokenizers.AddedToken(token, rstrip=True)])
    return made


def words():
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "old": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def phrases():
    """Byte-level BPE whose merges go on over spaces."""
    made = tokenizers.Tokenizer.from_str(small.byte_level().backend_tokenizer.to_str())
    vocabulary = made.get_vocab(with_added_tokens=False)
    vocabulary |= {"eĠ": len(vocabulary) + 9}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("e", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")


PROSE = prose(300)
TEXTS = {
    "prose": PROSE,
    "no space": "東京" * 400,
    "no letters": "1 2 3, " * 200,
    "one space": "x" * 300 + " " + "y" * 300,
    "two spaces": PROSE.replace(" ", "  "),
    "newlines": PROSE.replace(" ", "\n"),
    "unknown letters": "ꙮ " * 400,
    "fillers": "\u3164 \u3164 " * 200,
    "the end": PROSE.replace("the", "THE END"),
}
CUT = {
    **small.ALL,
    "sentencepiece": lambda: sentencepiece(PROSE),
    "words": words,
}
WHOLE = {
    "a token with a space": lambda: bytes_with_added("THE END"),
    "a token that eats a space": lambda: bytes_with_added("END"),
    "a word as a token": lambda: sentencepiece(PROSE, content="END"),
    "phrases": phrases,
    "no sign for a space": lambda: _without_space(),
}


def _without_space():
    made = sentencepiece(PROSE)
    backend = made.backend_tokenizer
    backend.normalizer = normalizers.Replace(" ", "☃")  # unknown, so that it joins unknown letters
    return made


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_pieces_have_the_ids_of_the_whole(name, monkeypatch):
    tokenizer = (CUT | WHOLE)[name]()
    monkeypatch.setattr(cutting, "PIECE", 100)
    cut = cutter(tokenizer)
    for kind, document in TEXTS.items():
        ids = [token for piece in cut(document) for token in encode(tokenizer, piece)]
        assert ids == encode(tokenizer, document), kind
    assert (len(cut(PROSE)) > 5) == (name in CUT)


def test_the_rule_is_needed():
    """What is cut although it must not be has other ids."""
    tokenizer = sentencepiece(PROSE)
    assert encode(tokenizer, "thethe") != encode(tokenizer, "the") + encode(tokenizer, "the")
    for name, (left, right) in {
        "a token with a space": ("THE", " END"),
        "a token that eats a space": ("END", " the"),
        "phrases": ("the", " old"),
    }.items():
        tokenizer = WHOLE[name]()
        assert encode(tokenizer, left + right) != encode(tokenizer, left) + encode(tokenizer, right), name


@pytest.mark.parametrize("kind", ["prose", "no space"])
@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_long_documents_leave_no_trace_in_the_tokens(name, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cutting, "PIECE", 100)
    tokenizer = small.ALL[name]()
    (tmp_path / "a.txt").write_text(TEXTS[kind])
    tokens = text.load_tokens(str(tmp_path / "a.txt"), tokenizer)
    assert tokens.tolist() == [*encode(tokenizer, TEXTS[kind]), tokenizer.eos_token_id]

"""Tokenizers: loading, encoding with character offsets, and incremental decoding for streams.

Special tokens are never left to a tokenizer's template: :func:`encode` adds none, and callers put bos and
eos where the data format wants them. So every tokenizer family gives the same sample layout.

A tokenizer may know tokens that the model has no embedding for (added after training, never trained). One rule holds
everywhere: :func:`fit_embedding` accepts it as long as they are added ones, and encoding a text that holds one is an error.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lawcat_jax.config.choices import Bos
from lawcat_jax.errors import UserError
from lawcat_jax.files import read_in_one_line
from lawcat_jax.runtime import network

Tokenizer = Any  # transformers.PreTrainedTokenizerBase; transformers is imported only where a tokenizer is loaded

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_ROLES = ("tokenizer_config.json", "special_tokens_map.json")  # the files that say which tokens are special


def load_tokenizer(source: str | os.PathLike, *, revision: str | None = None) -> Tokenizer:
    """Load a tokenizer from a directory (also a model directory), ``asset:<name>`` or a Hugging Face hub id.

    Special tokens are those that transformers finds (tokenizer_config.json, special_tokens_map.json). Truncation, padding and
    dropout of merges, which some tokenizer.json files were saved with, are switched off.

    Raises:
      UserError: when nothing usable is found; the message names the source.
    """
    with read_in_one_line(os.fspath(source)):
        return _load(os.fspath(source), revision)


def _load(name: str, revision: str | None) -> Tokenizer:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": it is not needed here
    import transformers

    if name.startswith("asset:"):
        path = _ASSETS / name.removeprefix("asset:")
        if not path.is_dir():
            raise UserError(f"tokenizer {name!r}: no such embedded asset (looked in {path})")
        name = str(path)
    if (Path(name) / "model.json").exists():
        name = str(Path(name) / "tokenizer")  # a model directory keeps its tokenizer in there
    local = Path(name).is_dir()
    if not local and (name.startswith((".", "/", "~")) or Path(name).exists()):
        raise UserError(f"tokenizer {name!r}: not a directory")
    if local and not any((Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"tokenizer {name!r}: the directory has no tokenizer.json, tokenizer.model or vocab.json")
    if local and (Path(name) / "tokenizer.json").is_file() and not any((Path(name) / file).exists() for file in _ROLES):
        return _plain(_from_tokenizer_file(Path(name) / "tokenizer.json"))
    if not local:
        network.hub_or_offline()
    try:
        # Code that comes with a model is not run for its tokenizer, and nobody is asked whether it should be.
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        return _plain(tokenizer)
    except Exception as problem:  # transformers raises many types here, from OSError to KeyError
        reason = (str(problem).strip() or type(problem).__name__).split("\n")[0]
        raise UserError(f"tokenizer {name!r} cannot be loaded: {reason}") from problem


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without the truncation, the padding, and the dropout of merges that its file may have been saved with."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):  # the same text would have other ids each time
            backend.model.dropout = None
    return tokenizer


def _from_tokenizer_file(path: Path) -> Tokenizer:
    """A bare tokenizer.json names no special tokens: take the usual spellings that its vocabulary has."""
    import transformers

    try:
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as problem:
        raise UserError(f"tokenizer {path}: not a readable tokenizer.json ({problem})") from problem
    vocabulary = tokenizer.get_vocab()
    for role, names in (
        ("bos_token", ("<s>", "<|bos|>", "<|begin_of_text|>")),
        ("eos_token", ("</s>", "<|eos|>", "<|end_of_text|>")),
        ("pad_token", ("<pad>", "<|pad|>")),
    ):
        found = [candidate for candidate in names if candidate in vocabulary]
        if found:
            setattr(tokenizer, role, found[0])
    return tokenizer


def fit_embedding(tokenizer: Tokenizer, rows: int, where: str) -> Tokenizer:
    """The tokenizer, made to refuse texts with tokens that a model of ``rows`` embeddings does not have.

    Args:
      tokenizer: changed in place.
      rows: the model's vocabulary.
      where: named in messages, e.g. the tokenizer's path.

    Raises:
      UserError: its own vocabulary, without added tokens, is larger than the model's, or bos or eos is beyond it.
    """
    if tokenizer.vocab_size > rows:
        raise UserError(f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary only {rows}")
    for role in ("bos", "eos"):
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None and number >= rows:
            token = getattr(tokenizer, f"{role}_token")
            raise UserError(
                f"{where}: the {role} token {token!r} has id {number}, the model's vocabulary only {rows} tokens; name "
                "the tokenizer that the model was trained with"
            )
    tokenizer._embedding_rows = rows
    return tokenizer


def check_ids(tokenizer: Tokenizer, ids: int | Sequence[int], where: str = "this text") -> None:
    """Refuse ids (or the largest of them) that the model has no embedding for; see :func:`fit_embedding`.

    Raises:
      UserError: naming the token.
    """
    rows = getattr(tokenizer, "_embedding_rows", None)
    largest = ids if isinstance(ids, int) else max(ids, default=0)
    if rows is not None and largest >= rows:
        token = tokenizer.convert_ids_to_tokens(int(largest))
        raise UserError(
            f"{where} holds the token {token!r} (id {largest}), which was added to the tokenizer, but the model has "
            f"embeddings for {rows} tokens only; take it out of the text"
        )


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of ``text``, without special tokens.

    Raises:
      UserError: the text has a token beyond the model's embedding (:func:`fit_embedding`).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        ids = backend.encode(text, add_special_tokens=False).ids
    else:
        ids = tokenizer.encode(text, add_special_tokens=False)
    check_ids(tokenizer, ids)
    return ids


_ANCHORS = ("\n", ".", "0", "a", "t")  # texts to encode others behind; one whose tokens stay as they are is taken


def encode_behind(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that goes on behind another one: :func:`encode`, without the space that SentencePiece tokenizers put
    in front of the beginning of a text.

    What precedes does not change: where a tokenizer would have merged its last token with the first of ``text``, it does
    not here.

    Raises:
      UserError: as :func:`encode`.
    """
    alone = encode(tokenizer, text)
    if not _begins_with_space(tokenizer):
        return alone
    for anchor in _ANCHORS:
        before, both = encode(tokenizer, anchor), encode(tokenizer, anchor + text)
        if both[: len(before)] == before and tokenizer.unk_token_id not in before:  # which would merge with another
            return both[len(before) :]
    return alone


def _begins_with_space(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer puts a space in front of texts."""
    known = getattr(tokenizer, "_begins_with_space_", None)
    if known is None:
        ids = encode(tokenizer, "a")
        known = tokenizer._begins_with_space_ = decode_behind(tokenizer, ids, ids) == " a"
    return known


def encode_offsets(tokenizer: Tokenizer, text: str) -> Any:
    """The ``tokenizers.Encoding`` of ``text``: ``.ids``, ``.offsets`` (characters) and ``len()``.

    Raises:
      UserError: when the tokenizer is a slow (pure Python) one, which has no offsets; else as :func:`encode`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"tokenizer {getattr(tokenizer, 'name_or_path', '?')!r}: passkey data needs character offsets, which only "
            "tokenizers with a tokenizer.json give; convert it with transformers' convert_slow_tokenizer"
        )
    encoding = backend.encode(text, add_special_tokens=False)
    check_ids(tokenizer, encoding.ids)
    return encoding


def encode_prompt(tokenizer: Tokenizer, text: str, *, add_bos: bool | Bos = True) -> list[int]:
    """Token ids of a prompt: bos as :func:`opening` says, then the text."""
    ids = encode(tokenizer, text)
    return opening(tokenizer, add_bos, ids) + ids


def opening(tokenizer: Tokenizer, add_bos: bool | Bos, ids: Sequence[int] = ()) -> list[int]:
    """What stands in front of the ``ids`` of a text: the bos token, or nothing.

    Args:
      tokenizer: a tokenizer without a bos token gives nothing.
      add_bos: ``auto`` asks the tokenizer whether it puts bos in front of texts; True and ``always``, False and ``never``
        do not.
      ids: of the text; where they begin with bos (as chat templates do) there is no second one.
    """
    bos = tokenizer.bos_token_id
    if bos is None or add_bos in (False, "never") or (len(ids) and ids[0] == bos):
        return []
    return [bos] if add_bos in (True, "always") or adds_bos(tokenizer) else []


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer, called on a text as transformers does it, puts its bos token in front."""
    known = getattr(tokenizer, "_adds_bos", None)
    if known is None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        ids = backend.encode("a").ids if backend is not None else tokenizer.encode("a")
        known = tokenizer._adds_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return known


def set_bos_rule(tokenizer: Tokenizer, rule: Bos) -> Tokenizer:
    """The tokenizer, with what ``add_bos`` is for the model that it belongs to (see :func:`bos_rule`)."""
    tokenizer._bos_rule = rule
    return tokenizer


def bos_rule(tokenizer: Tokenizer) -> Bos:
    """``add_bos`` for prompts and texts of evaluation and generation: ``auto`` unless :func:`set_bos_rule` said otherwise."""
    return getattr(tokenizer, "_bos_rule", "auto")


def encode_many(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of several texts, without special tokens; fast tokenizers use all cores. Ids beyond the model's embedding
    are left to the caller (:func:`check_ids`), who knows where the texts are from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def decode(tokenizer: Tokenizer, ids: Iterable[int], *, special: bool = False) -> str:
    """Text of token ids, exactly as the tokens spell it; special tokens are left out, unless ``special``."""
    options = {"spaces_between_special_tokens": False} if special else {}  # slow tokenizers would put spaces there
    return tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False, **options)


def decode_behind(tokenizer: Tokenizer, ids: Iterable[int], context: Sequence[int]) -> str:
    """The text that ``ids`` add behind ``context``: what a stream of them shows. Alone (:func:`decode`) they would lose the
    space that SentencePiece decoders drop at the beginning of a text."""
    return "".join(stream_text(tokenizer, ids, context))


def pad_id(tokenizer: Tokenizer) -> int:
    """The id that fills a batch's padding. Padding is masked everywhere, so any valid id would do."""
    rows = getattr(tokenizer, "_embedding_rows", None)
    for name in ("pad_token_id", "eos_token_id"):
        number = getattr(tokenizer, name)
        if number is not None and (rows is None or number < rows):  # padding beyond the embedding would be NaN
            return int(number)
    return 0


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hex digest of everything that decides the token ids, for cache keys."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    facts += f"|{tokenizer.bos_token_id}|{tokenizer.eos_token_id}"
    return hashlib.sha256(facts.encode()).hexdigest()


class StreamDecoder:
    """Turns a stream of token ids into text pieces that concatenate to the text of the whole stream.

    One token may hold part of a UTF-8 character (byte-level and byte-fallback vocabularies), and SentencePiece
    decoders drop the space of the first token they see. So a few earlier tokens are decoded together with
    the new ones, and text is held back while it ends in an incomplete character.

    Args:
      tokenizer: any Hugging Face tokenizer.
      context: ids before the stream (the prompt), so that its first token keeps its leading space.
      special: the text has special tokens too.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), *, special: bool = False):
        self._tokenizer, self._special = tokenizer, special
        size = 8  # a multi-byte character has at most 4 bytes, so 8 tokens are ample, unless they are all left out
        while size < len(context) and not self._text(context[-size:]):
            size *= 2
        self._ids = list(context[-size:])
        self._start = 0
        self._done = len(self._ids)

    def push(self, token: int) -> str:
        """Text that ``token`` completes; "" while a character is incomplete."""
        self._ids.append(int(token))
        before, after = self._text(self._ids[self._start : self._done]), self._text(self._ids[self._start :])
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """What is held back at the end of the stream (an incomplete character shows as U+FFFD)."""
        before, after = self._text(self._ids[self._start : self._done]), self._text(self._ids[self._start :])
        self._start = self._done = len(self._ids)
        return after[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids, special=self._special)


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int], context: Sequence[int] = ()) -> Iterator[str]:
    """Text pieces of a token stream, as soon as each is complete."""
    decoder = StreamDecoder(tokenizer, context)
    for token in tokens:
        if piece := decoder.push(token):
            yield piece
    if rest := decoder.flush():
        yield rest

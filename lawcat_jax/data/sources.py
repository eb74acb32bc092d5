"""Sources of training documents: random access to tokens and their loss weights, one class a kind of data.

A document is a pure function of (data config, tokenizer, seed, split, index). What becomes of documents (a row each,
several packed into a row, or a long one cut into pieces) is not decided here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from lawcat_jax.config import DataConfig
from lawcat_jax.data import text as text_data
from lawcat_jax.data.babilong import BabilongGenerator
from lawcat_jax.data.conversations import Conversation, conversations
from lawcat_jax.data.haystack import load_haystack
from lawcat_jax.data.instructions import Encoded, encode_conversation, writes_date
from lawcat_jax.data.passkey import PasskeyGenerator
from lawcat_jax.data.retrieval import RetrievalGenerator
from lawcat_jax.data.samples import Sample, sample_rng
from lawcat_jax.data.source_files import files_here, is_remote, say_once
from lawcat_jax.data.tokenize import Tokenizer, opening
from lawcat_jax.errors import UserError

_LOOKED_AT = 200  # conversations of which people are told how many are too long


@dataclasses.dataclass(frozen=True)
class Document:
    """``tokens`` int32 [n], and ``weights`` float32 [n]: ``weights[i]`` is the loss weight of predicting ``tokens[i]``
    (0 for the first). ``needle_end`` and ``question_start`` are those of :class:`lawcat_jax.data.samples.Sample`.
    ``joined``: it holds several texts, each closed by eos. ``kl_weight``: factor on its weights in the divergence from the
    teacher.
    """

    tokens: np.ndarray
    weights: np.ndarray
    needle_end: int = 0
    question_start: int = 0
    joined: bool = False
    kl_weight: float = 1.0


class Source(Protocol):
    """Random access to ``len()`` documents of one split."""

    def __len__(self) -> int: ...

    def document(self, index: int) -> Document:
        """Document ``index`` for one row: at most ``seq_length`` tokens, or one more where every token but the first is
        predicted within the row (text)."""
        ...

    def described(self) -> str:
        """How much there is of it, for people."""
        ...

    def bound(self, index: int) -> int:
        """The most tokens of a row that document ``index`` takes; mostly cheap, for packing."""
        ...

    def long_document(self, index: int, max_tokens: int) -> Document:
        """A document of at most ``max_tokens`` tokens (generated kinds and text fill it); any ``index`` >= 0."""
        ...


def stream_wording(data: DataConfig, split: str) -> str:
    """The wording of a split: validation of all wordings but the paper's is "selection" unless the config says otherwise."""
    if split == "train":
        return data.wording
    return data.validation_wording or ("paper" if data.wording == "paper" else "selection")


def make_source(data: DataConfig, tokenizer: Tokenizer, *, seq_length: int, seed: int, split: str) -> Source:
    """The source of a config of a kind other than "mixture".

    Raises:
      UserError: a length too short for the samples, or a source that cannot be read.
    """
    if data.kind == "text":
        return TextSource(data, tokenizer, seq_length=seq_length, seed=seed, split=split)
    if data.kind == "instruction":
        return InstructionSource(data, tokenizer, seq_length=seq_length, split=split)
    source = GeneratedSource(data, tokenizer, seq_length=seq_length, seed=seed, split=split)
    source.check()  # a length that does not fit fails here, not in the middle of a run
    return source


class GeneratedSource:
    """Passkey, NIAH and BABILong samples."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, *, seq_length: int, seed: int, split: str):
        self._data, self._seq_length, self._seed, self._split = data, seq_length, seed, split
        wording, add_bos = stream_wording(data, split), data.add_bos
        self._words = data.passkey_words if data.kind == "passkey" and wording == "paper" else 0
        if data.kind == "babilong":
            self._generator = BabilongGenerator(
                tokenizer,
                tasks=data.babi_tasks,
                wording=wording,
                facts=data.babi_source,
                noise=load_haystack(data.hay_source),
                add_bos=add_bos,
            )
        elif data.kind in ("passkey", "text") and wording == "paper":
            self._generator = PasskeyGenerator(tokenizer, add_bos=add_bos)
        else:
            self._generator = RetrievalGenerator(
                tokenizer,
                task="niah" if data.kind == "niah" else "passkey",
                wording=wording,
                hay=data.hay,
                haystack=load_haystack(data.hay_source) if data.hay != "noise" else None,
                add_bos=add_bos,
            )

    @property
    def settings(self) -> tuple[DataConfig, int, int, str]:
        """(data, seq_length, seed, split): with a tokenizer, all that the documents depend on."""
        return self._data, self._seq_length, self._seed, self._split

    def __len__(self) -> int:
        return self._data.num_samples if self._split == "train" else self._data.validation_samples

    def described(self) -> str:
        return f"{len(self):,} generated samples"

    def document(self, index: int) -> Document:
        rng, share = self._draw(index)
        if self._words and isinstance(self._generator, PasskeyGenerator):
            sample = self._generator.sample_words(rng, math.ceil(self._words * share))
            if len(sample.tokens) > self._seq_length:
                raise UserError(
                    f"seq_length {self._seq_length} is too short for passkey_words {self._words}: this "
                    f"sample has {len(sample.tokens)} tokens; raise seq_length, or set passkey_words=0 to fit it"
                )
        else:
            target = math.ceil(self._seq_length * share)
            sample = self._generator.sample_tokens(rng, self._seq_length, target_tokens=target)
        return _weighted(self._data, sample)

    def check(self) -> None:
        """Raise a UserError where ``seq_length`` is too short for samples."""
        if isinstance(self._generator, RetrievalGenerator) and self._seq_length < self._generator.minimum_tokens:
            raise UserError(
                f"{self._data.kind} samples of {self._seq_length} tokens are too short for their longest frame: with this "
                f"tokenizer the minimum is {self._generator.minimum_tokens} tokens"
            )
        self.document(0)

    def bound(self, index: int) -> int:
        if self._words:
            return len(self.document(index).tokens)
        drawn = math.ceil(self._seq_length * self._draw(index)[1])
        # Below its frame a sample is longer than drawn; of stories it is not known beforehand how long that is.
        frame = getattr(self._generator, "minimum_tokens", self._seq_length)
        return drawn if drawn >= frame else len(self.document(index).tokens)

    def _draw(self, index: int) -> tuple[np.random.Generator, float]:
        """The generator of a sample, and its length as a share of the full one."""
        rng = sample_rng(self._split, self._seed, index)
        least = self._data.min_length_fraction
        return rng, 1.0 if least >= 1 else float(rng.uniform(least, 1.0))

    def long_document(self, index: int, max_tokens: int) -> Document:
        rng = sample_rng(self._split, self._seed, index)
        return _weighted(self._data, self._generator.sample_tokens(rng, max_tokens))


def _weighted(data: DataConfig, sample: Sample) -> Document:
    weights = np.full(len(sample.tokens), data.prompt_weight if data.answer_only else 1.0, np.float32)
    start, end = sample.label_span or (sample.answer_start, sample.answer_end)
    if data.answer_only:
        weights[sample.answer_end :] = 0.0
        weights[-1] = data.end_weight  # of eos
    weights[start:end] = data.answer_weight
    weights[0] = 0.0
    return Document(sample.tokens, weights, sample.needle_end, sample.question_start, kl_weight=data.kl_weight)


def remote_contents(
    data: DataConfig, tokenizer: Tokenizer, *, seq_length: int, split: str
) -> Iterator[tuple[str, int, str]]:
    """(source, size, digest) of what :func:`make_source` of the same arguments reads from hubs: tokens, conversations or, of
    haystacks, characters.

    Raises:
      UserError: a source that cannot be read.
    """
    source = data.validation_source if split == "validation" and data.validation_source else data.source
    if data.kind in ("text", "instruction") and _is_elsewhere(source):
        if data.kind == "text":
            source, tokens = _text_tokens(data, tokenizer, seq_length, split)
            yield source, len(tokens), hashlib.sha256(tokens.tobytes()).hexdigest()[:32]
        else:
            source, rows = _conversations(data, split)
            said = json.dumps([[dataclasses.astuple(turn) for turn in row.turns] for row in rows])
            yield source, len(rows), hashlib.sha256(said.encode()).hexdigest()[:32]
    if _is_elsewhere(data.hay_source):
        text = "\n\n".join(load_haystack(data.hay_source).documents)
        yield data.hay_source, len(text), hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_elsewhere(source: str) -> bool:
    return is_remote(source) and not files_here(source)


def _text_tokens(data: DataConfig, tokenizer: Tokenizer, seq_length: int, split: str) -> tuple[str, np.ndarray]:
    """(source, its tokens) that a split of a text is made of."""
    validation, own = split == "validation", bool(data.validation_source)
    source = data.validation_source if validation and own else data.source
    if not source:
        raise UserError("data.source: name a text source (tfds:..., hf:..., or a path)")
    wanted = data.validation_samples if validation and own else data.num_samples
    if not own:
        wanted += data.validation_samples
    most = wanted * seq_length + 1 if is_remote(source) else None
    return source, text_data.load_tokens(source, tokenizer, text_key=data.text_key, max_tokens=most)


def _conversations(data: DataConfig, split: str) -> tuple[str, Sequence[Conversation]]:
    """(source, its conversations) that a split of instruction data is made of."""
    source = data.validation_source if split == "validation" and data.validation_source else data.source
    if not source:
        raise UserError("data.source: name instruction data (a path or hf:...)")
    if is_remote(source):
        return source, _remote_conversations(source, data.num_samples + data.validation_samples, data.ignored_fields)
    return source, tuple(conversations(source, None, data.ignored_fields))


@functools.lru_cache(maxsize=4)  # both splits, and the record of what a run has read, ask for them
def _remote_conversations(source: str, limit: int, notes: tuple[str, ...]) -> tuple[Conversation, ...]:
    return tuple(conversations(source, limit, notes))


class TextSource:
    """Text cut into sequences of its own source, or (validation without one) of the tail of a shared one.

    ``passkey_fraction`` is the share of other samples that a mixed stream adds, so that its validation keeps its total.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, *, seq_length: int, seed: int, split: str):
        self._weight, self._kl_weight, self._seed, self._split = data.text_weight, data.kl_weight, seed, split
        self._eos = tokenizer.eos_token_id
        validation, own = split == "validation", bool(data.validation_source)
        self._own = own
        source, self._tokens = _text_tokens(data, tokenizer, seq_length, split)
        self._bos = tokenizer.bos_token_id if opening(tokenizer, data.add_bos) else None
        self._packed = text_data.PackedText(self._tokens, seq_length, bos_id=self._bos, source=source)
        self._seq_length = seq_length
        total = len(self._packed)
        fraction = data.passkey_fraction if data.kind == "text" else 0.0
        held = self._asked = round(data.validation_samples * (1 - fraction))
        if own:
            self._indices = range(min(held, total)) if validation else range(total)
            return
        held = min(held, max(1, total // 10))
        if total == held and not validation:
            raise UserError(
                f"text source {source!r} gives a single sequence of {seq_length} tokens, none is left to hold "
                "out: give more text, a smaller seq_length, or a validation_source"
            )
        self._indices = range(total - held, total) if validation else range(total - held)

    def __len__(self) -> int:
        return len(self._indices)

    def described(self) -> str:
        ends = 0 if self._eos is None else int(np.count_nonzero(self._tokens == self._eos))
        documents = f"{ends:,} document(s) of " if ends else ""
        split = "training" if self._split == "train" else self._split
        text = f"{documents}{len(self._tokens):,} tokens, {len(self):,} sequences of {self._seq_length} for {split}"
        if self._split == "validation" and len(self) < self._asked:
            why = "no more are there" if self._own else "at most a tenth of the text is held out"
            text += f" ({self._asked:,} were asked for; {why})"
        return text

    def document(self, index: int) -> Document:
        return self._document(self._packed[self._indices[index]])

    def bound(self, index: int) -> int:
        return self._seq_length

    def long_document(self, index: int, max_tokens: int) -> Document:
        """Running text from a random place of this split."""
        room = len(self._indices) * self._seq_length
        length = min(max_tokens - (self._bos is not None), room)
        start = self._indices.start * self._seq_length
        start += int(sample_rng(self._split, self._seed, index).integers(room - length + 1))
        tokens = np.asarray(self._tokens[start : start + length], np.int32)
        if self._bos is not None:
            tokens = np.concatenate([np.asarray([self._bos], np.int32), tokens])
        return self._document(tokens)

    def _document(self, tokens: np.ndarray) -> Document:
        weights = np.full(len(tokens), self._weight, np.float32)
        weights[0] = 0.0
        return Document(tokens, weights, joined=True, kl_weight=self._kl_weight)


class InstructionSource:
    """Conversations in the order of their source; too long ones are cut. Without ``validation_source`` the last
    ``validation_samples`` (at most a tenth) are held out."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, *, seq_length: int, split: str):
        self._data, self._tokenizer, self._seq_length = data, tokenizer, seq_length
        if data.chat_date and not writes_date(getattr(tokenizer, "chat_template", None)):
            raise UserError(
                f"data.chat_date: {data.chat_date} is read by nothing, since tokenizer {tokenizer.name_or_path!r} has no chat "
                "template that writes a date"
            )
        validation, own = split == "validation", bool(data.validation_source)
        source, rows = _conversations(data, split)
        held = min(data.validation_samples, len(rows) if own else len(rows) // 10)
        if own:
            rows = rows[:held] if validation else rows
        else:
            rows = rows[len(rows) - held :] if validation else rows[: len(rows) - held]
        if not rows and not validation:
            raise UserError(f"instruction data {source!r}: it holds no rows with an answer to learn from")
        self._rows = rows
        self._encoded = functools.lru_cache(maxsize=4096)(self._encode)
        forms = [(row.alpaca is None, *(turn.role for turn in row.turns)) for row in rows]
        for index in {form: index for index, form in enumerate(forms)}.values():
            self._encoded(index)  # what a chat template refuses shows here, not in the middle of a run
        self._refuse_or_tell_lost(source, validation)

    def __len__(self) -> int:
        return len(self._rows)

    def described(self) -> str:
        looked, cut, lost = self._cut
        if not cut:
            return f"{len(self):,} conversations"
        return (
            f"{len(self):,} conversations ({cut:,} of the first {looked:,} are longer than {self._seq_length} tokens and cut, "
            f"{lost:,} of them before any answer that counts, so that nothing is learnt from them)"
        )

    @functools.cached_property
    def _cut(self) -> tuple[int, int, int]:
        """(conversations looked at, those of them that are cut, those that are cut before what has a weight)."""
        looked, size = range(min(len(self), _LOOKED_AT)), self._seq_length
        cut = [number for number in looked if len(self._encoded(number).tokens) > size]
        return len(looked), len(cut), sum(not self.document(number).weights.any() for number in cut)

    def _refuse_or_tell_lost(self, source: str, validation: bool) -> None:
        looked, _, lost = self._cut
        what = f"{'validation' if validation else 'training'} data {source!r}"
        if lost and lost == looked:
            raise UserError(
                f"instruction {what}: seq_length {self._seq_length} ends before the answer of each of the {looked:,} conversations "
                "looked at, so that nothing would be learnt; make it longer"
            )
        if lost:
            say_once(f"instruction {what}: {self.described()}")

    def document(self, index: int) -> Document:
        return self.long_document(index, self._seq_length)

    def bound(self, index: int) -> int:
        return min(self._seq_length, len(self._encoded(index % len(self)).tokens))

    def long_document(self, index: int, max_tokens: int) -> Document:
        found = self._encoded(index % len(self))
        prompt = self._data.prompt_weight if self._data.answer_only else 1.0
        weights = np.where(found.answers, self._data.answer_weight * found.weights, prompt).astype(np.float32)
        weights[0] = 0.0
        return Document(found.tokens[:max_tokens], weights[:max_tokens], kl_weight=self._data.kl_weight)

    def _encode(self, index: int) -> Encoded:
        data = self._data
        return encode_conversation(self._tokenizer, self._rows[index], add_bos=data.add_bos, date=data.chat_date)

"""The grain pipeline: one random-access dataset of samples, shuffled, sharded by process and batched.

Every sample is a pure function of (data config, tokenizer, seed, index), and the order is a pure function of
the seed. So the iterator's state is one number, the batches taken so far: a run resumes at any step with the
same batches, on any number of processes.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from lawcat_jax.config import DataConfig
from lawcat_jax.data import text as text_data
from lawcat_jax.data.batch import Batch
from lawcat_jax.data.passkey import PasskeyGenerator, sample_rng
from lawcat_jax.data.tokenize import Tokenizer, pad_id
from lawcat_jax.errors import UserError


def make_dataset(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    batch_size: int,
    seed: int,
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
    repeat: bool = True,
):
    """Batches of one stage, as a ``grain.IterDataset``.

    A batch is a :class:`Batch` of numpy arrays with B = ``batch_size`` / ``process_count`` and T = ``seq_length``.

    Process p of P takes every P-th sample, so that all processes together see the same global batches
    whatever P is. ``train`` is shuffled anew in each pass, ``validation`` keeps its order. With ``repeat``
    the stream is endless; without, it ends after one pass, and rows of zero weight fill up the last batch.

    Iterators have ``get_state()`` and ``set_state()``; the state does not depend on ``process_count``.
    ``data.num_workers`` threads prepare batches ahead (tokenizers leave Python's lock); 0 works in the caller.

    Raises:
      UserError: a batch size that ``process_count`` does not divide, a length too short for its samples, or a
        source that cannot be read.
    """
    import grain

    if split not in ("train", "validation"):
        raise UserError(f"split {split!r} is not one of 'train', 'validation'")
    if batch_size % process_count:
        raise UserError(f"batch_size {batch_size} is not divisible by the {process_count} processes")
    samples = Samples(data, tokenizer, seq_length=seq_length, seed=seed, split=split)
    indices = len(samples) if repeat else math.ceil(len(samples) / batch_size) * batch_size
    dataset = grain.MapDataset.source(range(indices))
    if split == "train":
        dataset = dataset.seed(seed % 2**32).shuffle()
    if repeat:
        dataset = dataset.repeat()
    if process_count > 1:
        dataset = dataset.slice(slice(process_index, None, process_count))
    dataset = dataset.map(samples.__getitem__).batch(batch_size // process_count, drop_remainder=True)
    workers = data.num_workers
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers))


class Samples:
    """Random access to the samples of one split; an index at or beyond ``len()`` gives a sample of weight zero.

    Text sequences come first, then passkey samples: their share of the whole is ``data.passkey_fraction``.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, *, seq_length: int, seed: int, split: str):
        self._data, self._tokenizer, self._seq_length = data, tokenizer, seq_length
        self._seed, self._split = seed, split
        self._text: text_data.PackedText | None = None
        self._text_indices = range(0)
        fraction = data.passkey_fraction if data.kind == "text" else 1.0
        wanted = data.num_samples if split == "train" else data.validation_samples
        if fraction < 1:
            self._open_text(fraction)
            share = len(self._text_indices) * fraction / (1 - fraction)
            self._num_passkey = round(share)
        else:
            self._num_passkey = wanted
        if len(self) < 1:
            raise UserError(f"data: the {split} split has no samples (validation_samples {data.validation_samples})")
        if self._num_passkey:
            self._passkey = PasskeyGenerator(tokenizer, add_bos=data.add_bos)
            self._sample_passkey(0)  # a length that does not fit fails here, not in the middle of a run

    def __len__(self) -> int:
        return len(self._text_indices) + self._num_passkey

    def __getitem__(self, index: int) -> Batch:
        if index < len(self._text_indices):
            return self._sample_text(self._text_indices[index])
        if index < len(self):
            return self._sample_passkey(index - len(self._text_indices))
        blank = self[0]
        return {
            **blank,
            "loss_weights": np.zeros_like(blank["loss_weights"]),
            "mask": np.zeros_like(blank["mask"]),
        }

    def _open_text(self, passkey_fraction: float) -> None:
        """Text sequences of this split: of its own source, or the head (train) and tail of a shared one."""
        data, validation = self._data, self._split == "validation"
        own = bool(data.validation_source)
        source = data.validation_source if validation and own else data.source
        if not source:
            raise UserError("data.source: name a text source (tfds:..., hf:..., or a path)")
        wanted = data.validation_samples if validation and own else data.num_samples
        if not own:
            wanted += data.validation_samples
        tokens = text_data.load_tokens(
            source,
            self._tokenizer,
            text_key=data.text_key,
            max_tokens=wanted * self._seq_length + 1 if text_data.is_remote(source) else None,
        )
        bos = self._tokenizer.bos_token_id if data.add_bos else None
        self._text = text_data.PackedText(tokens, self._seq_length, bos_id=bos, source=source)
        total = len(self._text)
        held = round(data.validation_samples * (1 - passkey_fraction))  # of a mixed split, which keeps its total
        if own:
            self._text_indices = range(min(held, total)) if validation else range(total)
            return
        held = min(held, max(1, total // 10))
        if total == held and not validation:
            raise UserError(
                f"text source {source!r} gives a single sequence of {self._seq_length} tokens, none is left to hold "
                "out: give more text, a smaller seq_length, or a validation_source"
            )
        self._text_indices = range(total - held, total) if validation else range(total - held)

    def _sample_text(self, index: int) -> Batch:
        assert self._text is not None  # an index below the number of sequences implies it
        window = self._text[index]
        weights = np.full(len(window) - 1, self._data.text_weight, np.float32)
        return self._arrays(window[:-1], window[1:], weights)

    def _sample_passkey(self, index: int) -> Batch:
        data = self._data
        rng = sample_rng(self._split, self._seed, index)
        share = 1.0 if data.min_length_fraction >= 1 else float(rng.uniform(data.min_length_fraction, 1.0))
        if data.passkey_words and data.kind == "passkey":
            sample = self._passkey.sample_words(rng, math.ceil(data.passkey_words * share))
            if len(sample.tokens) > self._seq_length:
                raise UserError(
                    f"seq_length {self._seq_length} is too short for passkey_words {data.passkey_words}: this "
                    f"sample has {len(sample.tokens)} tokens; raise seq_length, or set passkey_words=0 to fit it"
                )
        else:
            target = math.ceil(self._seq_length * share)
            sample = self._passkey.sample_tokens(rng, self._seq_length, target_tokens=target)
        tokens = sample.tokens
        targets = np.append(tokens[1:], pad_id(self._tokenizer)).astype(np.int32)
        weights = np.full(len(tokens), data.prompt_weight if data.answer_only else 1.0, np.float32)
        weights[sample.answer_start - 1 : sample.answer_end - 1] = 1.0
        if data.answer_only:
            weights[sample.answer_end - 1] = 0.0  # eos is not a label
        weights[-1] = 0.0  # nothing follows eos
        return self._arrays(tokens, targets, weights)

    def _arrays(self, tokens: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> Batch:
        """A row of a batch (no axis B), padded to ``seq_length``."""
        length, pad = len(tokens), pad_id(self._tokenizer)
        fill = functools.partial(np.pad, pad_width=(0, self._seq_length - length))
        mask = np.ones(length, bool)
        if self._tokenizer.eos_token_id is not None:
            mask = tokens != self._tokenizer.eos_token_id
        return {
            "tokens": fill(tokens, constant_values=pad).astype(np.int32),
            "targets": fill(targets, constant_values=pad).astype(np.int32),
            "loss_weights": fill(weights).astype(np.float32),
            "lengths": np.asarray(length, np.int32),
            "mask": fill(mask),
        }

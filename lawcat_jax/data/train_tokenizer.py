"""A small byte-level BPE tokenizer, trained on text and written as a Hugging Face tokenizer directory.

Every digit is a token of its own, so that a key's tokens are its digits. The passkey sentences are part of the
training text with a weight, so that their frame is short in tokens. Training is deterministic: the same
files give the same vocabulary.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from lawcat_jax.data.passkey import HAY, LANDMARK_NEEDLE, LANDMARK_TASK, NEEDLE, QUESTION, TASK
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
SMALLEST = 256 + len(SPECIAL_TOKENS)


def passkey_sentences() -> list[str]:
    """The sentences of both passkey forms, with and without a leading space, once each."""
    frames = [
        TASK,
        LANDMARK_TASK,
        f"{QUESTION}12345",
        LANDMARK_NEEDLE.format(key="98765"),
        NEEDLE.format(key="13579"),
    ]
    return [HAY, *(" " + frame for frame in frames), *frames]


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, passkey_repeats: int = 3000) -> Tokenizer:
    """Byte-level BPE over ``texts`` and weighted passkey sentences, as a ``PreTrainedTokenizerFast``.

    No prefix space, individual digits, a template that puts bos first.

    Raises:
      UserError: when ``vocab_size`` cannot hold the 256 bytes and the special tokens.
    """
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    if vocab_size < SMALLEST:
        raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes and the special tokens need {SMALLEST}")
    bos, eos, pad = SPECIAL_TOKENS
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()

    def corpus() -> Iterator[str]:
        yield from texts
        for _ in range(passkey_repeats):
            yield from passkey_sentences()

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )


def check_tokenizer_target(target: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a directory that has a tokenizer already, unless ``overwrite``; and always one whose tokenizer is that of a
    model, which would read other tokens afterwards.

    Raises:
      UserError: saying which.
    """
    path = Path(target).expanduser()
    found = [path / "config.json", path / "model.json", path / "adapter_config.json", *path.glob("*.safetensors")]
    found += [path.parent / "model.json"] if path.resolve().name == "tokenizer" else []
    if model := next((file for file in found if file.is_file()), None):
        raise UserError(
            f"target {str(target)!r}: {model} is a model's, whose tokenizer is not replaced; name another folder"
        )
    if not overwrite and (path / "tokenizer.json").exists():
        raise UserError(
            f"target {str(target)!r} holds a tokenizer; pass --overwrite to replace it, or name another folder"
        )


def save_tokenizer(tokenizer: Tokenizer, target: str | Path) -> Path:
    """Write a tokenizer directory under a temporary name, then rename it. Tokenizer files of a directory that
    exists already are replaced one by one; its other files stay.

    Raises:
      UserError: when ``target`` is a file.
    """
    target = Path(target).expanduser()
    if target.exists() and not target.is_dir():
        raise UserError(f"target {str(target)!r} exists and is not a directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        tokenizer.save_pretrained(partial)
        settings = partial / "tokenizer_config.json"
        facts = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")  # a class name of transformers 4 too
        partial.chmod(0o755)
        if target.exists():
            for file in partial.iterdir():
                file.replace(target / file.name)
        else:
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target

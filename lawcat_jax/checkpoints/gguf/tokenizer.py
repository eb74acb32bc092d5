"""The tokenizer of a GGUF file as the files of a fast Hugging Face tokenizer; needs ``tokenizers``, not transformers.

GGUF keeps vocabulary, merges or scores, and the name of the rule that cuts text into words before merging
(``tokenizer.ggml.pre``); the rule itself is not in the file, so :data:`SPLITS` has it for each name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lawcat_jax.errors import UserError
from lawcat_jax.files import write_json

_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # entries of tokenizer.ggml.token_type

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_SLASH}"


class Split(NamedTuple):
    """How text is cut into words.

    ``pattern``: a regular expression, or None for that of GPT-2. ``digits``: every digit is a word of its own before
    that. ``whole``: a word that is in the vocabulary is one token whatever the merges say. ``nfc``: Unicode
    normalisation first. ``bos``: bos is put in front where the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    nfc: bool = False
    bos: bool = False


SPLITS = (
    dict.fromkeys(("gpt-2", "gpt2"), Split())
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), Split(digits=True))
    | dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), Split(_LLAMA3, whole=True, bos=True))
    | dict.fromkeys(("dbrx", "smaug-bpe"), Split(_LLAMA3))
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Split(_QWEN2, nfc=True))
    | {"tekken": Split(_TEKKEN, whole=True, bos=True)}
)


def special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of ``bos``, ``eos`` (one, a list where a turn ends with another token, or None), ``unk`` and ``pad``."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids: dict[str, Any] = {ours: metadata.get(f"{_KEY}{theirs}_token_id") for ours, theirs in names.items()}
    turn = metadata.get(f"{_KEY}eot_token_id")
    if turn is not None and turn != ids["eos"]:
        ids["eos"] = turn if ids["eos"] is None else [ids["eos"], turn]
    return ids


def write_tokenizer(path: Path, metadata: Mapping[str, Any], target: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into the directory ``target``.

    Args:
      path: of the GGUF file, for messages.
      metadata: its metadata.

    Raises:
      UserError: a tokenizer that is not supported, or damaged.
    """
    kind = metadata.get(f"{_KEY}model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise UserError(f"{path}: tokenizer model {kind!r} is not supported; supported: {', '.join(builders)}")
    tokens = metadata.get(f"{_KEY}tokens")
    if not (isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens)):
        raise UserError(f"{path}: damaged ({_KEY}tokens is missing or no list of strings)")
    types = metadata.get(f"{_KEY}token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"{path}: damaged ({len(tokens)} tokens, but {len(types)} token types)")
    if len(set(tokens)) != len(tokens):
        tokens = _distinct(tokens)
    names = _special_tokens(path, metadata, tokens)
    tokenizer, bos = builders[kind](path, metadata, tokens, types)
    _add_special(tokenizer, tokens, types, names)
    add_bos, add_eos = metadata.get(f"{_KEY}add_bos_token", bos), metadata.get(f"{_KEY}add_eos_token", False)
    _post_process(tokenizer, names, add_bos=bool(add_bos), add_eos=bool(add_eos))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": bool(add_bos and "bos_token" in names),
        "add_eos_token": bool(add_eos and "eos_token" in names),
        "clean_up_tokenization_spaces": False,
    }
    architecture = metadata.get("general.architecture")
    if length := metadata.get(f"{architecture}.context_length"):
        config["model_max_length"] = length
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    tokenizer.save(str(target / "tokenizer.json"))
    write_json(target / "tokenizer_config.json", config)
    write_json(target / "special_tokens_map.json", names)


def _special_tokens(path: Path, metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    """``bos_token`` and so on, as text."""
    names = {}
    for role, index in special_ids(metadata).items():
        index = index[0] if isinstance(index, list) else index
        if index is None or index == 0xFFFFFFFF:  # llama.cpp's "none"
            continue
        if not (isinstance(index, int) and 0 <= index < len(tokens)):
            raise UserError(f"{path}: damaged (the {role} token is {index!r} of {len(tokens)})")
        names[f"{role}_token"] = tokens[index]
    return names


def _distinct(tokens: list[str]) -> list[str]:
    """Names for the second and later copies of a token, which text never becomes but ids may mean."""
    seen: set[str] = set()
    named = []
    for index, token in enumerate(tokens):
        named.append(f"[duplicate{index}]" if token in seen else token)
        seen.add(token)
    return named


def _byte_level(path: Path, metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """Byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM have it; and whether it usually puts bos in front."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = metadata.get(f"{_KEY}pre")
    if rule not in SPLITS:
        said = "does not say" if rule is None else f"says {rule!r}, which is unknown here,"
        raise UserError(f"{path}: tokenizer.ggml.pre {said} how text is cut into words; known: {', '.join(SPLITS)}")
    split = SPLITS[rule]
    merges = []
    for merge in metadata.get(f"{_KEY}merges") or ():
        left, _, right = str(merge).partition(" ")
        merges.append((left, right))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.whole)
    except Exception as problem:  # tokenizers raises plain Exception
        raise UserError(f"{path}: damaged tokenizer ({problem})") from None
    tokenizer = Tokenizer(model)
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    prefix = bool(metadata.get(f"{_KEY}add_space_prefix", False))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.bos


def _sentencepiece(path: Path, metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """SentencePiece's BPE, as Llama 2 and early Mistral have it; it puts bos in front unless told otherwise."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get(f"{_KEY}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UserError(f"{path}: damaged ({_KEY}scores does not have one score for each token)")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = [token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN]
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, scores),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    except Exception as problem:  # tokenizers raises plain Exception
        raise UserError(f"{path}: damaged tokenizer ({problem})") from None
    tokenizer = Tokenizer(model)
    prefix = bool(metadata.get(f"{_KEY}add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first.

    SentencePiece always joins the neighbours whose union scores best; a list of pairs in that order does the same.
    """
    found = []
    for token, index in vocabulary.items():
        pairs = [
            (token[:cut], token[cut:])
            for cut in range(1, len(token))
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
        found += [(-scores[index], -len(left), -len(right), left, right) for left, right in pairs]
    return [(left, right) for *_, left, right in sorted(found, key=lambda entry: entry[:3])]


def _add_special(tokenizer: Any, tokens: list[str], types: list[int], names: Mapping[str, str]) -> None:
    """Tokens that text is searched for before it is cut into words: they never come out of merges."""
    from tokenizers import AddedToken

    roles = set(names.values())
    for token, kind in zip(tokens, types, strict=True):
        special = kind == _CONTROL or token in roles
        if special or kind == _USER_DEFINED:
            added = AddedToken(token, normalized=False, special=special)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])


def _post_process(tokenizer: Any, names: Mapping[str, str], *, add_bos: bool, add_eos: bool) -> None:
    """bos in front and eos behind, where the file asks for them, when text is encoded with special tokens."""
    from tokenizers import processors

    bos = names.get("bos_token") if add_bos else None
    eos = names.get("eos_token") if add_eos else None
    used = [token for token in dict.fromkeys((bos, eos)) if token is not None]
    if not used:
        return

    def template(part: str, number: int) -> list[str]:
        marks = [f"{bos}:{number}" if bos else "", f"${part}:{number}", f"{eos}:{number}" if eos else ""]
        return [mark for mark in marks if mark]

    tokenizer.post_processor = processors.TemplateProcessing(
        single=template("A", 0),
        pair=template("A", 0) + template("B", 1),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in used],
    )

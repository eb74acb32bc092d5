"""The README.md of an exported student: what it is, how it was made, what it scored, where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig, to_dict

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this directory>", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("<this directory>", trust_remote_code=True)
prompt = tokenizer("The sky is", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))
```"""
_STAGE_FIELDS = ("steps", "epochs", "seq_length", "batch_size", "learning_rate", "loss")


def model_card(
    model: ModelConfig,
    attention: AttentionConfig,
    lora: LoraConfig | None,
    extra: Mapping[str, Any],
    recipe: Mapping[str, Any],
    *,
    trained: Mapping[str, int],
    total: int,
) -> str:
    """Markdown with the metadata block of the Hugging Face hub.

    Args:
      model, attention, lora: the student's configurations.
      extra: of its model directory: ``source``, ``training_length``, ``stage``.
      recipe: ``config``, ``results``, ``git`` and ``versions`` of its run, as far as they are known.
      trained: parameters of ``mixers`` and ``lora``.
      total: bytes of the weights.
    """
    teacher = extra.get("source") or "not recorded"
    name = {"lawcat": "LAWCAT", "lolcats": "LoLCATs"}[attention.kind]
    kept = len(attention.softmax_layers)
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- linear-attention\n- lawcat\n---",
        f"# {name} student of {teacher}",
        f"A {model.family} decoder with {model.num_layers} layers whose softmax attention was replaced by {name} linear "
        f"attention in {model.num_layers - kept} of them. "
        + (
            f"{kept} keep softmax attention, so the cache grows with the text, but slowly."
            if kept
            else "Generation keeps a state of constant size, however long the text."
        ),
        f"{total / 1e9:.3g} GB of weights; trained were {trained['mixers'] / 1e6:.3g} M parameters of the mixers"
        + (f" and {trained['lora'] / 1e6:.3g} M of LoRA adapters (kept apart)." if lora is not None else "."),
        "## Use",
        _USE,
        "`trust_remote_code=True` runs `modeling_lawcat.py` of this directory: one file of plain torch, worth a look. "
        "`lawcat_jax.convert --source=<this directory>` reads it back, bit for bit.",
        "## Recipe",
        _recipe(attention, lora, extra, recipe),
        "## Results",
        _results(recipe.get("results")),
        "## Limits",
        _limits(teacher, extra, attention),
    ]
    return "\n\n".join(parts) + "\n"


def _recipe(attention: AttentionConfig, lora: LoraConfig | None, extra: Mapping, recipe: Mapping) -> str:
    default = to_dict(type(attention)(kind=attention.kind))
    changed = {name: value for name, value in to_dict(attention).items() if value != default[name]}
    lines = [f"- teacher: `{extra.get('source') or 'not recorded'}`"]
    if extra.get("revision"):
        lines.append(f"- revision of the teacher: `{extra['revision']}`")
    lines.append(
        f"- attention: `{attention.kind}`" + (f" with {_listed(changed)}" if changed else ", default settings")
    )
    if lora is not None:
        lines.append(f"- LoRA: rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}")
    config = _mapping(recipe.get("config"))
    for stage in ("stage1", "stage2"):
        values = config.get(stage)
        if isinstance(values, Mapping) and values.get("enabled", True):
            known = {name: values[name] for name in _STAGE_FIELDS if values.get(name) not in (None, "", 0)}
            kind = _mapping(values.get("data")).get("kind", "?")
            lines.append(f"- {stage}: data `{kind}`, {_listed(known)}")
    if "seed" in config:
        lines.append(f"- seed: {config['seed']}")
    for name in ("git", "versions"):
        if recipe.get(name):
            value = recipe[name]
            lines.append(f"- {name}: {_listed(value) if isinstance(value, Mapping) else value}")
    return "\n".join(lines)


def _mapping(value: Any) -> Mapping[str, Any]:
    """``value`` where it is a mapping, else an empty one: records may hold anything."""
    return value if isinstance(value, Mapping) else {}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _results(results: Any) -> str:
    """{task: {model: {length: {value: ...}}}}, as a manifest has it, as one table."""
    rows = []
    for task, by_model in results.items() if isinstance(results, Mapping) else ():
        for label, by_length in by_model.items() if isinstance(by_model, Mapping) else ():
            for length, values in by_length.items() if isinstance(by_length, Mapping) else ():
                plain = {} if not isinstance(values, Mapping) else values
                plain = {name: value for name, value in plain.items() if isinstance(value, int | float | str)}
                rows.append({"task": task, "model": label, "tokens": length, **plain})
    if not rows:
        return "None were recorded when this directory was written."
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def _limits(teacher: str, extra: Mapping[str, Any], attention: AttentionConfig) -> str:
    lines = []
    if extra.get("training_length"):
        lines.append(
            f"- Trained on sequences of {extra['training_length']} tokens; beyond that, believe measurements only."
        )
    if extra.get("add_bos") in ("always", "never"):
        with_bos = "with the bos token" if extra["add_bos"] == "always" else "without a bos token"
        lines.append(f"- It was trained on sequences that begin {with_bos}; give prompts the same way.")
    lines += [
        "- A state of constant size forgets: verbatim recall of long texts is worse than the teacher's.",
        "- What it was trained on shapes what it retrieves; other tasks may have suffered. See the recipe.",
        f"- Licence, biases and intended use are those of {teacher}.",
    ]
    if attention.softmax_layers:
        lines.append(f"- Layers {', '.join(map(str, attention.softmax_layers))} still have a cache that grows.")
    return "\n".join(lines)

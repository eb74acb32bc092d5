"""Tiny random Hugging Face checkpoints, made in the test process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,  # so that logits are far apart and an error in rotation or masking shows
    max_position_embeddings=64,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> (family, configuration, dtype, bytes per shard)
CASES = {
    "llama_grouped": ("llama", {}, "float32", None),
    "llama3_tied_sharded": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "head_dim": 16, "eos_token_id": [2, 5]},
        "float32",
        "20KB",
    ),
    "llama_linear_bf16": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "num_key_value_heads": 4},
        "bfloat16",
        None,
    ),
    "mistral_window_sharded": ("mistral", {"sliding_window": 7}, "bfloat16", "20KB"),
    "mistral_fp16": (
        "mistral",
        {"sliding_window": None, "rope_theta": 1e6, "rope_parameters": None},
        "float16",
        None,
    ),
}


PREFIX = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "olmo2": "Olmo2",
    "phi3": "Phi3",
}


def make(directory: Path, name: str = "llama_grouped", **changes) -> Path:
    """Write the random checkpoint ``name`` to ``directory``."""
    family, values, dtype, shard = CASES[name]
    return make_random(directory, family, {**values, **changes}, dtype, shard)


def make_random(directory: Path, family: str, values: dict, dtype: str = "float32", shard: str | None = None) -> Path:
    """Write a random checkpoint of a family, with biases and norms that are not what they start as."""
    import torch
    import transformers

    config = getattr(transformers, f"{PREFIX[family]}Config")(**{**SIZES, **values})
    torch.manual_seed(0)
    model = getattr(transformers, f"{PREFIX[family]}ForCausalLM")(config).to(getattr(torch, dtype))
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:  # ones by default, which would hide a swap of the two norms
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter_name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    model.save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    return directory


def torch_logits(directory: Path, tokens: np.ndarray, adapter: Path | None = None) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def tokens(seed: int = 0, shape: tuple[int, int] = (2, 24), vocab: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file; ``...`` deletes one."""
    values = json.loads(path.read_text())
    values |= changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def raw_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory through the safetensors library: (dtype, shape, bytes)."""
    import torch
    from safetensors.torch import load_file

    out = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, value in load_file(file).items():
            out[name] = (str(value.dtype), tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
    return out

"""Tiny GGUF files, written with the gguf package from random transformers models as llama.cpp's converter lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,  # so that logits are far apart and an error in rotation or masking shows
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
# name -> (class prefix, configuration, GGUF type of the matrices)
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama_q8_0": ("Llama", {}, "Q8_0"),
    "llama_tied_q4_0": ("Llama", {"tie_word_embeddings": True}, "Q4_0"),
    "llama_llama3_f16": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 32, "eos_token_id": [2, 5]}, "F16"),
    "llama_linear_bf16": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "num_key_value_heads": 4},
        "BF16",
    ),
    "mistral_q5_1": ("Mistral", {"sliding_window": 7, "rope_theta": 1e6}, "Q5_1"),
    "qwen2_q4_1": ("Qwen2", {"tie_word_embeddings": True}, "Q4_1"),
    "qwen3_q5_0": ("Qwen3", {"head_dim": 32}, "Q5_0"),
    "smollm3_q8_0": (
        "SmolLM3",
        {"num_hidden_layers": 5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        "Q8_0",
    ),
    "olmo2_q8_0": ("Olmo2", {"pad_token_id": 0}, "Q8_0"),
    "phi3_q8_0": ("Phi3", {"pad_token_id": 0, "original_max_position_embeddings": 64}, "Q8_0"),
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def model(name: str, **changes: Any) -> Any:
    """The random transformers model of a case."""
    import torch
    import transformers

    prefix, values, _ = CASES[name]
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **values, **changes})
    torch.manual_seed(0)
    made = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    for parameter_name, parameter in made.named_parameters():
        if "norm" in parameter_name:  # ones by default, which would hide a swap of two norms
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp wants them for Llama: row i of the first half of a head, then row i of its second half."""
    size = weight.shape[0] // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def write(path: Path, name: str, made: Any, *, tokenizer: Any = None, edit: Any = None) -> Path:
    """Write ``made`` to ``path`` and set its weights to what their quantisation leaves of them.

    Args:
      tokenizer: called with the writer, to add its metadata.
      edit: called with the dict of (array, type) by GGUF name before it is written.
    """
    import gguf
    import torch

    prefix, _, code = CASES[name]
    config = made.config
    architecture = {"Mistral": "llama"}.get(prefix, prefix.lower())
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if prefix in ("Llama", "Mistral"):
        writer.add_rope_dimension_count(head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] = {}
    if rope["rope_type"] == "llama3":  # the original frequencies over those that transformers uses
        plain = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
        divisors = plain / made.model.rotary_emb.inv_freq.numpy()
        tensors["rope_freqs.weight"] = (divisors.astype(np.float32), gguf.GGMLQuantizationType.F32)
    for parameter_name, parameter in made.named_parameters():
        stem, kind = parameter_name.rsplit(".", 1)
        layer = stem.split(".")[2] if stem.startswith("model.layers.") else None
        short = _NAMES[stem if layer is None else stem.split(".", 3)[3]]
        if prefix == "Olmo2" and short == "ffn_norm":
            short = "post_attention_norm"
        array = parameter.detach().numpy()
        if short in ("attn_q", "attn_k") and architecture in ("llama", "smollm3"):
            heads = config.num_attention_heads if short == "attn_q" else config.num_key_value_heads
            stored = interleaved(array, heads)
        else:
            stored = array
        qtype = gguf.GGMLQuantizationType[code if array.ndim > 1 else "F32"]
        full = f"{short if layer is None else f'blk.{layer}.{short}'}.{kind}"
        tensors[full] = (gguf.quants.quantize(stored, qtype), qtype)
        left = gguf.quants.dequantize(gguf.quants.quantize(array, qtype), qtype).reshape(array.shape)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.array(left, np.float32)))
    if edit is not None:
        edit(tensors)
    if tokenizer is not None:
        tokenizer(writer)
    for tensor_name, (array, qtype) in tensors.items():
        writer.add_tensor(tensor_name, array, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(made: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of a transformers model."""
    import torch

    with torch.no_grad():
        return made(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()

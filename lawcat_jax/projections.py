"""The matrices and norms of one decoder layer, as one table: what the model builds, the adapters adapt, checkpoints name
and the mesh splits.

Plain data beside :mod:`lawcat_jax.config`; nothing here imports jax. A size is named by a letter: V vocabulary, D model
width, Q = H d (all query heads), N = Hkv d (all key/value heads), F width of the MLP, d one head.
"""

from __future__ import annotations

from typing import NamedTuple

from lawcat_jax.config import ModelConfig

AXES = {"V": "tensor", "D": "fsdp", "Q": "tensor", "N": "tensor", "F": "tensor"}
"""The mesh axis that splits a dimension of a matrix, by the letter of its size."""


class Projection(NamedTuple):
    """One matrix [inputs, outputs] of a decoder layer.

    ``name`` is also what ``LoraConfig.targets`` and ``ModelConfig.projection_biases`` call it. ``hf`` is the module's
    name within a layer of a Hugging Face checkpoint, unless the family renames it. ``lora``: adapters may be attached.
    """

    block: str
    name: str
    inputs: str
    outputs: str
    hf: str
    lora: bool

    @property
    def path(self) -> str:
        """Path of the module within a layer, e.g. ``attention/q_proj``."""
        return f"{self.block}/{self.name}"

    def sizes(self, config: ModelConfig) -> tuple[int, int]:
        """(inputs, outputs)."""
        sizes = axis_sizes(config)
        return sizes[self.inputs], sizes[self.outputs]

    def has_bias(self, config: ModelConfig) -> bool:
        """Whether a bias [outputs] belongs to it in this model."""
        return self.name in config.projection_biases

    @property
    def mesh_axes(self) -> tuple[str, str]:
        """Mesh axes over which inputs and outputs are split."""
        return AXES[self.inputs], AXES[self.outputs]


PROJECTIONS = (
    Projection("attention", "q_proj", "D", "Q", "self_attn.q_proj", True),
    Projection("attention", "k_proj", "D", "N", "self_attn.k_proj", True),
    Projection("attention", "v_proj", "D", "N", "self_attn.v_proj", True),
    Projection("attention", "o_proj", "Q", "D", "self_attn.o_proj", True),
    Projection("mlp", "gate_proj", "D", "F", "mlp.gate_proj", False),
    Projection("mlp", "up_proj", "D", "F", "mlp.up_proj", False),
    Projection("mlp", "down_proj", "F", "D", "mlp.down_proj", False),
)
ATTENTION = tuple(projection for projection in PROJECTIONS if projection.block == "attention")
MLP = tuple(projection for projection in PROJECTIONS if projection.block == "mlp")
LORA_TARGETS = tuple(projection.name for projection in PROJECTIONS if projection.lora)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size behind each letter."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "Q": config.num_heads * config.head_dim,
        "N": config.num_kv_heads * config.head_dim,
        "F": config.mlp_size,
        "d": config.head_dim,
    }


def norms(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """The RMS norms of a layer: path of the module -> (letter of its size, Hugging Face module name).

    ``input_norm`` and ``post_attention_norm`` stand before attention and MLP (Llama), ``attention_output_norm`` and
    ``mlp_output_norm`` behind them (OLMo 2). ``q_norm`` and ``k_norm`` normalise every head (Qwen3), or all heads of a
    token together (OLMo 2), before the rotary embedding.
    """
    found = {}
    if config.norm_position == "before":
        found["input_norm"] = ("D", "input_layernorm")
        found["post_attention_norm"] = ("D", "post_attention_layernorm")
    else:
        found["attention_output_norm"] = ("D", "post_attention_layernorm")
        found["mlp_output_norm"] = ("D", "post_feedforward_layernorm")
    if config.qk_norm != "none":
        per_head = config.qk_norm == "head"
        found["attention/q_norm"] = ("d" if per_head else "Q", "self_attn.q_norm")
        found["attention/k_norm"] = ("d" if per_head else "N", "self_attn.k_norm")
    return found

"""The architecture of the decoder: the facts that a Hugging Face ``config.json`` states."""

import dataclasses

from lawcat_jax.config.choices import Family, RopeKind
from lawcat_jax.config.tree import Node, choice_problems


@dataclasses.dataclass
class RopeScaling(Node):
    """Scaling of the rotary frequencies for contexts longer than the model was first trained on."""

    kind: RopeKind = "none"
    """How the frequencies are scaled."""
    factor: float = 1.0
    """[ratio] Longest context after scaling to longest before."""
    low_freq_factor: float = 1.0
    """[ratio] ``llama3``: original context over this is the shortest wavelength that is scaled in full."""
    high_freq_factor: float = 4.0
    """[ratio] ``llama3``: original context over this is the longest wavelength that is left as it is."""
    original_max_position_embeddings: int = 8192
    """[tokens] ``llama3``: the original context."""


@dataclasses.dataclass
class ModelConfig(Node):
    """Architecture of the decoder. In the paper's notation D = ``hidden_size``, H = ``num_heads``, Hkv =
    ``num_kv_heads``, d = ``head_dim``."""

    family: Family = "llama"
    """Decides which Hugging Face architecture is written back."""
    vocab_size: int = 32000
    """[tokens] Rows of the embedding."""
    hidden_size: int = 4096
    """[channels] Width D of the residual stream."""
    num_layers: int = 32
    """[layers] Depth."""
    num_heads: int = 32
    """[heads] Query heads H of a layer."""
    num_kv_heads: int = 32
    """[heads] Key and value heads Hkv of a layer; divides ``num_heads``."""
    head_dim: int = 128
    """[channels] Width d of a head; even."""
    mlp_size: int = 11008
    """[channels] Width of the gated MLP."""
    rms_norm_eps: float = 1e-5
    """[1] Added to the mean square in RMS norms."""
    rope_theta: float = 10000.0
    """[1] Base of the rotary frequencies."""
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    """Scaling of the rotary frequencies."""
    max_position_embeddings: int = 4096
    """[tokens] Context that the model was trained for."""
    tie_embeddings: bool = False
    """The output head is the embedding, transposed."""
    sliding_window: int | None = None
    """[tokens] Window of the softmax attention, the current token included (Mistral 0.1); None is no window."""
    bos_token_id: int | None = None
    """[token id] Beginning of a sequence; None if the model has no such token."""
    eos_token_ids: tuple[int, ...] = ()
    """[token id] Tokens that end generation."""
    pad_token_id: int | None = None
    """[token id] Padding."""


def model_problems(m: ModelConfig, path: str = "model") -> list[str]:
    """Values of an architecture that cannot be, one line each; types are taken as right."""
    problems = []
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size"):
        if getattr(m, name) < 1:
            problems.append(f"{path}.{name}: {getattr(m, name)} must be at least 1")
    if not problems and m.num_heads % m.num_kv_heads:
        problems.append(f"{path}.num_kv_heads: {m.num_kv_heads} does not divide num_heads {m.num_heads}")
    if m.head_dim % 2:
        problems.append(f"{path}.head_dim: {m.head_dim} must be even (rotary embedding)")
    problems += choice_problems(m, path)
    problems += choice_problems(m.rope_scaling, f"{path}.rope_scaling")
    if m.sliding_window is not None and m.sliding_window < 1:
        problems.append(f"{path}.sliding_window: {m.sliding_window} must be at least 1, or None")
    return problems

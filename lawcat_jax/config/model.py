"""The architecture of the decoder: the facts that a Hugging Face ``config.json`` states."""

import dataclasses

from lawcat_jax.config.choices import Family, LayerProjection, NormPosition, QkNorm, RopeKind
from lawcat_jax.config.tree import Node, choice_problems, limit_problems


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
    """[tokens] ``llama3``, ``yarn``, ``longrope``: the original context."""
    attention_factor: float = 1.0
    """[ratio] ``yarn``, ``longrope``: cosines and sines are multiplied by it."""
    beta_fast: float = 32.0
    """[turns] ``yarn``: pairs that turn more often than this within the original context are left as they are."""
    beta_slow: float = 1.0
    """[turns] ``yarn``: pairs that turn less often than this within the original context are scaled in full."""
    truncate: bool = True
    """``yarn``: the borders between fast and slow pairs are rounded to whole pairs."""
    short_factor: tuple[float, ...] = ()
    """[ratio] ``longrope``: divisor of the frequency of each rotated pair, for sequences within the original context."""
    long_factor: tuple[float, ...] = ()
    """[ratio] ``longrope``: the same for longer sequences."""


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
    full_attention_layers: tuple[int, ...] = ()
    """[layer number, from 0] Layers that see all tokens although there is a ``sliding_window``."""
    nope_layers: tuple[int, ...] = ()
    """[layer number, from 0] Layers without a rotary embedding (SmolLM3)."""
    partial_rotary_factor: float = 1.0
    """[share] How much of each head is rotated, its first dimensions (Phi-4)."""
    projection_biases: tuple[LayerProjection, ...] = ()
    """Projections with a bias."""
    qk_norm: QkNorm = "none"
    """Norm of q and k."""
    norm_position: NormPosition = "before"
    """Place of the norms of a layer."""

    def window(self, layer: int) -> int | None:
        """The softmax window of one layer in tokens, or None for all tokens."""
        return None if layer in self.full_attention_layers else self.sliding_window

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of each head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


_LIMITS = {"vocab_size": 2**24, "hidden_size": 2**18, "num_layers": 2**12, "num_heads": 2**14, "num_kv_heads": 2**14}
_LIMITS |= {"head_dim": 2**16, "mlp_size": 2**20, "max_position_embeddings": 2**31 - 1}


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
    problems += limit_problems(m, path, _LIMITS)
    problems += choice_problems(m, path)
    problems += _rope_problems(m, path)
    for name in ("full_attention_layers", "nope_layers"):
        odd = [layer for layer in getattr(m, name) if not 0 <= layer < m.num_layers]
        problems += [
            f"{path}.{name}: layer {layer} does not exist, the model has layers 0 to {m.num_layers - 1}"
            for layer in odd
        ]
    if m.rms_norm_eps <= 0:
        problems.append(f"{path}.rms_norm_eps: {m.rms_norm_eps} must be positive")
    if m.max_position_embeddings < 1:
        problems.append(f"{path}.max_position_embeddings: {m.max_position_embeddings} must be at least 1")
    for name in ("bos_token_id", "eos_token_ids", "pad_token_id"):
        value = getattr(m, name)
        for number in value if isinstance(value, tuple | list) else (value,):
            if number is not None and number < 0:
                problems.append(f"{path}.{name}: {number} must not be negative")
    if m.sliding_window is not None and m.sliding_window < 1:
        problems.append(f"{path}.sliding_window: {m.sliding_window} must be at least 1, or None")
    return problems


def _rope_problems(m: ModelConfig, path: str) -> list[str]:
    scaling, where = m.rope_scaling, f"{path}.rope_scaling"
    problems = choice_problems(scaling, where)
    if not 0 < m.partial_rotary_factor <= 1 or m.rotary_dim % 2:
        problems.append(
            f"{path}.partial_rotary_factor: {m.partial_rotary_factor} of head_dim {m.head_dim} should be an even number "
            "of dimensions, at least 2"
        )
    if m.rope_theta <= 1:
        problems.append(f"{path}.rope_theta: {m.rope_theta} must be above 1")
    for name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"):
        if getattr(scaling, name) <= 0:
            problems.append(f"{where}.{name}: {getattr(scaling, name)} must be positive")
    if scaling.original_max_position_embeddings < 2:
        number = scaling.original_max_position_embeddings
        problems.append(f"{where}.original_max_position_embeddings: {number} must be at least 2")
    if scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        problems.append(f"{where}.high_freq_factor: {high} must be above low_freq_factor {low}")
    if scaling.kind == "dynamic" and m.rotary_dim == 2:
        problems.append(f"{where}.kind: 'dynamic' needs more than 2 rotated dimensions a head")
    if scaling.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            numbers = getattr(scaling, name)
            if len(numbers) != m.rotary_dim // 2 or min(numbers, default=0) <= 0:
                problems.append(f"{where}.{name}: should be {m.rotary_dim // 2} positive numbers, one a rotated pair")
    return problems

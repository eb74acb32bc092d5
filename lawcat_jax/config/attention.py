"""What replaces softmax attention: the token mixer with the switches of the paper's ablations, and LoRA."""

import dataclasses
import typing

from lawcat_jax.config.choices import (
    Conv,
    FeatureMap,
    GateKind,
    Implementation,
    Init,
    MixerKind,
    Projection,
    WindowKind,
)
from lawcat_jax.config.tree import Node, choice_problems


@dataclasses.dataclass
class AttentionConfig(Node):
    """The token mixer of every linearised layer (paper section 3). The defaults are the paper's layer; the switches are
    its ablations. Letters: H heads, d = head_dim, f scores and K features per head, D = hidden_size."""

    kind: MixerKind = "lawcat"
    """The token mixer."""
    conv: Conv = "on"
    """Causal convolution on q and k, in front of the feature maps."""
    conv_size: int = 4
    """[tokens] Taps of a convolution, the current token included."""
    feature_map: FeatureMap = "softmax_dim"
    """Non-negative features of q and k."""
    feature_dim: int = 0
    """[scores] f; 0 chooses f so that K = d (d / 2 for the two-sided maps)."""
    tie_qk: bool = True
    """q and k share one feature map per head; maps of their own start as copies of each other."""
    normalize: bool = True
    """Divide by the gated sum of keys, as softmax does by its sum."""
    rope_linear: bool = False
    """Rotate q and k of the linear branch too (the paper does not)."""
    window_size: int = 0
    """[tokens] Softmax window over the last tokens, under one denominator with the linear part (``kind`` "window" has no
    such part); 0 is no window."""
    window_kind: WindowKind = "sliding"
    """Which tokens a window of w = ``window_size`` holds."""
    affine_window: bool = False
    """Window and linear part have weights w and 1 - w; otherwise w and 1."""
    sinks: int = 0
    """[tokens] First tokens that the softmax window always sees."""
    gate_kind: GateKind = "per_dim"
    """Forget gate of the state."""
    gate_rank: int = 32
    """[channels] Rank of the gate's two matrices, D -> rank -> Hkv * K; 0 is one full matrix."""
    gate_normalizer: float = 16.0
    """[1] log g = log sigmoid(logit) / this."""
    gate_lower_bound: float | None = -1.25
    """[nats per token] Log-gates below it are raised to it, which keeps the kernels exact; None is no bound."""
    gate_half_life: float = 16.0
    """[tokens] Half-life of the state that the initial gate bias gives."""
    gate_half_life_max: float | None = None
    """[tokens] With it, initial half-lives grow geometrically over heads and features from ``gate_half_life`` to it."""
    softmax_layers: tuple[int, ...] = ()
    """[layer index] Layers (from 0) that keep softmax attention."""
    output_gate: bool = False
    """Multiply the output by a learned gate of the layer's input."""
    init: Init = "identity"
    """Initial values of convolution, feature maps and gate."""
    implementation: Implementation | None = None
    """Kernel backend; None is the best that supports the device and the shapes, a name is strict."""

    @property
    def rotates(self) -> bool:
        """Whether any layer of the student uses the rotary embedding."""
        return self.kind != "lawcat" or self.window_size > 0 or self.rope_linear or bool(self.softmax_layers)


@dataclasses.dataclass
class LoraConfig(Node):
    """Low-rank adapters on the projections of every linearised layer (paper section 3.3): W + (alpha / rank) A B."""

    rank: int = 8
    """[channels] Rank of A and B."""
    alpha: float = 16.0
    """[1] Scale of the adapter's output, divided by ``rank``."""
    dropout: float = 0.0
    """[probability] Dropout on the adapter's input."""
    targets: tuple[Projection, ...] = typing.get_args(Projection)
    """Projections that carry an adapter."""


def attention_problems(a: AttentionConfig, path: str = "config.attention") -> list[str]:
    """Values of a token mixer that cannot be, one line each; types are taken as right."""
    problems = choice_problems(a, path)
    if a.conv_size < 1:
        problems.append(f"{path}.conv_size: {a.conv_size} must be at least 1")
    for name in ("feature_dim", "window_size", "sinks", "gate_rank"):
        if getattr(a, name) < 0:
            problems.append(f"{path}.{name}: {getattr(a, name)} must not be negative")
    if a.sinks and not a.window_size:
        problems.append(
            f"{path}.sinks: {a.sinks} first tokens belong to a softmax window; set window_size, or sinks to 0"
        )
    for layer in a.softmax_layers:
        if layer < 0:
            problems.append(f"{path}.softmax_layers: {layer} must not be negative (layers count from 0)")
    if a.gate_normalizer <= 0:
        problems.append(f"{path}.gate_normalizer: {a.gate_normalizer} must be positive")
    if a.gate_lower_bound is not None and a.gate_lower_bound >= 0:
        problems.append(f"{path}.gate_lower_bound: {a.gate_lower_bound} must be negative, or None for no bound")
    if a.gate_half_life <= 0:
        problems.append(f"{path}.gate_half_life: {a.gate_half_life} must be positive (tokens)")
    if a.gate_half_life_max is not None and a.gate_half_life_max < a.gate_half_life:
        problems.append(f"{path}.gate_half_life_max: {a.gate_half_life_max} is below gate_half_life {a.gate_half_life}")
    return problems


def lora_problems(lora: LoraConfig, path: str = "config.lora") -> list[str]:
    """Values of LoRA that cannot be, one line each; types are taken as right."""
    problems = choice_problems(lora, path)
    if lora.rank < 1:
        problems.append(f"{path}.rank: {lora.rank} must be at least 1")
    if lora.alpha <= 0:
        problems.append(f"{path}.alpha: {lora.alpha} must be positive")
    if not lora.targets:
        problems.append(f"{path}.targets: name at least one projection")
    if not 0 <= lora.dropout < 1:
        problems.append(f"{path}.dropout: {lora.dropout} is outside [0, 1)")
    return problems

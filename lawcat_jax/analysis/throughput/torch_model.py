"""The same student in PyTorch: a transformers decoder whose attention has a LAWCAT branch on fla's ``chunk_gla``.

The paper's default design only (:func:`refusal`). Base weights are random; mixers and adapters start as ours do and are
float32, cast to the dtype of the activations where they are used, but for the gate, which stays float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lawcat_jax.checkpoints.hf.config_map import model_config_to_hf
from lawcat_jax.config import AttentionConfig, Config, LoraConfig, ModelConfig, StageConfig

EPS, FEATURE_FLOOR = 1e-10, 1e-12
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

Gla = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k [B, T, H, K], v [B, T, H, V], log gates [B, T, H, K]) -> o [B, T, H, V] without a normaliser, q not scaled."""
Convolution = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [B, T, C], taps [C, W], the last that of the current token) -> [B, T, C]."""


def refusal(config: Config, stage: str) -> str:
    """Why the peer cannot stand beside this configuration, or an empty string."""
    defaults, a = AttentionConfig(), config.attention
    fixed = ("kind", "conv", "feature_map", "feature_dim", "tie_qk", "normalize", "rope_linear", "window_size", "sinks")
    fixed += ("gate_kind", "softmax_layers", "output_gate", "init")
    for name in fixed:
        if getattr(a, name) != getattr(defaults, name):
            return f"the peer has the paper's default design only, and config.attention.{name} is {getattr(a, name)!r}"
    if a.gate_rank == 0:
        return "the peer has low-rank gates only, and config.attention.gate_rank is 0"
    if stage == "stage2" and config.stage2.kl_weight > 0:
        return "the peer has no KL to the teacher, and config.stage2.kl_weight is set"
    return ""


# Gated linear attention


def fla_gla() -> Gla:
    """fla's kernels.

    Raises:
      ImportError: fla is not installed.
    """
    from fla.ops.gla import chunk_gla  # pyright: ignore[reportMissingImports]  # on GPU machines

    return lambda q, k, v, log_g: chunk_gla(q, k, v, log_g, scale=1.0)[0]


def reference_gla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_g: torch.Tensor, chunk: int = 16):
    """The recurrence in float32, in chunks: S_t = diag(e^g_t) S_(t-1) + k_t v_t^T, o_t = S_t^T q_t. For any device."""
    length, dtype = q.shape[1], v.dtype
    q, k, v, log_g = (F.pad(x.float(), (0, 0, 0, 0, 0, -length % chunk)).transpose(1, 2) for x in (q, k, v, log_g))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()[..., None]
    outputs = []
    for start in range(0, q.shape[2], chunk):
        qc, kc, vc, g = (x[:, :, start : start + chunk] for x in (q, k, v, log_g))
        total = g.cumsum(2)
        # Every exponent is at most 0, whatever the gates: a decay from a later row j > i is masked before exp.
        decay = (total[:, :, :, None] - total[:, :, None]).masked_fill(~causal, -math.inf).exp()
        scores = torch.einsum("bhik,bhjk,bhijk->bhij", qc, kc, decay)
        outputs.append(scores @ vc + (qc * total.exp()) @ state)
        rest = (total[:, :, -1:] - total).exp()
        state = total[:, :, -1].exp()[..., None] * state + (kc * rest).transpose(2, 3) @ vc
    return torch.cat(outputs, 2).transpose(1, 2)[:, :length].to(dtype)


def _widened(gla: Gla, q, k, v, log_g, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    ones = v.new_zeros(*v.shape[:-1], width - v.shape[-1])
    ones[..., 0] = 1
    o = gla(q, k, torch.cat([v, ones], -1), log_g)
    return o[..., : v.shape[-1]], o[..., v.shape[-1] : v.shape[-1] + 1]


NORMALISERS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    # One more value column that is always 1 (the authors' code): rows of an odd number of elements.
    "widened": lambda gla, q, k, v, g: _widened(gla, q, k, v, g, v.shape[-1] + 1),
    # The same with zeros up to a multiple of 16, so that rows are aligned and loads are wide.
    "padded": lambda gla, q, k, v, g: _widened(gla, q, k, v, g, v.shape[-1] + 16 - v.shape[-1] % 16),
    # A second call for the denominator alone (16 columns: the fewest that the kernels' products take).
    "second_call": lambda gla, q, k, v, g: (gla(q, k, v, g), gla(q, k, torch.ones_like(v[..., :16]), g)[..., :1]),
}
"""Ways to a numerator and a denominator: (gla, q, k, v, log_g) -> ([B, T, H, V], [B, T, H, 1])."""


# Convolutions


def shifted_sum(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """A sum of shifted products."""
    length, width = x.shape[1], taps.shape[1]
    rows, taps = F.pad(x, (0, 0, width - 1, 0)), taps.to(x.dtype)
    y = rows[:, :length] * taps[:, 0]
    for shift in range(1, width):
        y = torch.addcmul(y, rows[:, shift : shift + length], taps[:, shift])
    return y


def torch_conv1d(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """``F.conv1d`` with a group for every channel."""
    channels, width = taps.shape
    y = F.conv1d(x.transpose(1, 2), taps[:, None].to(x.dtype), padding=width - 1, groups=channels)
    return y[..., : x.shape[1]].transpose(1, 2)


def fla_conv1d(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """fla's Triton kernel.

    Raises:
      ImportError: fla is not installed.
    """
    from fla.modules.causal_conv1d import causal_conv1d  # pyright: ignore[reportMissingImports]  # on GPU machines

    return causal_conv1d(x.contiguous(), taps.to(x.dtype))[0]


CONVOLUTIONS: dict[str, Convolution] = {"fla": fla_conv1d, "shifted": shifted_sum, "conv1d": torch_conv1d}


# The student


class Mixer(nn.Module):
    """LAWCAT attention of one layer before Wo: convolutions, Hedgehog features, low-rank gate, normalised GLA."""

    def __init__(self, model: ModelConfig, attention: AttentionConfig, gla: Gla, normaliser: str, conv: Convolution):
        super().__init__()
        self.model, self.attention = model, attention
        self.gla, self.normaliser, self.convolve = gla, NORMALISERS[normaliser], conv
        heads, width, taps = model.num_heads, model.head_dim, attention.conv_size
        gates = model.num_kv_heads * 2 * (width // 2)
        identity = torch.full((heads * width, taps), 0.001)
        identity[:, -1] = 1.0
        self.conv_q, self.conv_k = nn.Parameter(identity), nn.Parameter(identity.clone())
        self.feature_map = nn.Parameter(torch.eye(width, width // 2).repeat(heads, 1, 1))
        self.gate_down = nn.Parameter(0.006 * torch.randn(model.hidden_size, attention.gate_rank))
        self.gate_up = nn.Parameter(0.006 * torch.randn(attention.gate_rank, gates))
        bias = -math.log(math.expm1(attention.gate_normalizer * math.log(2) / attention.gate_half_life))
        self.gate_bias = nn.Parameter(torch.full((gates,), bias))

    def forward(self, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] the layer's input after its norm, q [B, T, H, d] and k, v [B, T, Hkv, d] without rotation: the
        heads' output [B, T, H, d], float32.
        """
        batch, length, heads, width = q.shape
        group = heads // k.shape[2]
        k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
        q = self.convolve(q.reshape(batch, length, -1), self.conv_q).view(batch, length, heads, width)
        k = self.convolve(k.reshape(batch, length, -1), self.conv_k).view(batch, length, heads, width)
        log_g = self._log_gates(x).view(batch, length, -1, 2 * (width // 2)).repeat_interleave(group, dim=2)
        numerator, denominator = self.normaliser(self.gla, self._features(q), self._features(k), v, log_g)
        return numerator.float() / (denominator.float() + EPS)

    def _features(self, u: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bthd,hdf->bthf", u, self.feature_map.to(u.dtype))
        return torch.cat([scores.softmax(-1), (-scores).softmax(-1)], -1).clamp(min=FEATURE_FLOOR)

    def _log_gates(self, x: torch.Tensor) -> torch.Tensor:
        logits = x.float() @ self.gate_down @ self.gate_up + self.gate_bias
        log_g, bound = F.logsigmoid(logits) / self.attention.gate_normalizer, self.attention.gate_lower_bound
        return log_g if bound is None else log_g.clamp(min=bound)


class Adapter(nn.Module):
    """The low-rank addition to one projection."""

    def __init__(self, inputs: int, outputs: int, lora: LoraConfig):
        super().__init__()
        bound = inputs**-0.5
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        self.a = nn.Parameter(torch.empty(inputs, lora.rank).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(lora.rank, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, inputs] -> [B, T, outputs]."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return (x @ self.a.to(x.dtype)) @ (self.scale * self.b).to(x.dtype)


class StudentAttention(nn.Module):
    """Stands in for the attention module of a transformers layer.

    With ``transfer`` None it is the student. Else it is the teacher, and the student's loss (``transfer`` times the
    mean squared error of the outputs before Wo) is back-propagated at once: no gradient crosses a layer, so memory
    holds the activations of one. ``loss`` then has the layer's loss.
    """

    teacher: Any  # whatever attention module transformers has for the family

    def __init__(self, teacher: nn.Module, mixer: Mixer, adapters: nn.ModuleDict):
        super().__init__()
        self.teacher, self.mixer, self.adapters = teacher, mixer, adapters
        self.transfer: float | None = None
        self.loss: torch.Tensor | None = None

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **_: Any):
        """As the module that it replaces."""
        q, k, v = (self._project(name, hidden_states) for name in PROJECTIONS[:3])
        q, k, v = (x.view(*x.shape[:2], -1, self.teacher.head_dim) for x in (q, k, v))
        if self.transfer is None:
            o = self.mixer(hidden_states, q, k, v).to(hidden_states.dtype)
        else:
            o = self._softmax(q, k, v, position_embeddings, attention_mask)
            with torch.enable_grad():
                loss = self.transfer * F.mse_loss(self.mixer(hidden_states, q, k, v), o.float())
            loss.backward()
            self.loss = loss.detach()
        return self._project("o_proj", o.flatten(2)), None

    def _project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = getattr(self.teacher, name)(x)
        return y + self.adapters[name](x) if name in self.adapters else y

    def _softmax(self, q, k, v, position_embeddings, attention_mask) -> torch.Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return sdpa_attention_forward(self.teacher, q, k, v, attention_mask, scaling=self.teacher.scaling)[0]


def build(
    config: Config,
    stage: str,
    *,
    dtype: torch.dtype,
    device: str,
    gla: Gla,
    normaliser: str,
    conv: Convolution,
) -> Any:
    """A transformers causal language model with random weights, frozen but for what ``stage`` trains.

    Raises:
      ValueError: the stage trains pretrained weights.
    """
    import transformers

    model, lora = config.teacher.architecture, config.lora if stage == "stage2" else None
    assert model is not None  # the request states it
    values = model_config_to_hf(model, str(dtype).removeprefix("torch."))
    hf = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(device):
        decoder = transformers.AutoModelForCausalLM.from_config(hf, dtype=dtype, attn_implementation="sdpa")
        decoder.requires_grad_(False)
        for layer in decoder.model.layers:
            mixer = Mixer(model, config.attention, gla, normaliser, conv)
            adapters: dict[str, nn.Module] = {}
            if lora is not None:
                sizes = {name: getattr(layer.self_attn, name) for name in lora.targets}
                adapters = {name: Adapter(x.in_features, x.out_features, lora) for name, x in sizes.items()}
            layer.self_attn = StudentAttention(layer.self_attn, mixer, nn.ModuleDict(adapters))
    _choose_trainable(decoder, getattr(config, stage), model)
    return decoder.train()


def attentions(decoder: Any) -> list[StudentAttention]:
    """The replaced attention modules, first layer first."""
    return [layer.self_attn for layer in decoder.model.layers]


_NAMES = {"gate_down": "gate_down/kernel", "gate_up": "gate_up/kernel", "gate_bias": "gate_up/bias"}


def student_parameters(attention: StudentAttention) -> Iterator[tuple[str, nn.Parameter]]:
    """(our path, parameter) of what the student adds to one layer; layouts are ours, but for the taps, which are
    [H d, W] here and [H, W, d] there.
    """
    for name, parameter in attention.mixer.named_parameters():
        yield f"mixers/{_NAMES.get(name, name)}", parameter
    for name, parameter in attention.adapters.named_parameters():
        yield f"lora/{name.replace('.', '/')}", parameter


def _choose_trainable(decoder: Any, stage: StageConfig, model: ModelConfig) -> None:
    import re

    from lawcat_jax.checkpoints.hf.mapping import base_shapes

    pretrained = [path for path in base_shapes(model) if any(re.search(p, path) for p in stage.trainable)]
    if pretrained:
        raise ValueError(f"the peer trains mixers and adapters only, and this stage trains {pretrained[0]} as well")
    for attention in attentions(decoder):
        for path, parameter in student_parameters(attention):
            parameter.requires_grad_(any(re.search(pattern, path) for pattern in stage.trainable))


def trainable_parameters(decoder: Any) -> list[nn.Parameter]:
    """What the optimizer works on."""
    return [parameter for parameter in decoder.parameters() if parameter.requires_grad]

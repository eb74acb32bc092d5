"""The implementations that users have today, in PyTorch: FlashAttention-2, cuDNN attention, fla's chunk_gla.

Each function gives a callable of no arguments, or raises with the reason why the peer is not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernels_pallas.benchmark.suite import Model


def _softmax_attention(backend: str, model: Model, batch: int, length: int, backward: bool) -> Callable[[], Any]:
    """Causal softmax attention with grouped kv heads, [B, H, T, d] bfloat16."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def draw(heads: int) -> Any:
        x = torch.randn(batch, heads, length, model.d, device="cuda", dtype=torch.bfloat16)
        return x.requires_grad_(backward)

    q, k, v = draw(model.heads), draw(model.kv_heads), draw(model.kv_heads)
    do = torch.randn_like(q)
    kind = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]

    def run() -> Any:
        with sdpa_kernel(kind):
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(o, (q, k, v), do) if backward else o

    run()
    return run


def _chunk_gla(normaliser: bool, model: Model, batch: int, length: int, backward: bool) -> Callable[[], Any]:
    """fla.ops.gla.chunk_gla; ``normaliser`` widens v by a column of ones, which is what a normalised layer needs."""
    import torch
    from fla.ops.gla import chunk_gla  # pyright: ignore[reportMissingImports]  # on GPU machines

    shape = (batch, length, model.heads, model.d)

    def draw() -> Any:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    q, k = draw().softmax(-1), draw().softmax(-1)
    v, g = draw(), torch.nn.functional.logsigmoid(draw()) / 16
    if normaliser:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    inputs = [x.detach().requires_grad_(backward) for x in (q, k, v, g)]
    do = torch.randn_like(v)

    def run() -> Any:
        o, _ = chunk_gla(*inputs, scale=1.0)
        return torch.autograd.grad(o, inputs, do) if backward else o

    run()
    return run


PEERS: dict[str, tuple[tuple[str, ...], Callable[..., Callable[[], Any]]]] = {
    "FlashAttention-2": (
        ("prefill", "forward+backward"),
        lambda *a: _softmax_attention("flash", *a),
    ),
    "cuDNN attention": (
        ("prefill", "forward+backward"),
        lambda *a: _softmax_attention("cudnn", *a),
    ),
    "fla chunk_gla": (("forward", "forward+backward"), lambda *a: _chunk_gla(False, *a)),
    "fla chunk_gla [v;1]": (("forward",), lambda *a: _chunk_gla(True, *a)),
}
"""Name of the peer -> (operations it is compared in, builder(model, batch, length, backward))."""

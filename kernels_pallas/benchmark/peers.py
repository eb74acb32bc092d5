"""What users have today: softmax attention and fla's chunk_gla in PyTorch, and other JAX libraries (``jax_peers``).

Each builder gives a callable of no arguments, or raises with the reason why the peer is not here: ImportError if it never is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from kernels_pallas.benchmark import jax_peers
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


def _flash_attention_3(model: Model, batch: int, length: int, backward: bool) -> Callable[[], Any]:
    """Causal softmax attention with grouped kv heads, [B, T, H, d] bfloat16, by FlashAttention-3's own package.

    PyTorch's ``activate_flash_attention_impl("FA3")`` imports the same package; it brings no kernels of its own.
    """
    import torch

    try:
        from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]
    except Exception as problem:  # one built for another PyTorch fails with whatever its loader raises
        raise ImportError(f"flash_attn_interface: {type(problem).__name__}: {problem}") from problem

    def draw(heads: int) -> Any:
        x = torch.randn(batch, length, heads, model.d, device="cuda", dtype=torch.bfloat16)
        return x.requires_grad_(backward)

    q, k, v = draw(model.heads), draw(model.kv_heads), draw(model.kv_heads)
    do = torch.randn_like(q)

    def run() -> Any:
        o = flash_attn_func(q, k, v, causal=True)
        o = o[0] if isinstance(o, tuple) else o  # earlier releases also return the sums of the softmax
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


class Peer(NamedTuple):
    """Something to compare with."""

    kind: str
    """"linear" or "softmax" attention."""

    operations: tuple[str, ...]
    """It is compared in these."""

    build: Callable[..., Callable[[], Any]] | None = None
    """(model, batch, length, backward) -> PyTorch callable; None: an entry of ``jax_peers.PEERS``, timed as this project's jobs."""


_SOFTMAX, _LINEAR = ("prefill", "forward+backward"), ("forward", "forward+backward")

PEERS: dict[str, Peer] = {
    **{label: Peer("linear", _LINEAR) for label in jax_peers.PEERS},
    "FlashAttention-2": Peer("softmax", _SOFTMAX, lambda *a: _softmax_attention("flash", *a)),
    "cuDNN attention": Peer("softmax", _SOFTMAX, lambda *a: _softmax_attention("cudnn", *a)),
    "FlashAttention-3": Peer("softmax", _SOFTMAX, _flash_attention_3),
    "fla chunk_gla": Peer("linear", _LINEAR, lambda *a: _chunk_gla(False, *a)),
    "fla chunk_gla [v;1]": Peer("linear", ("forward",), lambda *a: _chunk_gla(True, *a)),
}
"""Name of the peer -> what it is, in the order in which they are measured: fla, which tunes for minutes, comes last."""

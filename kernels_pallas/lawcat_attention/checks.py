"""Argument checks of LAWCAT attention."""

from __future__ import annotations

from kernels_pallas.checks import check_array, check_lengths, check_shape, check_state, describe


def check_layer(q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, lengths, shards: int = 1) -> None:
    """Shapes and dtypes of the arrays of ``lawcat_attention``, and ``lengths`` within the ``shards`` T tokens of a
    sequence; raises ValueError naming the argument."""
    for name, x in (("q", q), ("k", k), ("v", v), ("gate_logits", gate_logits)):
        check_array(name, x, 4)
    for name, x in (("conv_q", conv_q), ("conv_k", conv_k), ("phi", phi)):
        check_array(name, x, 3)
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    if 0 in q.shape:
        raise ValueError(f"q: every dimension must be at least 1, got {describe(q)}")
    if 0 in v.shape or 0 in phi.shape:
        name, x = ("v", v) if 0 in v.shape else ("phi", phi)
        raise ValueError(f"{name}: every dimension must be at least 1, got {describe(x)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: its {kv_heads} heads must divide the {heads} heads of q, got {describe(k)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {describe(x)}")
    check_shape("k", k, (batch, length, kv_heads, width), "[B, T, Hkv, d]")
    check_shape("v", v, (batch, length, kv_heads, v.shape[3]), "[B, T, Hkv, V]")
    check_shape("phi", phi, (heads, width, phi.shape[2]), "[H, d, f]")
    features = 2 * phi.shape[2]
    check_shape("gate_logits", gate_logits, (batch, length, kv_heads, features), "[B, T, Hkv, 2 f]")
    taps = conv_q.shape[1]
    if taps < 1:
        raise ValueError(f"conv_q: needs at least one tap, got {describe(conv_q)}")
    check_shape("conv_q", conv_q, (heads, taps, width), "[H, W, d]")
    check_shape("conv_k", conv_k, (heads, taps, width), "[H, W, d]")
    if initial_state is not None:
        check_state(initial_state, batch, heads, features, v.shape[3])
    if conv_state is not None:
        if not isinstance(conv_state, (tuple, list)) or len(conv_state) != 2:
            raise ValueError(f"conv_state: expected a pair (q rows, k rows), got {type(conv_state).__name__}")
        for name, x, rows in (("q rows", conv_state[0], heads), ("k rows", conv_state[1], kv_heads)):
            check_array(f"conv_state {name}", x, 4)
            check_shape(f"conv_state {name}", x, (batch, taps - 1, rows, width), "[B, W - 1, heads, d]")
    if lengths is not None:
        check_lengths(lengths, batch, shards * length)

"""Float64 NumPy oracle of gated linear attention and of LAWCAT attention.

Gated linear attention is a loop over tokens, and its gradient another one from the last token to the first, written by
hand. Nothing here shares code with the kernels. Slow: milliseconds per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

EPS = 1e-10

KEPT = 256
"""Tokens between two states that are kept for the way back: a long sequence would fill the memory with them."""


def _expand(x: np.ndarray, heads: int) -> np.ndarray:
    return np.repeat(np.asarray(x, np.float64), heads // x.shape[2], axis=2)


def gla(
    q: Float[np.ndarray, "B T H K"],
    k: Float[np.ndarray, "B T H K"],
    v: Float[np.ndarray, "B T Hv V"],
    log_g: Float[np.ndarray, "B T Hg K"],
    state: Sequence[np.ndarray] | None = None,
    *,
    normalize: bool = True,
    bound: float | None = None,
    cotangents: Sequence[np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Gated linear attention: {o, S, z}, and with ``cotangents`` (do, dS, dz) also {dq, dk, dv, dlog_g, dS0, dz0}.

    Arguments as ``kernels_pallas.gated_linear_attention`` takes them; gradients of shared heads are summed. The gate bound
    is applied here, so that its zero gradient below the bound is part of what is tested.
    """
    heads, value_heads, gate_heads = q.shape[2], v.shape[2], log_g.shape[2]
    raw = _expand(log_g, heads)
    q, k, v = np.asarray(q, np.float64), np.asarray(k, np.float64), _expand(v, heads)
    gates = raw if bound is None else np.where(raw < bound, bound, raw)
    batch, length, _, features = q.shape
    S = np.zeros((batch, heads, features, v.shape[3])) if state is None else np.asarray(state[0], np.float64)
    z = np.zeros((batch, heads, features)) if state is None else np.asarray(state[1], np.float64)
    decay = np.exp(gates)

    def step(t, S, z):
        return decay[:, t, ..., None] * S + k[:, t, ..., None] * v[:, t, :, None, :], decay[:, t] * z + k[:, t]

    kept = []
    o = np.zeros(v.shape)
    for t in range(length):
        if t % KEPT == 0:
            kept.append((S, z))
        S, z = step(t, S, z)
        num = np.einsum("bhkv,bhk->bhv", S, q[:, t])
        o[:, t] = num / (np.sum(z * q[:, t], -1) + EPS)[..., None] if normalize else num
    out = {"o": o, "S": S, "z": z}
    if cotangents is None:
        return out

    do, dS, dz = (np.asarray(x, np.float64) for x in cotangents)
    dq, dk, dv, dlog_g = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape), np.zeros(raw.shape)
    for t in reversed(range(length)):
        first = t - t % KEPT
        if t + 1 == length or t % KEPT == KEPT - 1:
            states = [kept[first // KEPT]]
            for n in range(first, t + 1):
                states.append(step(n, *states[-1]))
        S, z = states[t + 1 - first]
        if normalize:
            den = np.sum(z * q[:, t], -1) + EPS
            dn = do[:, t] / den[..., None]
            delta = -np.sum(dn * o[:, t], -1)
        else:
            dn, delta = do[:, t], np.zeros(do.shape[:1] + do.shape[2:3])
        dq[:, t] = np.einsum("bhkv,bhv->bhk", S, dn) + delta[..., None] * z
        dS = dS + q[:, t, ..., None] * dn[:, :, None, :]
        dz = dz + delta[..., None] * q[:, t]
        dk[:, t] = np.einsum("bhkv,bhv->bhk", dS, v[:, t]) + dz
        dv[:, t] = np.einsum("bhkv,bhk->bhv", dS, k[:, t])
        before_S, before_z = states[t - first]
        dlog_g[:, t] = decay[:, t] * (np.sum(before_S * dS, -1) + before_z * dz)
        dS, dz = decay[:, t, ..., None] * dS, decay[:, t] * dz
    if bound is not None:
        dlog_g = np.where(raw < bound, 0.0, dlog_g)

    def group(x, count):
        return x.reshape(batch, length, count, -1, x.shape[3]).sum(axis=3)

    return out | {
        "dq": dq,
        "dk": dk,
        "dv": group(dv, value_heads),
        "dlog_g": group(dlog_g, gate_heads),
        "dS0": dS,
        "dz0": dz,
    }


def lawcat_attention(
    q,
    k,
    v,
    gate_logits,
    conv_q,
    conv_k,
    phi,
    initial_state,
    conv_state,
    bound=-1.25,
    gate_normalizer=16.0,
    cotangents: Sequence[np.ndarray] | None = None,
):
    """(o, S, z) of LAWCAT attention; arguments as ``kernels_pallas.lawcat_attention`` takes them, all of them given.

    With ``cotangents`` (do, dS, dz, those of the last rows of q and of k) a dict instead: o, S, z, and the gradient of every
    array as d + its name ("dS0", "dz0" for the state, "drows_q", "drows_k" for conv_state).
    """
    q, k, v, gate_logits, conv_q, conv_k, phi = (
        np.asarray(x, np.float64) for x in (q, k, v, gate_logits, conv_q, conv_k, phi)
    )
    kv_heads, group, taps, length = k.shape[2], q.shape[2] // k.shape[2], conv_q.shape[1], q.shape[1]
    tails = [np.asarray(x, np.float64) for x in conv_state]
    k, tails[1], v, gate_logits = (np.repeat(x, group, axis=2) for x in (k, tails[1], v, gate_logits))
    rows = [np.concatenate([tail, x], axis=1) for tail, x in zip(tails, (q, k), strict=True)]

    def features(x, w):
        u = sum(w[None, None, :, j] * x[:, j : j + length] for j in range(taps))
        s = np.einsum("bthd,hdf->bthf", u, phi)
        e, f = np.exp(s - s.max(-1, keepdims=True)), np.exp(s.min(-1, keepdims=True) - s)
        return u, (e / e.sum(-1, keepdims=True), f / f.sum(-1, keepdims=True))

    (u_q, p_q), (u_k, p_k) = features(rows[0], conv_q), features(rows[1], conv_k)
    floor = 1e-12
    found = [np.maximum(np.concatenate(p, -1), floor) for p in (p_q, p_k)]
    log_g = -np.logaddexp(0, -gate_logits) / gate_normalizer
    gates = None if cotangents is None else cotangents[:3]
    out = gla(*found, v, log_g, initial_state, bound=bound, cotangents=gates)
    if cotangents is None:
        return out["o"], out["S"], out["z"]

    def back(d, x, u, p, w):
        """Cotangents of (rows before and of x, w, phi) from that of the features."""
        d = np.where(np.concatenate(p, -1) > floor, d, 0.0)
        plus, minus = (
            y * (part - np.sum(y * part, -1, keepdims=True)) for y, part in zip(p, np.split(d, 2, -1), strict=True)
        )
        du = np.einsum("bthf,hdf->bthd", plus - minus, phi)
        dx = np.zeros_like(x)
        for j in range(taps):
            dx[:, j : j + length] += w[None, None, :, j] * du
        dw = np.stack([np.einsum("bthd,bthd->hd", du, x[:, j : j + length]) for j in range(taps)], 1)
        return dx, dw, np.einsum("bthd,bthf->hdf", u, plus - minus)

    def group_sum(x):
        return x.reshape(*x.shape[:2], kv_heads, group, x.shape[3]).sum(3)

    dx_q, dconv_q, dphi_q = back(out["dq"], rows[0], u_q, p_q, conv_q)
    dx_k, dconv_k, dphi_k = back(out["dk"], rows[1], u_k, p_k, conv_k)
    dx_k = group_sum(dx_k)
    for dx, last in zip((dx_q, dx_k), cotangents[3:], strict=True):
        dx[:, length:] += last
    return {
        **{name: out[name] for name in ("o", "S", "z", "dS0", "dz0")},
        "dq": dx_q[:, taps - 1 :],
        "dk": dx_k[:, taps - 1 :],
        "dv": group_sum(out["dv"]),
        "dgate_logits": group_sum(out["dlog_g"] / (1 + np.exp(gate_logits)) / gate_normalizer),
        "dconv_q": dconv_q,
        "dconv_k": dconv_k,
        "dphi": dphi_q + dphi_k,
        "drows_q": dx_q[:, : taps - 1],
        "drows_k": dx_k[:, : taps - 1],
    }


def error(got, want) -> float:
    """Relative root mean square error of ``got`` against ``want``."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.sqrt(np.mean((got - want) ** 2) / max(np.mean(want**2), 1e-30)))

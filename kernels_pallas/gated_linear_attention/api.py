"""Argument checks, choice of the implementation, and the one custom_vjp per operation."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.causal_conv1d import xla as conv_xla
from kernels_pallas.common import interpret_mode, match_varying, target_platform
from kernels_pallas.gated_linear_attention import decode as decode_xla
from kernels_pallas.gated_linear_attention import reference, scan
from kernels_pallas.lawcat_attention import xla as lawcat_xla

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("reference", "scan", "pallas_mosaic_gpu", "pallas_triton", "pallas_tpu")

# implementation -> (file name of the backend, platform it needs), the preferred one of a platform first
_PALLAS = {
    "pallas_mosaic_gpu": ("mosaic_gpu", "cuda"),
    "pallas_triton": ("triton", "cuda"),
    "pallas_tpu": ("tpu", "tpu"),
}

_local = threading.local()


@contextlib.contextmanager
def default_implementation(implementation: str | None) -> Iterator[None]:
    """Inside, ``implementation=None`` means this one, and is as strict as passing the name. Acts while tracing, not on
    compiled code.

    Raises ValueError for an unknown name.
    """
    _check_name(implementation)
    before = getattr(_local, "implementation", None)
    _local.implementation = implementation
    try:
        yield
    finally:
        _local.implementation = before


def _check_name(implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: unknown {implementation!r}, choose one of {', '.join(IMPLEMENTATIONS)} or None"
        )


@functools.cache
def _module(name: str) -> ModuleType | None:
    """A backend module, or None where this installation has no such file."""
    try:
        return importlib.import_module(f"kernels_pallas.{name}")
    except ModuleNotFoundError as problem:
        if problem.name is not None and problem.name.startswith("kernels_pallas."):
            return None
        raise


def _refusal(implementation: str, platform: str, kind: str, *args: Any, **options: Any) -> str | None:
    """Why a Pallas implementation cannot take a case, or None. ``kind`` is the folder of an op."""
    file, needed = _PALLAS[implementation]
    if platform != needed and not interpret_mode():
        return f"it runs on {needed} and this call is for {platform}"
    try:
        module = _module(f"{kind}.{file}")
    except ImportError as problem:
        return f"it cannot be imported with jax {jax.__version__}: {problem}"
    if module is None:
        return f"there is no {kind} kernel for {needed}"
    return module.supports(*args, **options)


def implementation_for(
    q, k, v, log_g, *, normalize=True, gate_lower_bound=-1.25, implementation=None, platform=None
) -> str:
    """The name of the implementation that gated_linear_attention uses for these arrays (or ShapeDtypeStructs).

    None picks, for the platform of ``kernels_pallas.target_platform``: on "cuda" pallas_mosaic_gpu, else pallas_triton, and
    on "tpu" pallas_tpu, where they support the case, else scan. A name is strict: ValueError with the reason when it
    cannot serve.
    """
    _check_name(implementation)
    implementation = implementation or getattr(_local, "implementation", None)
    platform = platform or target_platform(q, k, v, log_g)
    options = {"normalize": normalize, "lower_bound": gate_lower_bound, "differentiated": True}
    if implementation is None:
        for name, (_, needed) in _PALLAS.items():
            if (
                platform == needed
                and _refusal(name, platform, "gated_linear_attention", q, k, v, log_g, **options) is None
            ):
                return name
        return "scan"
    if implementation in _PALLAS:
        reason = _refusal(implementation, platform, "gated_linear_attention", q, k, v, log_g, **options)
        if reason is not None:
            raise ValueError(f"implementation: {implementation!r} cannot be used: {reason}")
    return implementation


class _Spec(NamedTuple):
    """The static part of a call, hashable for custom_vjp."""

    implementation: str
    normalize: bool
    lower_bound: float | None


def _backend(implementation: str, backward: bool = False) -> ModuleType:
    if implementation == "reference":
        return reference
    if implementation == "scan":
        return scan
    file = _PALLAS[implementation][0]
    return importlib.import_module(f"kernels_pallas.gated_linear_attention.{file}{'_vjp' if backward else ''}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gla(spec: _Spec, q, k, v, log_g, initial_state):
    run = _backend(spec.implementation).forward
    o, state, _ = run(
        q, k, v, log_g, initial_state, normalize=spec.normalize, lower_bound=spec.lower_bound, save_residuals=False
    )
    return o, state


def _gla_forward(spec: _Spec, q, k, v, log_g, initial_state):
    run = _backend(spec.implementation).forward
    o, state, residuals = run(
        q, k, v, log_g, initial_state, normalize=spec.normalize, lower_bound=spec.lower_bound, save_residuals=True
    )
    return (o, state), (residuals, initial_state is None)


def _gla_backward(spec: _Spec, residuals, cotangents):
    residuals, no_state = residuals
    do, dstate = cotangents
    run = _backend(spec.implementation, backward=True).backward
    *grads, dstate = run(residuals, do, tuple(dstate), normalize=spec.normalize, lower_bound=spec.lower_bound)
    return *grads, None if no_state else tuple(dstate)


_gla.defvjp(_gla_forward, _gla_backward)


# Checks


def _describe(x: Any) -> str:
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"


def _check_array(name: str, x: Any, dims: int, *, dtypes=("float32", "bfloat16")) -> None:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{name}: expected an array, got {type(x).__name__}")
    if len(x.shape) != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got {_describe(x)}")
    if str(x.dtype) not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(dtypes)}, got {_describe(x)}")


def _check_shape(name: str, x: Any, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {meaning} = {list(shape)}, got {_describe(x)}")


def _check_bound(bound: Any) -> None:
    if bound is None:
        return
    if isinstance(bound, jax.core.Tracer) or not isinstance(bound, (int, float, np.floating, np.integer)):
        raise ValueError(f"gate_lower_bound: expected a static float or None, got {type(bound).__name__}")
    if not bound < 0 or not np.isfinite(bound):
        raise ValueError(f"gate_lower_bound: expected a finite number below 0 (nats a token) or None, got {bound}")


def _check_state(state: Any, batch: int, heads: int, features: int, width: int, name: str = "initial_state") -> None:
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise ValueError(f"{name}: expected a pair (S, z) of arrays, got {type(state).__name__}")
    for part, x, shape, meaning in (
        ("S", state[0], (batch, heads, features, width), "[B, H, K, V]"),
        ("z", state[1], (batch, heads, features), "[B, H, K]"),
    ):
        _check_array(f"{name} {part}", x, len(shape), dtypes=("float32",))
        _check_shape(f"{name} {part}", x, shape, meaning)


def _check_qkvg(q, k, v, log_g, dims: int) -> None:
    """Shapes [B, T, heads, width] (dims 4) or [B, heads, width] (dims 3)."""
    for name, x in (("q", q), ("k", k), ("v", v), ("log_g", log_g)):
        _check_array(name, x, dims)
    lead, heads, features = q.shape[:-2], q.shape[-2], q.shape[-1]
    if 0 in q.shape or v.shape[-1] == 0:
        raise ValueError(f"q: every dimension must be at least 1, got q {_describe(q)} and v {_describe(v)}")
    _check_shape("k", k, q.shape, "the shape of q")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {_describe(x)}")
    for name, x in (("v", v), ("log_g", log_g)):
        if x.shape[:-2] != lead:
            raise ValueError(f"{name}: expected leading dimensions {list(lead)} like q, got {_describe(x)}")
        if x.shape[-2] == 0 or heads % x.shape[-2]:
            raise ValueError(f"{name}: its {x.shape[-2]} heads must divide the {heads} heads of q, got {_describe(x)}")
    if log_g.shape[-1] != features:
        raise ValueError(f"log_g: expected {features} features like q, got {_describe(log_g)}")


def _check_values(q, k, log_g) -> None:
    """With KERNELS_PALLAS_CHECK=1 and concrete arrays: refuse what the kernels assume away (it would overflow, or
    divide by ~0)."""
    if os.environ.get("KERNELS_PALLAS_CHECK", "") != "1":
        return
    for name, x, sign in (("q", q, 1), ("k", k, 1), ("log_g", log_g, -1)):
        if isinstance(x, jax.core.Tracer):
            continue
        if not bool(jnp.all(jnp.isfinite(x))):
            raise ValueError(f"{name}: holds values that are not finite")
        if bool(jnp.any(sign * x < 0)):
            extreme = float(jnp.min(x) if sign > 0 else jnp.max(x))
            raise ValueError(f"{name}: must be {'non-negative' if sign > 0 else 'at most 0'}, found {extreme}")


def _check_sharding(name: str, x: Any) -> None:
    """Refuse a concrete array whose sequence axis is sharded: the op would gather it onto every device."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        # Under explicit sharding the type of a tracer says how it is sharded as well.
        spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ()) if isinstance(x, jax.core.Tracer) else ()
    else:
        spec = getattr(x.sharding, "spec", ())
        sizes = dict(getattr(getattr(x.sharding, "mesh", None), "shape", {}))
        axes = spec[1] if len(spec) > 1 else None
        axes = (axes,) if isinstance(axes, str) else axes or ()
        if all(sizes.get(axis, 1) == 1 for axis in axes):
            return
    if len(spec) > 1 and spec[1]:
        raise ValueError(
            f"{name}: its sequence axis is sharded over {spec[1]!r}; call kernels_pallas.context_parallel "
            "under jax.shard_map, or shard batch and heads instead"
        )


def _bounded(log_g: jax.Array, bound: float | None) -> jax.Array:
    # where, not maximum: at a tie maximum passes half of the gradient. XLA fuses this into the producer of log_g.
    return log_g if bound is None else jnp.where(log_g < bound, jnp.asarray(bound, log_g.dtype), log_g)


def _alike(*arrays: Any) -> tuple[Any, ...]:
    """The arrays marked as varying over the same mesh axes, so that a custom_vjp may return gradients that do (under
    shard_map)."""
    leaves = jax.tree.leaves(arrays)
    return jax.tree.map(lambda x: match_varying(x, *leaves), arrays)


# Operations


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv V"],
    log_g: Float[Array, "B T Hg K"],
    *,
    initial_state: tuple[Float[Array, "B H K V"], Float[Array, "B H K"]] | None = None,
    normalize: bool = True,
    gate_lower_bound: float | None = -1.25,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], tuple[Float[Array, "B H K V"], Float[Array, "B H K"]]]:
    """Normalised gated linear attention (arXiv 2509.18467, with the gates of GLA, 2312.06635)::

        S_t = diag(e^g_t) S_(t-1) + k_t v_t^T      z_t = e^g_t z_(t-1) + k_t      o_t = S_t^T q_t / (z_t.q_t + 1e-10)

    Args:
      q, k: non-negative features, float32 or bfloat16, one dtype for q, k and v.
      v: values; Hv divides H, query head h reads v head h // (H / Hv).
      log_g: natural logarithm of the gates, <= 0 and finite, float32 or bfloat16; Hg divides H, same rule.
      initial_state: (S, z) float32, or None for zeros.
      normalize: divide by the denominator; when False o = S^T q (z is carried all the same).
      gate_lower_bound: nats a token, below 0, or None. Lower gates are raised to it, with zero gradient there. A bound
        >= -1.25 allows 64-token chunks with one reference; None costs more.
      implementation: "reference", "scan", "pallas_mosaic_gpu", "pallas_triton", "pallas_tpu" or None, the best for the
        platform (implementation_for).

    Returns:
      o in v.dtype and the state (S, z) after the last token, float32. Differentiable in every array argument, state
      included.

    Raises:
      ValueError: naming the argument, for a wrong shape or dtype, heads that do not divide, a sequence axis known to be
        sharded, or an implementation that cannot serve. With KERNELS_PALLAS_CHECK=1 also for concrete values of the
        wrong sign.
    """
    _check_qkvg(q, k, v, log_g, 4)
    _check_bound(gate_lower_bound)
    if initial_state is not None:
        _check_state(initial_state, q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        initial_state = tuple(initial_state)
    for name, x in (("q", q), ("k", k), ("v", v), ("log_g", log_g)):
        _check_sharding(name, x)
    _check_values(q, k, log_g)
    name = implementation_for(
        q, k, v, log_g, normalize=normalize, gate_lower_bound=gate_lower_bound, implementation=implementation
    )
    spec = _Spec(name, bool(normalize), None if gate_lower_bound is None else float(gate_lower_bound))
    if not getattr(_backend(name), "APPLIES_BOUND", False):
        log_g = _bounded(log_g, gate_lower_bound)
    return _gla(spec, *_alike(q, k, v, log_g, initial_state))


def decode_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B Hv V"],
    log_g: Float[Array, "B Hg K"],
    state: tuple[Float[Array, "B H K V"], Float[Array, "B H K"]],
    *,
    normalize: bool = True,
    gate_lower_bound: float | None = -1.25,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H V"], tuple[Float[Array, "B H K V"], Float[Array, "B H K"]]]:
    """One token of gated_linear_attention: the same arguments without T, and the state before the token.

    Returns (o [B, H, V] in v.dtype, state). Raises ValueError as gated_linear_attention. A Pallas decode kernel is used
    where the backend has one and the platform fits; otherwise plain XLA, also for a strict Pallas name.
    """
    _check_qkvg(q, k, v, log_g, 3)
    _check_bound(gate_lower_bound)
    _check_state(state, q.shape[0], q.shape[1], q.shape[2], v.shape[2], name="state")
    _check_values(q, k, log_g)
    shaped = (jax.ShapeDtypeStruct((x.shape[0], 1, *x.shape[1:]), x.dtype) for x in (q, k, v, log_g))
    platform = target_platform(q, k, v, log_g)
    name = implementation_for(
        *shaped,
        normalize=normalize,
        gate_lower_bound=gate_lower_bound,
        implementation=implementation,
        platform=platform,
    )
    return _decode(name, bool(normalize), *_alike(q, k, v, _bounded(log_g, gate_lower_bound), tuple(state)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(name: str, normalize: bool, q, k, v, log_g, state):
    run = getattr(_backend(name), "decode", None) or decode_xla.decode
    return run(q, k, v, log_g, state, normalize=normalize)


def _decode_forward(name: str, normalize: bool, q, k, v, log_g, state):
    return _decode(name, normalize, q, k, v, log_g, state), (q, k, v, log_g, state)


def _decode_backward(name: str, normalize: bool, residuals, cotangents):
    _, pullback = jax.vjp(functools.partial(decode_xla.decode, normalize=normalize), *residuals)
    return pullback((cotangents[0], tuple(cotangents[1])))


_decode.defvjp(_decode_forward, _decode_backward)


def causal_conv1d(
    x: Float[Array, "B T *C"], w: Float[Array, "W ..."], *, initial_state: Float[Array, "B W-1 *C"] | None = None
) -> tuple[Float[Array, "B T ..."], Float[Array, "B W-1 *C"]]:
    """Causal depthwise convolution over time, without bias: y_t = sum_j w_j x_(t - (W - 1) + j).

    Args:
      x: float32 or bfloat16; its channel dimensions broadcast against those of w (the k of Hkv heads:
        x [B, T, Hkv, 1, d], w [W, Hkv, G, d] -> y [B, T, Hkv, G, d]).
      w: taps, float32 or bfloat16, W >= 1; tap W - 1 is the current token's.
      initial_state: the W - 1 rows before x, or None for zeros.

    Returns:
      y in x.dtype (accumulated in float32) and the last W - 1 rows of [initial_state ; x], not broadcast.

    Raises:
      ValueError: naming the argument, for a wrong shape or dtype.
    """
    _check_conv(x, w, initial_state)
    _check_sharding("x", x)
    return conv_xla.causal_conv1d(x, w, initial_state)


def _check_conv(x, w, initial_state) -> None:
    _check_array("x", x, max(2, len(getattr(x, "shape", ()))))
    _check_array("w", w, max(1, len(x.shape) - 1))
    if 0 in x.shape or 0 in w.shape:
        raise ValueError(f"x: every dimension must be at least 1, got x {_describe(x)} and w {_describe(w)}")
    try:
        np.broadcast_shapes(x.shape[2:], w.shape[1:])
    except ValueError:
        raise ValueError(
            f"w: channels {list(w.shape[1:])} do not broadcast with those of x {list(x.shape[2:])}"
        ) from None
    if initial_state is not None:
        _check_array("initial_state", initial_state, len(x.shape))
        _check_shape("initial_state", initial_state, (x.shape[0], w.shape[0] - 1, *x.shape[2:]), "[B, W - 1, *C]")


class _LawcatSpec(NamedTuple):
    implementation: str | None
    normalize: bool
    gate_normalizer: float
    lower_bound: float | None


def _lawcat_unfused(
    spec: _LawcatSpec, q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, valid=None
):
    """Convolution, feature map and gate in XLA, then gated_linear_attention: (o, (S, z))."""
    q, k, log_g = lawcat_xla.prepare(q, k, gate_logits, conv_q, conv_k, phi, conv_state, valid, spec.gate_normalizer)
    options = {
        "normalize": spec.normalize,
        "gate_lower_bound": spec.lower_bound,
        "implementation": spec.implementation,
    }
    if q.shape[1] == 1 and initial_state is not None:
        o, state = decode_step(q[:, 0], k[:, 0], v[:, 0], log_g[:, 0], initial_state, **options)
        o = o[:, None]
    else:
        o, state = gated_linear_attention(q, k, v, log_g, initial_state=initial_state, **options)
    return o, state


def _conv_tails(q, k, conv_q, conv_state, lengths=None):
    """The next call's conv_state."""
    rows, tails = conv_q.shape[1] - 1, conv_state or (None, None)
    return tuple(lawcat_xla.last_rows(x, tail, rows, lengths) for x, tail in zip((q, k), tails, strict=True))


def _lawcat_composed(spec: _LawcatSpec, *arrays):
    """What _lawcat_fused computes, from parts that have gradients: (o, (S, z), conv_state)."""
    q, k, conv_q, conv_state = arrays[0], arrays[1], arrays[4], arrays[8]
    return *_lawcat_unfused(spec, *arrays), _conv_tails(q, k, conv_q, conv_state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lawcat_fused(spec: _LawcatSpec, *arrays):
    run = importlib.import_module(f"kernels_pallas.lawcat_attention.{_PALLAS[spec.implementation][0]}").forward
    o, state, *tails = run(
        *arrays,
        normalize=spec.normalize,
        gate_normalizer=spec.gate_normalizer,
        gate_lower_bound=spec.lower_bound,
    )
    return o, state, tails[0] if tails else _conv_tails(arrays[0], arrays[1], arrays[4], arrays[8])


def _lawcat_fused_forward(spec: _LawcatSpec, *arrays):
    return _lawcat_fused(spec, *arrays), arrays


def _lawcat_fused_backward(spec: _LawcatSpec, arrays, cotangents):
    # The inputs are the only residuals: features and gates are recomputed, which costs less than storing them.
    _, pullback = jax.vjp(functools.partial(_lawcat_composed, spec), *arrays)
    do, state, tails = cotangents
    return pullback((do, tuple(state), tuple(tails)))


_lawcat_fused.defvjp(_lawcat_fused_forward, _lawcat_fused_backward)


def _check_lawcat(q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, lengths) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("gate_logits", gate_logits)):
        _check_array(name, x, 4)
    for name, x in (("conv_q", conv_q), ("conv_k", conv_k), ("phi", phi)):
        _check_array(name, x, 3)
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    if 0 in q.shape:
        raise ValueError(f"q: every dimension must be at least 1, got {_describe(q)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: its {kv_heads} heads must divide the {heads} heads of q, got {_describe(k)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {_describe(x)}")
    _check_shape("k", k, (batch, length, kv_heads, width), "[B, T, Hkv, d]")
    _check_shape("v", v, (batch, length, kv_heads, v.shape[3]), "[B, T, Hkv, V]")
    _check_shape("phi", phi, (heads, width, phi.shape[2]), "[H, d, f]")
    features = 2 * phi.shape[2]
    _check_shape("gate_logits", gate_logits, (batch, length, kv_heads, features), "[B, T, Hkv, 2 f]")
    taps = conv_q.shape[1]
    if taps < 1:
        raise ValueError(f"conv_q: needs at least one tap, got {_describe(conv_q)}")
    _check_shape("conv_q", conv_q, (heads, taps, width), "[H, W, d]")
    _check_shape("conv_k", conv_k, (heads, taps, width), "[H, W, d]")
    if initial_state is not None:
        _check_state(initial_state, batch, heads, features, v.shape[3])
    if conv_state is not None:
        if not isinstance(conv_state, (tuple, list)) or len(conv_state) != 2:
            raise ValueError(f"conv_state: expected a pair (q rows, k rows), got {type(conv_state).__name__}")
        for name, x, rows in (("q rows", conv_state[0], heads), ("k rows", conv_state[1], kv_heads)):
            _check_array(f"conv_state {name}", x, 4)
            _check_shape(f"conv_state {name}", x, (batch, taps - 1, rows, width), "[B, W - 1, heads, d]")
    if lengths is not None:
        _check_array("lengths", lengths, 1, dtypes=("int32", "int64", "uint32"))
        _check_shape("lengths", lengths, (batch,), "[B]")


def lawcat_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T Hkv d"],
    v: Float[Array, "B T Hkv V"],
    gate_logits: Float[Array, "B T Hkv K"],
    conv_q: Float[Array, "H W d"],
    conv_k: Float[Array, "H W d"],
    phi: Float[Array, "H d f"],
    *,
    initial_state: tuple[Float[Array, "B H K V"], Float[Array, "B H K"]] | None = None,
    conv_state: tuple[Float[Array, "B W-1 H d"], Float[Array, "B W-1 Hkv d"]] | None = None,
    normalize: bool = True,
    gate_normalizer: float = 16.0,
    gate_lower_bound: float | None = -1.25,
    lengths: Int[Array, " B"] | None = None,
    zero_padding: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], tuple[Array, Array], tuple[Array, Array]]:
    """LAWCAT attention of one layer from its raw projections (arXiv 2509.18467; no rotary embedding).

    Per query head: causal convolutions of q and k with their own taps, features max([softmax(u phi) ; softmax(-u phi)],
    1e-12), gates logsigmoid(gate_logits) / gate_normalizer bounded below, then normalised gated linear attention with
    K = 2 f features.

    Args:
      q, k, v: projections, float32 or bfloat16 (one dtype); kv head h // (H / Hkv) serves query head h.
      gate_logits: float32 (or bfloat16), per kv head.
      conv_q, conv_k, phi: float32 or bfloat16 parameters, per query head; tap W - 1 is the current token.
      initial_state: (S, z) float32 after the tokens before these, or None.
      conv_state: the W - 1 rows of raw q and of raw k before these, or None for zeros.
      normalize, gate_lower_bound: as in gated_linear_attention.
      lengths: number of valid tokens of each sequence among these T, or None for all: the rest is padding on the right,
        which leaves state and conv_state as they were and whose output is 0.
      zero_padding: False leaves the output at padding finite but meaningless, for callers that mask later: a pass over
        the output (and one over its gradient) less.
      implementation: as in gated_linear_attention. Without ``lengths``, a Pallas name and None take the fused kernels where
        they support the case; else the parts are composed, with gated_linear_attention's choice.

    Returns:
      o in v.dtype, the state after the last valid token, and conv_state: the last W - 1 valid rows of q and of k. Works
      for T = 1.

    Raises:
      ValueError: naming the argument.
    """
    _check_lawcat(q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, lengths)
    _check_bound(gate_lower_bound)
    for name, x in (("q", q), ("k", k), ("v", v), ("gate_logits", gate_logits)):
        _check_sharding(name, x)
    _check_name(implementation)
    implementation = implementation or getattr(_local, "implementation", None)
    initial_state = None if initial_state is None else tuple(initial_state)
    conv_state = None if conv_state is None else tuple(conv_state)
    arrays = (q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state)
    bound = None if gate_lower_bound is None else float(gate_lower_bound)
    spec = _LawcatSpec(implementation, bool(normalize), float(gate_normalizer), bound)

    fused = None
    if lengths is None:
        platform = target_platform(q, k, v, gate_logits)
        names = [name for name, (_, needed) in _PALLAS.items() if needed == platform]
        if implementation is not None:
            names = [implementation] if implementation in _PALLAS else []
        options = {"normalize": normalize, "gate_lower_bound": bound}
        usable = (
            name for name in names if _refusal(name, platform, "lawcat_attention", *arrays[:7], **options) is None
        )
        fused = next(usable, None)
    if fused is None:
        valid = None if lengths is None else lawcat_xla.valid_tokens(lengths, q.shape[1])
        o, state = _lawcat_unfused(spec, *arrays, valid)
        if valid is not None and zero_padding:
            o = jnp.where(valid[:, :, None, None], o, 0)
        tails = _conv_tails(q, k, conv_q, conv_state, lengths)
    else:
        o, state, tails = _lawcat_fused(spec._replace(implementation=fused), *_alike(*arrays))
    return o, state, tails

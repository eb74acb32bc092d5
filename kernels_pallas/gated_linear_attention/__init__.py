"""Backends of the normalised gated linear attention, and the signature they share.

``kernels_pallas.gated_linear_attention.api`` is the only caller. It validates the arguments, applies the gate bound
(``where(log_g < lb, lb, log_g)``, outside the ``custom_vjp``; backends with ``APPLIES_BOUND`` do it themselves, with zero
gradient below) and chooses the backend; a backend gets clean inputs and never checks or dispatches again.

| name            | forward              | backward               | runs on                      |
|-----------------|----------------------|------------------------|------------------------------|
| "reference"     | ``gated_linear_attention/reference.py`` | ``gated_linear_attention/reference.py``   | everything (slow)            |
| "scan"          | ``gated_linear_attention/scan.py``      | ``gated_linear_attention/scan.py``        | everything                   |
| "pallas_mosaic_gpu" | ``gated_linear_attention/mosaic_gpu.py`` | ``gated_linear_attention/mosaic_gpu_vjp.py`` | NVIDIA Hopper, or interpreted |
| "pallas_triton" | ``gated_linear_attention/triton.py``    | ``gated_linear_attention/triton_vjp.py``  | NVIDIA GPU, or interpreted   |
| "pallas_tpu"    | ``gated_linear_attention/tpu.py``       | ``gated_linear_attention/tpu_vjp.py``     | TPU, or interpreted          |

Forward::

    forward(q, k, v, log_g, initial_state, *, normalize, lower_bound, save_residuals) -> (o, (S, z), residuals)

    q, k           [B, T, H, K]   float32 or bfloat16 (q, k and v share one dtype), non-negative
    v              [B, T, Hv, V]  Hv divides H; query head h reads v head h // (H // Hv)
    log_g          [B, T, Hg, K]  float32 or bfloat16, natural logarithm, lower_bound <= log_g <= 0;
                                  Hg divides H, same rule
    initial_state  None, or (S float32 [B, H, K, V], z float32 [B, H, K])
    normalize      static bool: divide by den = z.q + 1e-10; when False o = S^T q (z is carried all the same)
    lower_bound    static float < 0, or None (no bound: log_g may be -80 or less, though not -inf)
    save_residuals static bool: True when the call is being differentiated
    o              [B, T, H, V] in v.dtype
    (S, z)         the state after the last token, float32, as initial_state; always returned
    residuals      None when save_residuals is False; else any pytree of arrays (None leaves allowed), handed unchanged
                   to the backward function *of the same backend*. It must hold everything that backward needs, e.g.
                   (q, k, v, log_g, initial_state, o, den, segment states): api keeps nothing else.

Backward::

    backward(residuals, do, (dS, dz), *, normalize, lower_bound) -> (dq, dk, dv, dlog_g, (dS0, dz0))

    do        [B, T, H, V], v.dtype: cotangent of o
    dS, dz    float32, shapes of the state, cotangents of the final state; never None (zeros when it was not used)
    dq, dk    [B, T, H, K] in q.dtype and k.dtype
    dv        [B, T, Hv, V] in v.dtype, dlog_g [B, T, Hg, K] in log_g.dtype: summed over the query heads of a group in
              float32, then cast
    dS0, dz0  float32, cotangents of the initial state; ``(None, None)`` is allowed when initial_state was None

``dlog_g`` is with respect to the natural logarithm. T is any integer >= 1; ragged tails are the backend's business.

What a backend can do (both Pallas backends define it in the forward module; it must not touch a device)::

    supports(q, k, v, log_g, *, normalize, lower_bound, differentiated) -> str | None

    q, k, v, log_g   anything with .shape and .dtype
    differentiated   always True from gated_linear_attention (a call cannot know whether it will be differentiated), so
                     answer for forward *and* backward; False asks for the forward only
    returns          None when supported, else the reason as the end of a sentence, "K must be a power of two, got 48"

The platform is checked by api (``kernels_pallas.common.target_platform``), not by ``supports``. Backends ask
``kernels_pallas.common.interpret_mode()`` whether to pass ``interpret=True``, and build ``out_shape`` entries with
``kernels_pallas.common.out_struct(shape, dtype, *inputs)``, which carries the varying mesh axes under ``shard_map``.

Optional, used by ``context_parallel`` (plain XLA stands in for a backend without them)::

    segment_state(k, v, log_g, *, lower_bound) -> (L [B, Hg, K], S [B, H, K, V], z [B, H, K])     # forward module
    segment_dstate(residuals, do, *, normalize, lower_bound) -> (dS0, dz0)                         # backward module

the state of the tokens alone (L the sum of log_g), and the cotangent of the initial state that ``do`` alone causes; all
float32. Without the second one, ``backward`` runs twice.

One decode step (optional, plain XLA stands in; no custom_vjp around it), shapes without T, in the forward module::

    decode(q, k, v, log_g, state, *, normalize) -> (o, (S, z))

The fused prefill ``lawcat_attention/{mosaic_gpu,triton,tpu}.py``, called when there are no ``lengths``::

    forward(q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, *,
            normalize, gate_normalizer, gate_lower_bound) -> (o, (S, z)) or (o, (S, z), (q tail, k tail))
    supports(q, k, v, gate_logits, conv_q, conv_k, phi, *, normalize, gate_lower_bound) -> str | None

    q [B, T, H, d]; k, v [B, T, Hkv, d]; gate_logits [B, T, Hkv, K]; conv_q, conv_k float32 or q.dtype [H, W, d];
    phi [H, d, f], K = 2f
    initial_state None or (S, z) as above; conv_state None (zeros) or (q [B, W-1, H, d], k [B, W-1, Hkv, d])
    gate_lower_bound is applied inside, to logsigmoid(gate_logits) / gate_normalizer

    q tail, k tail: the new conv_state, the last W-1 rows of [conv_state ; x], in q.dtype

api computes the new conv_state where forward does not return it, and the gradient (recomputing the composition), so the
fused operation has no backward.
"""

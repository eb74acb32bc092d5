"""What jax makes of this machine, as one JSON object: ``python -m lawcat_jax.analysis.probe``. Part of ``lawcat_jax.doctor``."""

from __future__ import annotations

import json
from typing import Any

# (label, query heads, key-value heads, head size, dtype): Llama-3.2-1B, Mistral-7B, and a small model in float32.
CASES = (
    ("d=64 bfloat16", 32, 8, 64, "bfloat16"),
    ("d=128 bfloat16", 32, 8, 128, "bfloat16"),
    ("d=32 float32", 4, 2, 32, "float32"),
)

LAYER_CALLS = {"prefill": {}, "padded": {"lengths": True}, "packed and padded": {"lengths": True, "segments": True}}
"""What calls of the layer may have beside their arrays."""


def probe() -> dict[str, Any]:
    """Platform, local devices with their memory, kernels and warnings; {"error": one line} when jax finds no device."""
    try:
        import jax
    except Exception as problem:  # a broken installation raises anything
        return {"error": f"jax cannot be imported: {_line(problem)}"}
    try:
        devices = jax.local_devices()
    except Exception as problem:
        return {"error": f"jax finds no device: {_line(problem)}"}
    found: dict[str, Any] = {"platform": devices[0].platform, "devices": [], "kernels": [], "warnings": []}
    for device in devices:
        try:
            stats = device.memory_stats() or {}
        except Exception:  # not every backend has them
            stats = {}
        found["devices"].append(
            {
                "id": device.id,
                "kind": device.device_kind,
                "bytes_limit": stats.get("bytes_limit"),
                "compute_capability": getattr(device, "compute_capability", None),
            }
        )
    try:
        import flax.nnx  # noqa: F401
    except Exception as problem:
        found["warnings"].append(f"flax.nnx cannot be imported: {_line(problem)}")
    try:
        found["kernels"] = kernels()
    except Exception as problem:
        found["warnings"].append(f"kernels_pallas does not work: {_line(problem)}")
    return found


def kernels() -> list[dict[str, Any]]:
    """The implementation that serves each operation on the default device, and why the Pallas ones do not."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas import dispatch, implementation_for, target_platform

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = []
    pallas = dispatch.PALLAS_IMPLEMENTATIONS
    for case, heads, groups, d, dtype in CASES:
        q, v = of(jnp.dtype(dtype), 1, 1024, heads, d), of(jnp.dtype(dtype), 1, 1024, groups, d)
        gates = of(jnp.float32, 1, 1024, groups, d)
        refused = {}
        for name in pallas:
            try:
                implementation_for(q, q, v, gates, implementation=name)
            except ValueError as reason:
                refused[name] = str(reason).split("cannot be used: ")[-1]
        used = implementation_for(q, q, v, gates)
        rows.append({"operation": "gated_linear_attention", "case": case, "uses": used, "not": refused})

        has_decode = dispatch.has_decode(used)
        reasons = dict(refused)
        if used in pallas and not has_decode:
            reasons[used] = "it has no decode kernel"
        rows.append({"operation": "decode_step", "case": case, "uses": used if has_decode else "xla", "not": reasons})

        taps, phi = of(jnp.float32, heads, 4, d), of(jnp.float32, heads, d, d // 2)
        for call, more in LAYER_CALLS.items():
            options = {"normalize": True, "gate_lower_bound": -1.25, **more}
            answers = {
                name: dispatch.refusal(
                    "lawcat_attention", name, target_platform(), q, v, v, gates, taps, taps, phi, **options
                )
                for name in pallas
            }
            around = implementation_for(q, q, v, gates, segments=more.get("segments", False))
            uses = next((name for name, why in answers.items() if why is None), f"xla around {around}")
            reasons = {name: why for name, why in answers.items() if why is not None}
            rows.append({"operation": f"lawcat_attention ({call})", "case": case, "uses": uses, "not": reasons})
    rows.append({"operation": "causal_conv1d", "case": "all", "uses": "xla", "not": {}})
    return rows


def _line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0] if lines else ''}"[:300]


if __name__ == "__main__":
    print(json.dumps(probe()))

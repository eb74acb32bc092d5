"""Floating-point operations of a traced program, recomputation included (what a model needs: ``lawcat_jax.models.flops``)."""

from __future__ import annotations

import math
from typing import Any


def traced_flops(jaxpr: Any) -> float:
    """Operations of the matrix products in a jaxpr, over all devices, recomputation and loops included.

    Kernels count their declared cost, else the products of their body times the grid; of branches the dearest counts.
    Loops without a known length count once.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "pallas_call":
        cost = params.get("cost_estimate")
        if cost is not None and cost.flops:
            return float(cost.flops)
        steps = math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
        return steps * traced_flops(params["jaxpr"])
    if name == "scan":
        return params["length"] * traced_flops(params["jaxpr"])
    if name == "cond":
        return max(map(traced_flops, params["branches"]))
    if name == "shard_map":
        return params["mesh"].size * traced_flops(params["jaxpr"])
    return sum(map(traced_flops, inner_jaxprs(params)))


def inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """Jaxprs among the parameters of an equation."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                found.append(item)
    return found

"""Where in a decoder the first NaN or infinity arises: what an error says instead of a result that is none."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.errors import UserError
from lawcat_jax.models import bind
from lawcat_jax.models.blocks import Segment
from lawcat_jax.runtime.sharding import mesh_of

_FIRST_LOOK = 256  # tokens that are tried first: a second, and most faults show


def not_finite_error(graphdef: Any, params: Any, tokens: Sequence[int], *, as_teacher: bool = False) -> UserError:
    """An error for logits that are not finite, naming the first layer whose output is not, and its bad weights.

    Args:
      graphdef, params: as from ``lawcat_jax.models.abstract`` and its parameters.
      tokens: ids after which the logits were not finite.
      as_teacher: whether they were those of the softmax model.
    """
    place = None
    for length in dict.fromkeys((min(_FIRST_LOOK, len(tokens)), len(tokens))):
        place = place or _first_place(graphdef, params, np.asarray(tokens[:length], np.int32)[None], as_teacher)
    bad = _bad_parameters(params, as_teacher)
    where = f"the first is the output of {place}" if place else "they arise in the states of single-token steps"
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        why = f"the weights {', '.join(bad[:3])}{more} hold NaN or infinity; restore a copy, or convert or train again"
    else:
        why = "all weights are finite, so a value has overflowed; try --dtype=float32, or a checkpoint from before"
    return UserError(f"the model's logits are NaN or infinite: {where}; {why}")


def _first_place(graphdef: Any, params: Any, tokens: np.ndarray, as_teacher: bool) -> str | None:
    with mesh_of(params):
        x = _embedded(params, tokens, graphdef=graphdef)
        if not _finite(x):
            return "the embedding"
        counts = {True: 0, False: 0}
        for segment in bind(graphdef, params).segments(as_teacher):
            for layer in range(segment.start, segment.stop):
                single = Segment(segment.linear, layer, layer + 1, counts[segment.linear])
                x = _layer(params, x, tokens, graphdef=graphdef, segment=single, as_teacher=as_teacher)
                if not _finite(x):
                    kind = "linear" if segment.linear else "softmax"
                    return f"layer {layer} (counted from 0, {kind} attention)"
                counts[segment.linear] += 1
        return None if _finite(_logits(params, x, graphdef=graphdef)) else "the output head"


@functools.partial(jax.jit, static_argnames="graphdef")
def _embedded(params, tokens, *, graphdef):
    return bind(graphdef, params).embedded(tokens)


@functools.partial(jax.jit, static_argnames=("graphdef", "segment", "as_teacher"))
def _layer(params, x, tokens, *, graphdef, segment: Segment, as_teacher: bool):
    model = bind(graphdef, params)
    run = model.run_linear if segment.linear else model.run_softmax
    return run(segment, x, model.context(tokens), as_teacher=as_teacher)[0]


@functools.partial(jax.jit, static_argnames="graphdef")
def _logits(params, x, *, graphdef):
    model = bind(graphdef, params)
    return model.head(model.final_norm(x))


def _finite(x: Any) -> bool:
    return bool(jnp.all(jnp.isfinite(x)))


def _bad_parameters(params: Any, as_teacher: bool) -> list[str]:
    """Parameters that are not finite, those of stacked layers with the first such row; in the order of the tree."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(str(key.key) for key in path)
        if _finite(leaf) or (as_teacher and name.startswith(("mixers/", "lora/"))):
            continue
        if name.startswith(("layers/", "mixers/", "lora/")):
            good = np.asarray(jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim))))
            name = f"{name}[{int(np.argmin(good))}]"
        found.append(name)
    return found

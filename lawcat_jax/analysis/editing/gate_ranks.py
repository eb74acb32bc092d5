"""Gate ranks of their own for each layer, under one budget of parameters for the whole model.

A layer's gate logits are ``z = d W2 + b`` with ``d = h W1``, rank r. Over a text their covariance is W2^T C W2, C that of
d; the best approximation of z in the mean square with rank n keeps the n leading eigenvectors V of it (principal
components): ``W1' = W1 W2 V``, ``W2' = V^T``, and the bias takes the mean of what is dropped. What is lost is the sum of
the dropped eigenvalues, so the best ranks for a budget are those of the largest eigenvalues of all layers together, as every
rank of every layer costs the same. This is the first version of an adaptive gate rank, the paper's future work (method of
arXiv 2509.18467 after training; AdaLoRA, 2303.10512, does it while training).

Logits are the place to measure: half-lives of more than a few tokens grow as e^z, so an error of z is a relative error of
a half-life.

The parameters stay stacked over layers: their rank is the largest of the layers, and columns of W1 and rows of W2 that a layer
does not use are 0. Training leaves them 0, since their gradients are products of each other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.data.batch import Batch
from lawcat_jax.errors import UserError
from lawcat_jax.models import bind

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Moments(NamedTuple):
    """Mean [M, r] and covariance [M, r, r] of d over the valid tokens of a text, layer by layer."""

    mean: Float[Array, "M r"]
    covariance: Float[Array, "M r r"]


class Components(NamedTuple):
    """Principal components of the gate logits of M layers, r of each, the largest first: ``variance`` [M, r] is what
    dropping one costs, summed over the N channels; ``directions`` [M, r, N] are orthonormal rows.
    """

    variance: Float[np.ndarray, "M r"]
    directions: Float[np.ndarray, "M r N"]


@functools.partial(jax.jit, static_argnames="graphdef")
def moments(params: dict[str, Any], batch: Batch, *, graphdef: Any) -> Moments:
    """:class:`Moments` in the student's own pass over ``batch``."""
    decoder = bind(graphdef, params)
    context = decoder.context(batch["tokens"], lengths=batch["lengths"])
    weights = context.valid().astype(jnp.float32) / jnp.sum(context.valid())
    x, collected = decoder.embedded(batch["tokens"], context), []
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def mix(mixer, index, state, h, q, k, v):
        del state
        (clean,) = context.without_padding(h)
        d = exact("btd,dr->btr", clean.astype(jnp.float32), mixer.gate_down.kernel[...])
        mean = exact("btr,bt->r", d, weights)
        spread = d - mean
        covariance = exact("btr,bts,bt->rs", spread, spread, weights)
        return mixer(h, q, k, v, decoder.layer_context(context, index))[0], Moments(mean, covariance)

    for segment in decoder.segments():
        if segment.linear:
            x, found = decoder.scan_linear(segment, x, mix)
            collected.append(found)
        else:
            x, _ = decoder.run_softmax(segment, x, context)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *collected)


def components(up: Float[np.ndarray, "M r N"], covariance: Float[np.ndarray, "M r r"]) -> Components:
    """:class:`Components` of z = d W2 for ``up`` = W2 and the covariance of d, in float64."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    root = np.sqrt(np.maximum(values, 0))[..., None] * vectors.swapaxes(-1, -2)  # root^T root = covariance
    _, singular, directions = np.linalg.svd(root @ np.asarray(up, np.float64), full_matrices=False)
    missing = up.shape[1] - singular.shape[1]  # fewer channels than ranks
    if missing > 0:
        singular = np.pad(singular, ((0, 0), (0, missing)))
        directions = np.pad(directions, ((0, 0), (0, missing), (0, 0)))
    return Components(singular**2, directions)


def choose_ranks(variance: Float[np.ndarray, "M r"], total: int) -> list[int]:
    """Ranks of the layers, ``total`` together (or all there are), that keep the most variance; ties to lower layers."""
    order = np.argsort(-variance, axis=None, kind="stable")[: max(0, total)]
    return np.bincount(order // variance.shape[1], minlength=len(variance)).tolist()


def truncated(
    gate_down: dict[str, Any],
    gate_up: dict[str, Any],
    found: Components,
    mean: Float[np.ndarray, "M r"],
    ranks: Sequence[int],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(gate_down, gate_up) of the mixers with ``ranks``; a layer that keeps its rank keeps its bits.

    The arrays have the largest of the ranks, and at least 1; ``mean`` is that of d.
    """
    down, up, bias = (np.asarray(x) for x in (gate_down["kernel"], gate_up["kernel"], gate_up["bias"]))
    size, full = max(1, *ranks), down.shape[-1]
    new_down = np.zeros((*down.shape[:2], size), down.dtype)
    new_up = np.zeros((len(up), size, up.shape[-1]), up.dtype)
    new_bias = bias.copy()
    for layer, rank in enumerate(ranks):
        if rank == full:
            new_down[layer], new_up[layer] = down[layer], up[layer]
            continue
        kept = found.directions[layer, :rank]
        inner = up[layer].astype(np.float64)
        new_down[layer, :, :rank] = down[layer].astype(np.float64) @ (inner @ kept.T)
        new_up[layer, :rank] = kept
        average = np.asarray(mean[layer], np.float64) @ inner
        new_bias[layer] = bias[layer] + (average - average @ kept.T @ kept)
    return {"kernel": new_down}, {"kernel": new_up, "bias": new_bias}


def rank_parameters(mixers: dict[str, Any], where: str) -> int:
    """Parameters that one rank of one layer costs: a column of W1 and a row of W2.

    Raises:
      UserError: the gates are no product of two matrices.
    """
    if "gate_down" not in mixers:
        raise UserError(f"{where} has no gates of two matrices, whose rank could be lowered")
    return mixers["gate_down"]["kernel"].shape[1] + mixers["gate_up"]["kernel"].shape[2]

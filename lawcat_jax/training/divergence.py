"""How far a student's distribution over the next token is from its teacher's, token by token.

The teacher runs beside the student (:class:`Teacher`), or its largest logits were stored beforehand
(:class:`StoredTeacher`, :mod:`lawcat_jax.data.teacher_store`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class Teacher(NamedTuple):
    """What the student is held against, and how: ``values`` are the teacher's logits [..., V] or hidden states
    [..., D], ``weights`` f32 [...] those of the tokens in the divergence, ``temperature`` divides both logits, and
    ``reverse`` asks for KL(student || teacher) instead of KL(teacher || student).
    """

    values: Float[Array, "*b N"]
    weights: Float[Array, "*b"]
    temperature: float = 1.0
    reverse: bool = False


class StoredTeacher(NamedTuple):
    """The same of stored logits: of each token the ``ids`` of the teacher's k largest logits, these ``logits`` in f32,
    and ``rest``, the log-sum-exp of all others.
    """

    ids: Int[Array, "*b k"]
    logits: Float[Array, "*b k"]
    rest: Float[Array, "*b"]
    weights: Float[Array, "*b"]
    reverse: bool = False


AnyTeacher = Teacher | StoredTeacher


def arrays_of(teacher: AnyTeacher) -> dict[str, Array]:
    """The fields of a teacher that hold a value for each token."""
    names = ("values", "weights") if isinstance(teacher, Teacher) else ("ids", "logits", "rest", "weights")
    return {name: getattr(teacher, name) for name in names}


def divergence(log_p: Float[Array, "*b V"], teacher: AnyTeacher) -> Float[Array, "*b"]:
    """KL(teacher || student), or reversed, in nats; ``log_p`` are the student's log-probabilities, f32.

    With a temperature it is that of the tempered distributions times the temperature squared, so that its gradient does
    not shrink with it (Hinton et al., 1503.02531). With stored logits it is that of the distributions over the k tokens and
    "any other token", which is at most the whole divergence, and equal to it where k is the vocabulary.

    What a token of weight 0 gives means nothing, but is finite where ``log_p`` is, for its gradient too.
    """
    counted = teacher.weights[..., None] > 0
    scale = 1.0
    if isinstance(teacher, StoredTeacher):
        log_p, log_q = _over_stored(log_p, teacher)
    else:
        wanted = jnp.where(counted, jax.lax.stop_gradient(teacher.values).astype(jnp.float32), 0.0)
        if teacher.temperature != 1.0:
            wanted, scale = wanted / teacher.temperature, teacher.temperature**2
            log_p = jax.nn.log_softmax(log_p / teacher.temperature)
        log_q = jax.nn.log_softmax(wanted)
    if teacher.reverse:
        log_p, log_q = log_q, log_p
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1) * scale


def _over_stored(log_p: jax.Array, teacher: StoredTeacher) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of student and teacher over the k tokens and, where there are others, all of these together."""
    logits = teacher.logits.astype(jnp.float32)
    total = jnp.logaddexp(jax.nn.logsumexp(logits, axis=-1), teacher.rest)[..., None]
    kept, log_q = jnp.take_along_axis(log_p, teacher.ids, axis=-1), logits - total
    if teacher.ids.shape[-1] < log_p.shape[-1]:
        # Summed up, not 1 less the others: a small remainder would be lost in the rounding of these.
        stored = jnp.put_along_axis(jnp.zeros(log_p.shape, bool), teacher.ids, True, axis=-1, inplace=False)
        rest = jax.nn.logsumexp(jnp.where(stored, -jnp.inf, log_p), axis=-1, keepdims=True)
        kept, log_q = (
            jnp.concatenate([kept, rest], axis=-1),
            jnp.concatenate([log_q, teacher.rest[..., None] - total], -1),
        )
    return kept, log_q

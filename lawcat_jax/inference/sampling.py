"""How the next token is chosen from logits: greedily, or drawn after temperature, top-k, top-p, min-p; before either a
penalty on tokens that were there already. Filters and their order are those of transformers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from lawcat_jax.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


HOTTEST = 1000
"""Temperature at most; far below that every token is as likely as any other."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the default takes the most likely one.

    Attributes:
      temperature: 0 for the most likely token, else logits are divided by it and a token is drawn.
      top_k: draw from the k most likely tokens; 0 is off.
      top_p: draw from the most likely tokens that together have this share of the probability; 1 is off.
      min_p: draw from tokens with at least this share of the most likely one's probability; 0 is off.
      repetition_penalty: logits of tokens of the prompt and the answer are divided by it where they are positive, and
        multiplied where they are negative (CTRL, https://arxiv.org/abs/1909.05858); 1 is off.
      seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def check(self, prefix: str = "") -> None:
        """Refuse what cannot be, naming the field behind ``prefix`` ("--" on the command line).

        Raises:
          UserError: values out of range, or a filter of draws where nothing is drawn.
        """
        least = {"temperature": 0, "top_k": 0, "top_p": 0, "min_p": 0, "repetition_penalty": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= low):
                raise UserError(f"{prefix}{name}: {value} must be a number of at least {low}")
        for name, most in {"temperature": HOTTEST, "top_p": 1, "min_p": 1}.items():
            if getattr(self, name) > most:
                raise UserError(f"{prefix}{name}: {getattr(self, name)} must be at most {most}")
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise UserError(f"{prefix}{name}: must be above 0")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"{prefix}seed: {self.seed} must fit into 64 bits")
        chosen = [name for name in ("top_k", "top_p", "min_p") if name in self._filters()]
        if chosen and self.temperature == 0:
            raise UserError(f"{prefix}{chosen[0]} filters what is drawn: give a {prefix}temperature above 0 as well")

    def _filters(self) -> dict[str, float]:
        values = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        off = {"top_k": 0, "top_p": 1, "min_p": 0}
        return {name: value for name, value in values.items() if value != off[name]}

    def values(self) -> dict[str, Float[Array, ""]]:
        """The numbers that :func:`choose` takes: the temperature, and of the rest what is on. Which keys there are
        decides what is compiled, their values do not.
        """
        on = {"temperature": self.temperature, **self._filters()}
        if self.repetition_penalty != 1:
            on["repetition_penalty"] = self.repetition_penalty
        return {name: jnp.float32(value) for name, value in on.items()}


GREEDY = Sampling()


def penalized(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""] | float
) -> Float[Array, "B V"]:
    """Logits with those of ``seen`` tokens lowered."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(logits: Float[Array, "B V"], values: dict[str, Float[Array, ""]]) -> Float[Array, "B V"]:
    """Logits divided by the temperature (above 0), with -inf for tokens that are not drawn."""
    logits = logits / values["temperature"]
    if "top_k" in values:
        last = jnp.clip(values["top_k"].astype(jnp.int32), 1, logits.shape[-1]) - 1
        least = jnp.take(-jnp.sort(-logits, axis=-1), last, axis=-1)[:, None]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if "top_p" in values:
        order = jnp.argsort(logits, axis=-1)
        share = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
        drop = (share <= 1 - values["top_p"]).at[:, -1].set(False)  # the most likely token stays
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = jnp.where(jnp.zeros_like(drop).at[rows, order].set(drop), -jnp.inf, logits)
    if "min_p" in values:
        shares = jax.nn.softmax(logits, axis=-1)
        least = values["min_p"] * jnp.max(shares, axis=-1, keepdims=True)
        logits = jnp.where(shares < least, -jnp.inf, logits)
    return logits


def choose(
    logits: Float[Array, "B V"],
    step: Int[Array, ""] | int,
    keys: Array,
    values: dict[str, Float[Array, ""]],
    seen: Bool[Array, "B V"] | None,
) -> Int[Array, " B"]:
    """Next tokens: the most likely ones at temperature 0, else drawn with a key of the sequence and the step.

    Args:
      logits: float32.
      step: number of the token in its answer.
      keys: a key of each sequence.
      values: see :meth:`Sampling.values`.
      seen: the tokens of prompt and answer, needed by a repetition penalty.
    """
    if "repetition_penalty" in values:
        assert seen is not None
        logits = penalized(logits, seen, values["repetition_penalty"])
    temperature = values["temperature"]
    kept = filtered(logits, {**values, "temperature": jnp.maximum(temperature, 1e-6)})
    step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    drawn = jax.vmap(jax.random.categorical)(step_keys, kept)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)

"""What a backend must offer, as protocols: a backend is a module whose functions have these signatures.

The callers check the arguments, choose the backend and wrap one ``custom_vjp`` around it (``api.py`` and ``vjp.py`` of
each op), so a backend gets clean inputs and never checks or dispatches again. ``README.md`` says how to add one.

Common to all: every array has the batch first; H query heads, Hv value heads and Hg gate heads, where Hv and Hg divide H
and query head h reads value head h // (H // Hv) and gate head h // (H // Hg). The state is a pair (S, z), float32. T is
any integer from 1 on, and a ragged last chunk is the backend's business. The platform is the caller's, not the
backend's: ``supports`` must not touch a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    State = tuple[Float[Array, "B H K V"], Float[Array, "B H K"]]
    """(S, z), float32."""


class Forward(Protocol):
    """``gated_linear_attention/<file>.py``: the forward pass. Required.

    A module may also define

    * ``APPLIES_BOUND = True`` when it raises gates to ``lower_bound`` by itself, with zero gradient below; otherwise it
      gets ``log_g`` already bounded;
    * ``TAKES_SEGMENTS = True`` when ``forward`` takes ``numbers``, int32 [B, T] or None: the documents of packed rows, see
      ``kernels_pallas.common.segment_numbers``. The state starts anew where the number changes, and the initial state
      belongs to document 0. Otherwise packed rows come as gates that forget everything, without a bound.
    """

    @staticmethod
    def supports(q, k, v, log_g, *, normalize: bool, lower_bound: float | None, differentiated: bool) -> str | None:
        """None when the backend takes such a call, else why not, as the end of a sentence ("K must be 64, got 48").

        Args:
          q, k, v, log_g: anything with ``shape`` and ``dtype``.
          differentiated: whether the backward pass must be able to take the call as well. It is True for every call of
            ``gated_linear_attention``, which cannot know whether somebody differentiates it.
        """
        ...

    @staticmethod
    def forward(
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T H K"],
        v: Float[Array, "B T Hv V"],
        log_g: Float[Array, "B T Hg K"],
        initial_state: State | None,
        *,
        normalize: bool,
        lower_bound: float | None,
        save_residuals: bool,
    ) -> tuple[Float[Array, "B T H V"], State, Any]:
        """Outputs, the state after the last token, and residuals.

        Args:
          q, k: float32 or bfloat16, non-negative; q, k and v share one dtype.
          log_g: natural logarithm of the gates, float32 or bfloat16, within lower_bound <= log_g <= 0.
          initial_state: None for zeros.
          normalize: divide by den = z.q + 1e-10; when False o = S^T q. z is carried either way.
          lower_bound: below 0, or None when log_g has no bound (-80 or less, though not -inf).
          save_residuals: whether the call is being differentiated.

        Returns:
          o in v.dtype; (S, z); and None unless ``save_residuals``, else any pytree of arrays (None leaves allowed).
          The residuals go unchanged to ``backward`` of the same backend and must hold everything that it needs.
        """
        ...


class Backward(Protocol):
    """The backward pass, in the same file or in ``gated_linear_attention/<file>_vjp.py``. Required."""

    @staticmethod
    def backward(
        residuals: Any,
        do: Float[Array, "B T H V"],
        dstate: State,
        *,
        normalize: bool,
        lower_bound: float | None,
    ) -> tuple[
        Float[Array, "B T H K"],
        Float[Array, "B T H K"],
        Float[Array, "B T Hv V"],
        Float[Array, "B T Hg K"],
        State | tuple[None, None],
    ]:
        """(dq, dk, dv, dlog_g, (dS0, dz0)), each in the dtype of its input.

        Args:
          do: cotangent of o, in v.dtype.
          dstate: cotangents of the final state, float32, zeros when nothing depends on it (never None).

        dv and dlog_g are summed over the query heads of a group in float32 and then cast; dlog_g is with respect to the
        natural logarithm. The last pair may be (None, None) when there was no initial state.
        """
        ...


class Decode(Protocol):
    """One token, in the forward module. Optional: ``gated_linear_attention/decode.py`` (plain XLA) stands in."""

    @staticmethod
    def decode(
        q: Float[Array, "B H K"],
        k: Float[Array, "B H K"],
        v: Float[Array, "B Hv V"],
        log_g: Float[Array, "B Hg K"],
        state: State,
        *,
        normalize: bool,
    ) -> tuple[Float[Array, "B H V"], State]:
        """(o in v.dtype, the state after the token); log_g is bounded already. Its gradient is the caller's business."""
        ...


class SegmentState(Protocol):
    """For ``context_parallel``, in the forward module. Optional: ``scan`` stands in."""

    @staticmethod
    def segment_state(
        k: Float[Array, "B T H K"],
        v: Float[Array, "B T Hv V"],
        log_g: Float[Array, "B T Hg K"],
        *,
        lower_bound: float | None,
    ) -> tuple[Float[Array, "B Hg K"], Float[Array, "B H K V"], Float[Array, "B H K"]]:
        """(sum of log_g, S, z) of these tokens alone, float32."""
        ...


class SegmentCotangent(Protocol):
    """For ``context_parallel``, in the backward module. Optional: without it ``backward`` runs twice."""

    @staticmethod
    def segment_dstate(
        residuals: Any, do: Float[Array, "B T H V"], *, normalize: bool, lower_bound: float | None
    ) -> State:
        """The cotangent of the initial state that ``do`` alone causes, float32."""
        ...


class Layer(Protocol):
    """``lawcat_attention/<file>.py``: the whole layer. Optional: the op is composed of its parts."""

    @staticmethod
    def supports(
        q,
        k,
        v,
        gate_logits,
        conv_q,
        conv_k,
        phi,
        *,
        normalize: bool,
        gate_lower_bound: float | None,
        lengths: bool = False,
        segments: bool = False,
    ) -> str | None:
        """As ``Forward.supports``. ``lengths``, ``segments``: whether ``forward`` will get lengths, numbers."""
        ...

    @staticmethod
    def forward(
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        v: Float[Array, "B T Hkv V"],
        gate_logits: Float[Array, "B T Hkv K"],
        conv_q: Float[Array, "H W d"],
        conv_k: Float[Array, "H W d"],
        phi: Float[Array, "H d f"],
        initial_state: State | None,
        conv_state: tuple[Float[Array, "B W-1 H d"], Float[Array, "B W-1 Hkv d"]] | None,
        *,
        normalize: bool,
        gate_normalizer: float,
        gate_lower_bound: float | None,
        lengths: Int[Array, " B"] | None,
        numbers: Int[Array, "B T"] | None,
    ) -> Any:
        """(o, (S, z)) or (o, (S, z), conv_state), with K = 2 f features.

        ``gate_lower_bound`` applies to logsigmoid(gate_logits) / gate_normalizer and is the kernel's to apply. conv_q
        and conv_k are float32 or of q's dtype. The new conv_state is the last W - 1 rows of [conv_state ; x], in
        q.dtype; the caller computes it where ``forward`` does not return it.

        ``lengths``, within 0 .. T: tokens from there on are padding, whose output is 0 and which reaches nothing else,
        whatever it holds. ``numbers``: the documents of packed rows as in ``Forward``; convolutions do not cross them,
        and conv_state belongs to document 0.
        """
        ...


class LayerFeatures(Protocol):
    """In the layer's module, optional: what comes before gated linear attention, for calls that are differentiated.

    Without it the gradient comes from the composition of the op's parts in XLA, run again in the backward pass.
    """

    @staticmethod
    def features(
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        gate_logits: Float[Array, "B T Hkv K"],
        conv_q: Float[Array, "H W d"],
        conv_k: Float[Array, "H W d"],
        phi: Float[Array, "H d f"],
        conv_state: tuple[Float[Array, "B W-1 H d"], Float[Array, "B W-1 Hkv d"]] | None,
        *,
        gate_normalizer: float,
        gate_lower_bound: float | None,
        lengths: Int[Array, " B"] | None,
        numbers: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T Hkv K"]]:
        """(phi(q), phi(k), log_g) as the backend's gated linear attention takes them, zeros at padding. That attention must
        then take ``lengths`` as well: v may hold anything at padding."""
        ...

"""The decoder of every model family, for the softmax teacher and its linear-attention student, which differ in how layers
mix tokens.

A pass is: embed, run the layers segment by segment (a segment is a run of layers of one kind), norm, head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.checks import check_lengths, check_segments
from kernels_pallas.common import segment_numbers
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig, attention_problems, model_problems
from lawcat_jax.errors import UserError
from lawcat_jax.models import cache as caching
from lawcat_jax.models import parallel
from lawcat_jax.models.attention import softmax_attention
from lawcat_jax.models.blocks import DecoderLayer, Embed, Segment, Stacked, rematerialized, split_segments
from lawcat_jax.models.layers import Context, Linear, RMSNorm, static_config, token_positions
from lawcat_jax.models.lora import Lora
from lawcat_jax.models.mixers import MIXERS, TokenMixer, mixer_class
from lawcat_jax.models.rope import rope_table, rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


class Decoder(nnx.Module):
    """Decoder with the architecture ``config``; with ``attention`` the student in which token mixers stand for softmax
    attention, with ``lora`` also adapters on the projections of those layers.

    Parameters are stacked over layers on axis 0 (see the module ``lawcat_jax.models``). Base parameters have ``dtype``;
    those of the mixers and adapters are float32. Activations have the dtype of the embedding.

    Raises:
      UserError: for a config out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionConfig | None = None,
        lora: LoraConfig | None = None,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
    ):
        _check(config, attention, lora)
        self.config, self.attention_config = static_config(config), static_config(attention)
        layers = config.num_layers
        self.embed = Embed(config, rngs=rngs, dtype=dtype)
        self.layers = DecoderLayer(config, rngs=rngs, stack=(layers,), dtype=dtype)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        # Each is assigned once: nnx fixes at the first assignment whether an attribute holds parameters.
        head = (config.hidden_size, config.vocab_size)
        self.lm_head = None if config.tie_embeddings else Linear(*head, rngs=rngs, dtype=dtype)
        student = attention if attention is not None and num_linear(config, attention) > 0 else None
        self.mixers = None if student is None else build_mixers(config, student, rngs=rngs)
        self.lora = None if student is None or lora is None else build_lora(config, student, lora, rngs=rngs)

    # Forward passes

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, " B"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        as_teacher: bool = False,
        remat: str = "none",
        unroll_layers: bool = False,
        dropout_rng: jax.Array | None = None,
        return_hidden: bool = False,
        recurrent: caching.Cache | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Any:
        """Logits in float32 [B, T, V] of every position, or with ``return_hidden`` the final-normed hidden states
        [B, T, D] (for :meth:`head`); with ``recurrent`` a pair of that and the state after the last valid token.

        Args:
          tokens: int32; padding on the right, any id.
          lengths: valid tokens of each sequence, or None for all.
          positions: for the rotary embedding; default 0 .. T - 1, of packed rows from 0 in each document.
          as_teacher: softmax attention in every layer and no adapter.
          remat: "none", "layer" (recompute each layer in the backward pass), "dots" (keep matrix products).
          unroll_layers: no loop over layers in the compiled program (see ``StageConfig``).
          dropout_rng: key of the adapters' dropout, None for evaluation.
          recurrent: what the linearised layers remember of the tokens before these (:meth:`init_recurrent`). Softmax
            layers of a hybrid see the tokens of this call only.
          segment_ids: documents of packed rows, int [B, T]: a new one begins wherever the id changes, and no token
            sees another document's. Not together with ``recurrent``.
        """
        if segment_ids is not None and recurrent is not None:
            raise ValueError("segment_ids: rows that go on from a state hold one document; leave one of the two out")
        start = None if recurrent is None else recurrent["position"]
        context = self.context(tokens, start, lengths, positions, segment_ids)
        x = self.embedded(tokens, context)
        options = {"remat": remat, "unroll": unroll_layers, "dropout_rng": dropout_rng, "as_teacher": as_teacher}
        cache = recurrent
        for segment in self.segments(as_teacher):
            if segment.linear:
                x, cache = self._run(segment, x, context, cache=cache, **options)
            else:
                x, _ = self._run(segment, x, context, **options)
        hidden = self.final_norm(x)
        out = hidden if return_hidden else self.head(hidden)
        if cache is None:
            return out
        added = tokens.shape[1] if context.lengths is None else context.lengths
        return out, {**cache, "position": cache["position"] + added}

    def init_recurrent(self, batch_size: int) -> caching.Cache:
        """What the linearised layers remember before the first token: ``position`` [B] int32 and ``linear``, their
        states stacked over layers (nothing for a plain teacher).
        """
        recurrent: caching.Cache = {"position": jnp.zeros((batch_size,), jnp.int32)}
        attention = self.attention_config
        if self.mixers is not None and attention is not None:
            count, dtype = num_linear(self.config, attention), self.embed.embedding[...].dtype
            state = mixer_class(attention).empty_state(self.config, attention, batch_size, dtype)
            recurrent["linear"] = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), state)
        return recurrent

    def init_cache(self, batch_size: int, max_length: int, *, as_teacher: bool = False) -> caching.Cache:
        """An empty cache. ``max_length`` bounds the tokens of softmax layers; linearised layers have no limit."""
        config, dtype = self.config, self.embed.embedding[...].dtype
        attention = None if as_teacher or self.mixers is None else self.attention_config
        linear = 0 if attention is None else num_linear(config, attention)
        cache = self.init_recurrent(batch_size)
        if not linear:
            cache.pop("linear", None)
        if config.num_layers > linear:
            shape = (config.num_layers - linear, batch_size, max_length, config.num_kv_heads, config.head_dim)
            cache["softmax"] = caching.empty_kv(*shape, dtype)
        return cache

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        cache: caching.Cache,
        *,
        lengths: Int[Array, " B"] | None = None,
        unread: Int[Array, " B"] | None = None,
        all_logits: bool = False,
        return_hidden: bool = False,
        as_teacher: bool = False,
    ) -> tuple[Float[Array, "B V"] | Float[Array, "B T V"] | Float[Array, "B T D"], caching.Cache]:
        """Append tokens to a cache, empty or not: (logits of the last valid token or of all, new cache), with
        ``return_hidden`` the final-normed hidden states of all instead of logits.

        A sequence of length 0 keeps its cache; its logits mean nothing. ``unread`` is for a text that is read in pieces:
        the tokens of each sequence from the first of these to the last of a later call, since rotary frequencies may
        depend on the length of the whole. None says that nothing is known to follow.
        """
        context = self.context(tokens, cache["position"], lengths, unread=unread)
        x = self.embedded(tokens, context)
        cache = dict(cache)
        for segment in self.segments(as_teacher):
            x, cache = self._run(segment, x, context, cache=cache, as_teacher=as_teacher)
        added = tokens.shape[1] if context.lengths is None else context.lengths
        cache["position"] = cache["position"] + added
        if return_hidden:
            return self.final_norm(x), cache
        if not all_logits:
            x = _last_valid(x, context.lengths)
        return self.head(self.final_norm(x)), cache

    def decode(
        self, token: Int[Array, " B"], cache: caching.Cache, *, as_teacher: bool = False
    ) -> tuple[Float[Array, "B V"], caching.Cache]:
        """One more token for every sequence: (logits, new cache)."""
        return self.prefill(token[:, None], cache, as_teacher=as_teacher)

    def diagnostics(
        self,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, " B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> dict[str, Array]:
        """The mixers' ``statistics`` in a forward pass of the student, stacked over the linearised layers."""
        context = self.context(tokens, lengths=lengths, segment_ids=segment_ids)
        x, collected = self.embedded(tokens, context), []

        def mix(mixer, index, state, *projections):
            del state
            own = self.layer_context(context, index)
            return mixer(*projections, own)[0], mixer.statistics(*projections, own)

        for segment in self.segments():
            if segment.linear:
                x, statistics = self.scan_linear(segment, x, mix)
                collected.append(statistics)
            else:
                x, _ = self.run_softmax(segment, x, context)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *collected) if collected else {}

    # The first and the last step of every pass

    def embedded(self, tokens: Int[Array, "B T"], context: Context | None = None) -> Float[Array, "B T D"]:
        """Hidden states before the first layer, in the dtype of the embedding; at what ``context`` says is padding,
        those of token 0 whatever the id (one outside the vocabulary has none: NaN).
        """
        if context is not None:
            (tokens,) = context.without_padding(tokens)
        table = self.embed.embedding[...]
        if tokens.size >= self.config.vocab_size // 16:  # for a few tokens the table is the larger thing to gather
            table = parallel.whole_rows(table)
        return parallel.constrain(jnp.take(table, tokens, axis=0))

    def context(
        self,
        tokens: Int[Array, "B T"],
        start: Int[Array, " B"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        unread: Int[Array, " B"] | None = None,
    ) -> Context:
        """What the layers know about the tokens of one call: rotary table, valid ``lengths``, and ``start``, the number
        of tokens that each sequence had before (default 0). ``positions`` default to start .. start + T - 1;
        with ``segment_ids`` they begin again in each document. ``unread``: see :meth:`prefill`.

        Raises:
          ValueError: tokens that are not [B, T] with at least one token, ``lengths`` that are not int [B], or concrete
            ones outside 0 .. T (those of a traced call are clamped to that range).
        """
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens: expected [B, T] with at least one token, got shape {list(tokens.shape)}")
        batch, length = tokens.shape
        if lengths is not None:
            check_lengths(lengths, batch, length)
            lengths = jnp.clip(lengths, 0, length)
        start = jnp.zeros((batch,), jnp.int32) if start is None else start
        segments = None
        if segment_ids is not None:
            check_segments(segment_ids, batch, length)
            valid = None if lengths is None else jnp.arange(length) < lengths[:, None]
            segments = segment_numbers(segment_ids, valid)
        if positions is None:
            positions = token_positions(start, length, segments)
        cos, sin = rope_table(positions, self.config, lengths, None if unread is None else start + unread)
        return Context(cos, sin, start, lengths, segments)

    def head_kernel(self) -> Float[Array, "V D"] | Float[Array, "D V"]:
        """The matrix of :meth:`head` as it is stored (its dimensions: :attr:`head_axes`), gathered over ``fsdp``: for
        loops over chunks, which would gather it each time.
        """
        if self.lm_head is None:
            return parallel.whole_rows(self.embed.embedding[...])
        return parallel.whole_rows(self.lm_head.kernel[...].T).T

    @property
    def head_axes(self) -> str:
        """Dimensions of :meth:`head_kernel`: "vd" when it is the embedding, else "dv"."""
        return "vd" if self.lm_head is None else "dv"

    def head(
        self, hidden: Float[Array, "*b D"], kernel: Float[Array, "V D"] | Float[Array, "D V"] | None = None
    ) -> Float[Array, "*b V"]:
        """Logits in float32 of final-normed hidden states; ``kernel``: see :meth:`head_kernel`."""
        if kernel is None:
            kernel = self.embed.embedding[...] if self.lm_head is None else self.lm_head.kernel[...]
        # The embedding is not transposed first: in a loop over chunks that would be a copy of it.
        spec = f"...d,{self.head_axes}->...v"
        return jnp.einsum(spec, hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

    # The layers between them

    def segments(self, as_teacher: bool = False) -> list[Segment]:
        """Consecutive layers of one kind, softmax or linearised, in order; one softmax run ``as_teacher``."""
        layers = self.config.num_layers
        if as_teacher or self.mixers is None or self.attention_config is None:
            return split_segments(layers, tuple(range(layers)))
        return split_segments(layers, tuple(self.attention_config.softmax_layers))

    def _run(self, segment: Segment, x, context: Context, **options) -> tuple[Any, Any]:
        run = self.run_linear if segment.linear else self.run_softmax
        return run(segment, x, context, **options)

    def layer_context(self, context: Context, layer: Int[Array, ""]) -> Context:
        """``context`` for one layer, whose number may be known only while the program runs: without rotation where the
        layer has none.
        """
        if not self.config.nope_layers:
            return context
        still = _is_in(layer, self.config.nope_layers, self.config.num_layers)
        return context._replace(cos=jnp.where(still, 1.0, context.cos), sin=jnp.where(still, 0.0, context.sin))

    def teacher_attention(
        self,
        context: Context,
        layer: Int[Array, ""],
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        v: Float[Array, "B T Hkv d"],
    ) -> Float[Array, "B T H d"]:
        """Causal softmax attention of one layer over a whole sequence, from q and k before rotation, with rotary embedding
        and window: the heads before Wo.
        """
        context = self.layer_context(context, layer)
        q, k, v = context.without_padding(q, k, v)
        q, k = (rotate(array, context.cos, context.sin) for array in (q, k))
        return self._softmax_attention(layer, q, k, v, segments=context.segments)

    def _softmax_attention(self, layer, q, k, v, **options):
        config = self.config
        if config.sliding_window is None or not config.full_attention_layers:
            return softmax_attention(q, k, v, window=config.sliding_window, **options)
        # Both branches are compiled, and one runs: kernels want to know the window beforehand.
        attend = functools.partial(softmax_attention, **options)
        full, sliding = (functools.partial(attend, window=n) for n in (None, config.sliding_window))
        whole = _is_in(layer, config.full_attention_layers, config.num_layers)
        return jax.lax.cond(whole, full, sliding, q, k, v)

    def run_softmax(
        self,
        segment: Segment,
        x: Float[Array, "B T D"],
        context: Context,
        *,
        cache: caching.Cache | None = None,
        remat: str = "none",
        unroll: bool = False,
        dropout_rng: jax.Array | None = None,
        as_teacher: bool = False,
    ) -> tuple[Float[Array, "B T D"], caching.Cache | None]:
        """The softmax layers of a segment under one scan: (hidden states, the cache with these tokens appended).

        ``remat`` and ``unroll`` as in :meth:`__call__`; they serve passes without a cache.
        """
        del dropout_rng  # adapters exist in linearised layers only
        layers = Stacked(self.layers, segment.start, segment.stop)

        def forward(x, xs):
            params, layer = xs
            mix = lambda h, q, k, v: (self.teacher_attention(context, layer, q, k, v), None)  # noqa: E731
            return layers.layer(params)(x, mix)

        def cached(carry, xs):
            (x, keys, values), (params, layer, index) = carry, xs

            def mix(h, q, k, v):
                own = self.layer_context(context, layer)
                q, k, v = own.without_padding(q, k, v)
                q, k = (rotate(array, own.cos, own.sin) for array in (q, k))
                new = (
                    caching.write_kv(keys, index, context.start, k),
                    caching.write_kv(values, index, context.start, v),
                )
                return self._softmax_attention(layer, q, new[0][index], new[1][index], start=context.start), new

            x, (keys, values) = layers.layer(params)(x, mix)
            return (x, keys, values), None

        numbers = jnp.arange(segment.start, segment.stop)
        if cache is None:
            x, _ = jax.lax.scan(rematerialized(forward, remat), x, (layers.params, numbers), unroll=unroll)
            return x, None
        # In the carry, the buffer is updated in place; as scanned input and output it would be copied at every token.
        indices = jnp.arange(segment.first, segment.first + segment.stop - segment.start)
        carry = (x, cache["softmax"]["k"], cache["softmax"]["v"])
        (x, keys, values), _ = jax.lax.scan(cached, carry, (layers.params, numbers, indices))
        return x, {**cache, "softmax": {"k": keys, "v": values}}

    def run_linear(
        self,
        segment: Segment,
        x: Float[Array, "B T D"],
        context: Context,
        *,
        cache: caching.Cache | None = None,
        remat: str = "none",
        unroll: bool = False,
        dropout_rng: jax.Array | None = None,
        as_teacher: bool = False,
    ) -> tuple[Float[Array, "B T D"], caching.Cache | None]:
        """The linearised layers of a segment with their mixers: (hidden states, the cache with their next states)."""
        del as_teacher  # there are no linear segments then

        def mix(mixer, index, state, *projections):
            o, state = mixer(*projections, self.layer_context(context, index), state)
            return o, None if cache is None else state

        kind = segment.mixers
        states = None if cache is None else jax.tree.map(lambda leaf: leaf[kind], cache["linear"])
        options = {"remat": remat, "unroll": unroll, "dropout_rng": dropout_rng}
        x, states = self.scan_linear(segment, x, mix, states=states, **options)
        if cache is None:
            return x, None
        linear = jax.tree.map(lambda old, new: old.at[kind].set(new), cache["linear"], states)
        return x, {**cache, "linear": linear}

    def scan_linear(
        self,
        segment: Segment,
        x: Float[Array, "B T D"],
        mix: Callable,
        *,
        states: Any = None,
        remat: str = "none",
        unroll: bool = False,
        dropout_rng: jax.Array | None = None,
        adapted: bool = True,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The linearised layers of a segment under one scan, with any token mixing: (hidden states, the extras of all
        layers, stacked).

        ``mix(mixer, index, state, h, q, k, v) -> (o, extra)`` mixes the tokens of layer number ``index``: with the
        layer's mixer, its slice of ``states``, the normed input and its projections it gives the heads' output.
        ``adapted`` False leaves the adapters out.
        """
        layers = Stacked(self.layers, segment.start, segment.stop)
        mixers = Stacked(self.mixers, segment.mixers.start, segment.mixers.stop)
        adapters = Stacked(self.lora if adapted else None, segment.mixers.start, segment.mixers.stop)

        def body(x, xs):
            params, mixer, adapter, index, state = xs
            key = None if dropout_rng is None else jax.random.fold_in(dropout_rng, index)
            step = functools.partial(mix, mixers.layer(mixer), index, state)
            return layers.layer(params)(x, step, adapters.layer(adapter), dropout_key=key)

        indices = jnp.arange(segment.start, segment.stop)
        xs = (layers.params, mixers.params, adapters.params, indices, states)
        return jax.lax.scan(rematerialized(body, remat), x, xs, unroll=unroll)


def _last_valid(x: Float[Array, "B T D"], lengths: Int[Array, " B"] | None) -> Float[Array, "B D"]:
    if lengths is None:
        return x[:, -1]
    return jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]


def _is_in(layer: Int[Array, ""], chosen: tuple[int, ...], layers: int) -> Bool[Array, ""]:
    return jnp.asarray([number in chosen for number in range(layers)])[layer]


def num_linear(config: ModelConfig, attention: AttentionConfig) -> int:
    """M, the number of linearised layers."""
    return sum(layer not in attention.softmax_layers for layer in range(config.num_layers))


def build_mixers(config: ModelConfig, attention: AttentionConfig, *, rngs: nnx.Rngs) -> TokenMixer:
    """The stacked token mixers of all linearised layers, freshly initialised (float32)."""
    return mixer_class(attention)(config, attention, rngs=rngs, stack=(num_linear(config, attention),))


def build_lora(config: ModelConfig, attention: AttentionConfig, lora: LoraConfig, *, rngs: nnx.Rngs) -> Lora:
    """The stacked adapters of all linearised layers, freshly initialised (float32)."""
    return Lora(config, lora, rngs=rngs, stack=(num_linear(config, attention),))


def _check(config: ModelConfig, attention: AttentionConfig | None, lora: LoraConfig | None) -> None:
    problems = model_problems(config)
    if attention is not None:
        problems += attention_problems(attention, "attention")
        if attention.kind in MIXERS:
            problems += mixer_class(attention).problems(config, attention)
        problems += [
            f"attention.softmax_layers: layer {layer} does not exist, the model has layers 0 to {config.num_layers - 1}"
            for layer in attention.softmax_layers
            if not 0 <= layer < config.num_layers
        ]
    elif lora is not None:
        problems.append("lora: adapters belong to linearised layers; give an attention config as well")
    if problems:
        raise UserError("invalid model: " + "; ".join(problems))

"""What stands at padding on the right reaches nothing: not the outputs of valid tokens, not states, not gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lawcat_jax import models
from lawcat_jax.config import AttentionConfig
from lawcat_jax.models.layers import Context
from lawcat_jax.models.mixers import mixer_class
from lawcat_jax.models.rope import rope_table
from lawcat_jax.training.attention_transfer import teacher_forced
from tests.models.helpers import TINY, build, drawn, jit, tokens

LENGTHS = np.asarray([4, 7], np.int32)
VALID = np.arange(7) < LENGTHS[:, None]
MIXERS = {
    "lawcat": AttentionConfig(gate_rank=4),
    "window": AttentionConfig(gate_rank=4, window_size=2, sinks=1, output_gate=True, normalize=True),
    "no_convolution": AttentionConfig(gate_rank=0, conv="off", feature_map="relu", tie_qk=False),
    "lolcats": AttentionConfig(kind="lolcats", window_size=2),
    "window_alone": AttentionConfig(kind="window", window_size=2, sinks=1),
}


def chosen_mixers(*fast):
    return [pytest.param(MIXERS[x], id=x, marks=[] if x in fast else [pytest.mark.slow]) for x in MIXERS]


@pytest.mark.parametrize("attention", chosen_mixers("lawcat", "window"))
def test_a_mixer_takes_nan_at_padding(attention):
    chosen = mixer_class(attention)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: chosen(TINY, attention, rngs=nnx.Rngs(0))))
    params = drawn(nnx.to_pure_dict(shapes))
    start = jnp.zeros((2,), jnp.int32)
    context = Context(*rope_table(start[:, None] + jnp.arange(7), TINY), start, jnp.asarray(LENGTHS))
    heads = [(TINY.num_heads, TINY.head_dim), *[(TINY.num_kv_heads, TINY.head_dim)] * 2]
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((2, 7, *more)).astype(np.float32) for more in ((TINY.hidden_size,), *heads)]

    @jit
    def run(params, arrays):
        def loss(params, arrays):
            o, state = nnx.merge(graphdef, params)(*arrays, context)
            o = jnp.where(VALID[..., None, None], o, 0)
            return jnp.sum(jnp.sin(o)) + sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(state)), (o, state)

        statistics = nnx.merge(graphdef, params).statistics(*arrays, context)
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, arrays), statistics

    def filled(value):
        return [np.where(VALID.reshape(2, 7, *(1,) * (x.ndim - 2)), x, np.float32(value)) for x in arrays]

    want = run(params, filled(0))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(want))
    for value in (np.nan, np.inf):
        jax.tree.map(np.testing.assert_array_equal, run(params, filled(value)), want)


@pytest.mark.parametrize(
    "attention", [*chosen_mixers("lawcat"), pytest.param(None, id="teacher", marks=pytest.mark.slow)]
)
def test_ids_at_padding_do_not_matter(attention):
    """Ids outside the vocabulary, for which the embedding has no row."""
    graphdef, params = build(attention=attention)
    ids = tokens(2, 7)

    @jit
    def run(params, ids):
        def loss(params):
            decoder = models.bind(graphdef, params)
            logits = jnp.where(VALID[..., None], decoder(ids, lengths=LENGTHS), 0)
            return jnp.sum(jnp.sin(logits)), logits

        decoder = models.bind(graphdef, params)
        last, cache = decoder.prefill(ids, decoder.init_cache(2, 7), lengths=LENGTHS)
        return jax.value_and_grad(loss, has_aux=True)(params), last, decoder.decode(ids[:, 0], cache)[0]

    want = run(params, np.where(VALID, ids, 0))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(want))
    for pad in (TINY.vocab_size, -7, 2**31 - 1):
        jax.tree.map(np.testing.assert_array_equal, run(params, np.where(VALID, ids, pad)), want)


@pytest.mark.slow
def test_attention_transfer_takes_any_id_at_padding():
    graphdef, params = build(attention=MIXERS["lawcat"])
    ids = tokens(2, 7)

    def layer_loss(index, teacher, student, mask):
        del index
        return jnp.sum(jnp.where(mask[..., None], jnp.square(teacher - student), 0))

    @jit
    def run(params, ids):
        def loss(params):
            decoder = models.bind(graphdef, params)
            return jnp.sum(teacher_forced(decoder, ids, lengths=LENGTHS, layer_loss=layer_loss))

        return jax.value_and_grad(loss)(params)

    want = run(params, np.where(VALID, ids, 0))
    jax.tree.map(np.testing.assert_array_equal, run(params, np.where(VALID, ids, TINY.vocab_size)), want)


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        (tokens(2, 7), np.asarray([-1, 7]), "lengths: expected 0 to 7"),
        (tokens(2, 7), np.asarray([8, 7]), "lengths: expected 0 to 7"),
        (tokens(2, 7), np.asarray([7]), r"lengths: expected \[B\]"),
        (tokens(2, 7)[:0], None, "tokens: expected"),
        (tokens(2, 7)[0], None, "tokens: expected"),
    ],
)
def test_what_cannot_be_is_refused(ids, lengths, message):
    graphdef, params = build()
    with pytest.raises(ValueError, match=message):
        models.bind(graphdef, params).context(jnp.asarray(ids), lengths=lengths)


def test_lengths_of_a_traced_call_are_clamped():
    graphdef, params = build(attention=MIXERS["lolcats"])

    @jit
    def run(lengths):
        decoder = models.bind(graphdef, params)
        return decoder.prefill(tokens(2, 7), decoder.init_cache(2, 7), lengths=lengths)

    jax.tree.map(np.testing.assert_array_equal, run(jnp.asarray([-2, 9])), run(jnp.asarray([0, 7])))

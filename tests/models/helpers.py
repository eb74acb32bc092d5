"""Tiny models, and jitted forward, prefill and decode shared by the tests of this folder."""

import functools

import jax
import numpy as np

from lawcat_jax import models
from lawcat_jax.config import AttentionConfig, ModelConfig

TINY = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=32,
    tie_embeddings=True,
)
LAWCAT = AttentionConfig(gate_rank=4)

# These programs run for milliseconds: compiling them fast matters more than how fast they are.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tokens(batch=2, length=9, seed=0, vocab=40):
    return np.random.default_rng(seed).integers(0, vocab, (batch, length)).astype(np.int32)


def drawn(shapes, seed=0, scale=0.3):
    """Random parameters of these shapes (around 1 for norms): nothing at a special initial value, and nothing to
    compile.
    """
    generator = np.random.default_rng(seed)

    def draw(path, shape):
        center = 1.0 if path[-1].key == "scale" else 0.0
        return (center + scale * generator.standard_normal(shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def build(config=TINY, attention=None, lora=None, seed=0):
    """(graphdef, random params)."""
    graphdef, shapes = models.abstract(config, attention, lora)
    return graphdef, drawn(shapes, seed)


@functools.partial(jit, static_argnames=("graphdef", "as_teacher"))
def forward(params, tokens, *, graphdef, lengths=None, as_teacher=False):
    return models.bind(graphdef, params)(tokens, lengths=lengths, as_teacher=as_teacher)


@functools.partial(jit, static_argnames=("graphdef", "as_teacher"))
def prefill(params, tokens, cache, *, graphdef, lengths=None, as_teacher=False):
    return models.bind(graphdef, params).prefill(tokens, cache, lengths=lengths, all_logits=True, as_teacher=as_teacher)


@functools.partial(jit, static_argnames=("graphdef", "as_teacher"))
def decode(params, token, cache, *, graphdef, as_teacher=False):
    return models.bind(graphdef, params).decode(token, cache, as_teacher=as_teacher)

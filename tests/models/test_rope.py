"""Rotary frequencies of every kind against transformers' own functions and modules."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lawcat_jax.checkpoints.hf.config_map import model_config_from_hf, model_config_to_hf
from lawcat_jax.config import ModelConfig
from lawcat_jax.models.rope import inverse_frequencies, rope_table, rotate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4)
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [1.5 + 1.3 * i for i in range(8)]
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn_all": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 24,
        "beta_fast": 5.0,
        "beta_slow": 0.2,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn_attention": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.7},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 32,
    },
    "longrope_factor": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 6.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "llama3_original": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def both(kind: str) -> tuple:
    """(transformers' config, ours), from the form of transformers 5; that of version 4 must read alike."""
    rope = {**KINDS[kind], "rope_theta": 5000.0}
    common = dict(SIZES, max_position_embeddings=64)
    theirs = transformers.LlamaConfig(**common, rope_parameters=dict(rope))
    llama = {"model_type": "llama", **common}
    five = model_config_from_hf({**llama, "rope_parameters": rope})
    older = {"type" if name == "rope_type" else name: value for name, value in KINDS[kind].items()}
    assert model_config_from_hf({**llama, "rope_theta": 5000.0, "rope_scaling": older}) == five
    assert model_config_from_hf(model_config_to_hf(five, "float32")) == five
    return theirs, five


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies(kind):
    theirs, config = both(kind)
    name = KINDS[kind]["rope_type"]
    for length in (None, 20, 64, 150):
        if name == "default":
            module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
            expected, factor = module.compute_default_rope_parameters(theirs)
        else:
            expected, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[name](theirs, None, length)
        np.testing.assert_allclose(inverse_frequencies(config, length or 0), expected.numpy(), rtol=2e-6)
        assert config.rope_scaling.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize("kind", KINDS)
def test_table(kind):
    """Cosines and sines of transformers' rotary module, below and above the original length."""
    theirs, config = both(kind)
    for length in (24, 90):
        module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
        positions = np.arange(length, dtype=np.int32)[None]
        expected = module(torch.zeros(1), torch.from_numpy(positions).long())
        table = rope_table(jnp.asarray(positions), config)
        for ours, reference in zip(table, expected, strict=True):
            np.testing.assert_allclose(ours, reference.numpy()[..., :8], atol=2e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_follow_each_sequence_and_not_its_padding(kind):
    _, config = both(kind)
    positions = jnp.arange(90)[None].repeat(2, axis=0)
    cos, sin = rope_table(positions, config, jnp.array([90, 20]))
    for row, length in enumerate((90, 20)):
        alone = rope_table(positions[:1, :length], config)
        np.testing.assert_allclose(cos[row, :length], alone[0][0], atol=1e-6)
        np.testing.assert_allclose(sin[row, :length], alone[1][0], atol=1e-6)
    assert np.abs(np.asarray(cos[0, :20] - cos[1, :20])).max() > 0.01


def test_part_of_each_head_is_rotated():
    config = ModelConfig(head_dim=16, partial_rotary_factor=0.75)
    table = rope_table(jnp.arange(5)[None], config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 16)), jnp.float32)
    whole = dataclasses.replace(config, head_dim=12, partial_rotary_factor=1.0)
    rotated = rotate(x[..., :12], *rope_table(jnp.arange(5)[None], whole))
    np.testing.assert_array_equal(rotate(x, *table), jnp.concatenate([rotated, x[..., 12:]], axis=-1))

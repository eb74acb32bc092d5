"""Logits against ``transformers`` on random tiny models whose weights are copied by the few lines below."""

import jax.numpy as jnp
import numpy as np
import pytest

from lawcat_jax import models
from lawcat_jax.config import ModelConfig, RopeScaling
from tests.models.helpers import decode, forward, prefill, tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=40, hidden_size=24, num_layers=2, num_heads=4, head_dim=8, mlp_size=32)
LLAMA3 = RopeScaling(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
CASES = {
    "grouped_tied_llama3": ModelConfig(
        **SIZES, num_kv_heads=2, tie_embeddings=True, rope_theta=500.0, rope_scaling=LLAMA3
    ),
    "one_kv_head_untied_linear": ModelConfig(**SIZES, num_kv_heads=1, rope_scaling=RopeScaling("linear", factor=4.0)),
    "sliding_window": ModelConfig(**SIZES, family="mistral", num_kv_heads=2, sliding_window=5),
}


def hf_model(config: ModelConfig):
    """A random float32 transformers model of the same architecture."""
    rope = {"rope_type": config.rope_scaling.kind, "rope_theta": config.rope_theta}
    if rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    else:
        rope["factor"] = config.rope_scaling.factor
    if config.rope_scaling.kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            rope[name] = getattr(config.rope_scaling, name)
    common = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.mlp_size,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=128,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    if config.family == "mistral":
        kind, settings = transformers.MistralForCausalLM, transformers.MistralConfig
        common["sliding_window"] = config.sliding_window
    else:
        kind, settings = transformers.LlamaForCausalLM, transformers.LlamaConfig
    model = kind(settings(**common)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def copied(model, config: ModelConfig) -> dict:
    """The weights of ``model`` in our layout."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}

    def stacked(suffix, kernel=True):
        layers = [weights[f"model.layers.{layer}.{suffix}.weight"] for layer in range(config.num_layers)]
        array = np.stack([layer.T if kernel else layer for layer in layers])
        return {"kernel" if kernel else "scale": jnp.asarray(array)}

    params = {
        "embed": {"embedding": jnp.asarray(weights["model.embed_tokens.weight"])},
        "final_norm": {"scale": jnp.asarray(weights["model.norm.weight"])},
        "layers": {
            "input_norm": stacked("input_layernorm", kernel=False),
            "post_attention_norm": stacked("post_attention_layernorm", kernel=False),
            "attention": {f"{name}_proj": stacked(f"self_attn.{name}_proj") for name in "qkvo"},
            "mlp": {f"{name}_proj": stacked(f"mlp.{name}_proj") for name in ("gate", "up", "down")},
        },
    }
    if not config.tie_embeddings:
        params["lm_head"] = {"kernel": jnp.asarray(weights["lm_head.weight"].T)}
    return params


@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(case):
    config = CASES[case]
    model = hf_model(config)
    graphdef, shapes = models.abstract(config)
    params = copied(model, config)
    inputs = tokens(2, 23)
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs).long()).logits.numpy()
    logits = np.asarray(forward(params, inputs, graphdef=graphdef))
    assert logits.dtype == np.float32
    assert np.std(expected) > 0.1  # a comparison of something
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert shapes.keys() == params.keys()

    # The cached paths, with a window reaching over the border of two chunks.
    cache = models.bind(graphdef, params).init_cache(2, 32)
    first, cache = prefill(params, inputs[:, :15], cache, graphdef=graphdef)
    np.testing.assert_allclose(first, expected[:, :15], atol=1e-4)
    for t in range(15, 18):
        logits, cache = decode(params, inputs[:, t], cache, graphdef=graphdef)
        np.testing.assert_allclose(logits, expected[:, t], atol=1e-4)

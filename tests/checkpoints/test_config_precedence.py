"""Configurations that say a thing twice: transformers' choice is followed, or the contradiction refused."""

import numpy as np
import pytest

from lawcat_jax.checkpoints.hf.read import Checkpoint
from lawcat_jax.checkpoints.logits import teacher_logits
from lawcat_jax.checkpoints.model_dir import load_model
from lawcat_jax.errors import UserError
from tests.checkpoints import hf_models

LINEAR = {"rope_type": "linear", "factor": 8.0}
BOTH = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, "rope_scaling": LINEAR}
WIDE = {"initializer_range": 0.3}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 5, "layer_types": ["full_attention"] * 3}),
        ("mistral", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 3}),
        ("mistral", {"sliding_window": 5, "layer_types": None}),
        ("llama", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 3}),  # has none, whatever is stated
        ("llama", BOTH | {"rope_theta": 500.0}),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.25}),
        ("phi3", {"rope_parameters": None, "partial_rotary_factor": 0.25}),
    ],
)
def test_logits_equal_transformers(family, changes, tmp_path):
    values = WIDE | {"num_hidden_layers": 3} | ({"pad_token_id": 0} if family == "phi3" else {})
    source = hf_models.make_random(tmp_path / "hf", family, values)
    hf_models.edit_json(source / "config.json", **changes)
    tokens = hf_models.tokens()
    reference = hf_models.torch_logits(source, tokens)
    np.testing.assert_allclose(teacher_logits(load_model(source, dtype="float32"), tokens), reference, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", BOTH, "rope_theta 500.0 in rope_parameters would be ignored beside rope_scaling"),
        ("llama", BOTH | {"rope_theta": 300.0}, r"which wins \(300.0 is used\)"),
        (
            "phi3",
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "rope_scaling": {"rope_type": "default"}},
            "partial_rotary_factor 0.5 in rope_parameters would be ignored",
        ),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 5e2}}}, r"by kind of layer \(full_attention\)"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types that differ"),
        ("mistral", {"layer_types": ["chunked_attention"] * 2}, "layer_types: 'chunked_attention' is not supported"),
    ],
)
def test_contradictions_are_one_line(family, changes, words, tmp_path):
    values = {"num_hidden_layers": 2} | ({"pad_token_id": 0} if family == "phi3" else {})
    source = hf_models.make_random(tmp_path / "hf", family, values)
    hf_models.edit_json(source / "config.json", **changes)
    with pytest.raises(UserError, match=words) as caught:
        Checkpoint(source)
    assert "\n" not in str(caught.value)

"""Whatever switch of the configuration is turned: an exported student computes the same, or is refused by name."""

import dataclasses
import itertools
import random
import typing

import jax
import numpy as np
import pytest

from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.checkpoints.logits import student_logits
from lawcat_jax.checkpoints.model_dir import load_model
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig, RopeScaling, attention_problems
from lawcat_jax.errors import UserError
from lawcat_jax.models.mixers import mixer_class
from tests.checkpoints import students

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TINY = dataclasses.replace(students.MODEL, num_layers=2, mlp_size=24)
PLAIN = {"gate_rank": 4}
WINDOW = {"window_size": 5}
LOLCATS = {"kind": "lolcats", "tie_qk": False, **WINDOW}
TERRACED = {"window_kind": "terraced"}
ATTENTIONS = {
    "paper": {},
    "conv_off": {"conv": "off"},
    "conv_shared": {"conv": "shared", "conv_size": 3},
    "conv_stacked": {"conv": "stacked", "conv_size": 3},
    "conv_of_one_tap_stacked_with_a_window": {"conv": "stacked", "conv_size": 1, **WINDOW},
    "softmax_dim_untied": {"tie_qk": False, "feature_dim": 5},
    "half_softmax_untied": {"feature_map": "half_softmax", "tie_qk": False, "feature_dim": 5},
    "exp_dim": {"feature_map": "exp_dim", "feature_dim": 3},
    "relu": {"feature_map": "relu", "feature_dim": 5},
    "relu_untied_with_a_window": {"feature_map": "relu", "tie_qk": False, **WINDOW},
    "pos_elu": {"feature_map": "pos_elu", "feature_dim": 7},
    "unnormalized": {"normalize": False, "feature_dim": 3},
    "unnormalized_output_gate": {"normalize": False, "output_gate": True, "conv": "off", "gate_kind": "none"},
    "rope_linear": {"rope_linear": True},
    "window": WINDOW,
    "window_terraced": {**WINDOW, **TERRACED},
    "window_affine_sinks": {**WINDOW, "affine_window": True, "sinks": 2},
    "window_terraced_affine_sinks": {**WINDOW, **TERRACED, "affine_window": True, "sinks": 7},
    "window_of_one_token_rope_linear": {"window_size": 1, **TERRACED, "rope_linear": True},
    "window_output_gate_no_gate": {**WINDOW, **TERRACED, "output_gate": True, "gate_kind": "none", "feature_dim": 3},
    "window_beyond_the_sequence": {"window_size": 100, "sinks": 1},
    "per_head": {"gate_kind": "per_head"},
    "per_head_full_rank": {"gate_kind": "per_head", "gate_rank": 0},
    "full_rank": {"gate_rank": 0},
    "no_gate": {"gate_kind": "none"},
    "unbounded_gate": {"gate_lower_bound": None, "gate_normalizer": 0.05},
    "unbounded_gate_with_a_window": {"gate_lower_bound": None, "gate_normalizer": 0.5, **WINDOW, "sinks": 1},
    "weakly_bounded_gate": {"gate_lower_bound": -0.5, "gate_normalizer": 0.5},
    "strongly_bounded_gate": {"gate_lower_bound": -200.0, "gate_normalizer": 0.005},
    "output_gate": {"output_gate": True},
    "softmax_layers": {"softmax_layers": (1,), **WINDOW},
    "lolcats": LOLCATS,
    "lolcats_terraced": {**LOLCATS, **TERRACED},
    "lolcats_sinks_affine": {**LOLCATS, "sinks": 3, "affine_window": True},
    "lolcats_terraced_sinks_affine": {**LOLCATS, **TERRACED, "sinks": 3, "affine_window": True, "feature_dim": 3},
    "lolcats_terraced_long_relu_hybrid": {
        **LOLCATS,
        **TERRACED,
        "window_size": 20,
        "feature_map": "relu",
        "softmax_layers": (0,),
    },
    "kind_window": {"kind": "window", **WINDOW},
}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.2}
LONGROPE = {"kind": "longrope", "short_factor": (1.0,) * 4, "long_factor": (2.0,) * 4}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 0.5, "high_freq_factor": 2.0}
MODELS = {  # all with the rotary embedding in use
    "tied_llama3": {"tie_embeddings": True, "rope_scaling": RopeScaling(**LLAMA3)},
    "linear_theta": {"rope_theta": 100.0, "rope_scaling": RopeScaling(kind="linear", factor=3.0)},
    "qwen3": {"family": "qwen3", "qk_norm": "head", "rms_norm_eps": 0.1},
    "qwen2_biases": {"family": "qwen2", "projection_biases": ("q_proj", "k_proj", "v_proj")},
    "all_biases": {"projection_biases": ("o_proj", "gate_proj", "up_proj", "down_proj")},
    "olmo2": {"family": "olmo2", "qk_norm": "projection", "norm_position": "after"},
    "smollm3": {"family": "smollm3", "nope_layers": (1,)},
    "nope_windows": {"family": "mistral", "nope_layers": (1,), "sliding_window": 7, "full_attention_layers": (0,)},
    "partial_yarn": {"family": "phi3", "partial_rotary_factor": 0.5, "rope_scaling": RopeScaling(**YARN)},
    "yarn_turns": {"rope_scaling": RopeScaling(**YARN, beta_fast=8.0, beta_slow=0.5, truncate=False)},
    "dynamic": {"rope_scaling": RopeScaling(kind="dynamic", factor=2.0)},
    "longrope": {"family": "phi3", "rope_scaling": RopeScaling(**LONGROPE)},
}
ROTATED = [LOLCATS, {"softmax_layers": (0, 1)}]
COMBINED = {  # name: (attention, model); every field and every choice at least once, several switches each
    "paper": ({}, {}),
    "stacked_relu_window": (
        {"conv": "stacked", "conv_size": 3, "feature_map": "relu", "feature_dim": 5, **WINDOW, "sinks": 2},
        MODELS["qwen2_biases"] | {"rope_theta": 100.0},
    ),
    "terraced_exp_dim_untied": (
        {**WINDOW, **TERRACED, "affine_window": True, "rope_linear": True, "feature_map": "exp_dim", "tie_qk": False},
        MODELS["partial_yarn"],
    ),
    "unbounded_unnormalized_pos_elu": (
        {
            "gate_lower_bound": None,
            "gate_normalizer": 0.05,
            "normalize": False,
            "feature_map": "pos_elu",
            "output_gate": True,
        },
        {},
    ),
    "shared_per_head_window": (
        {"conv": "shared", "gate_kind": "per_head", "gate_rank": 0, "gate_lower_bound": -0.5, **WINDOW},
        MODELS["olmo2"] | {"rope_scaling": RopeScaling(kind="linear", factor=3.0)},
    ),
    "no_conv_no_gate_terraced": (
        {"conv": "off", "gate_kind": "none", "feature_dim": 3, **WINDOW, **TERRACED, "sinks": 7},
        MODELS["smollm3"],
    ),
    "lolcats_terraced_relu_hybrid": (
        {**LOLCATS, **TERRACED, "feature_map": "relu", "softmax_layers": (0,), "sinks": 3},
        MODELS["tied_llama3"] | MODELS["qwen3"],
    ),
    "lolcats_half_softmax": (
        {**LOLCATS, "feature_map": "half_softmax", "affine_window": True, "softmax_layers": (0,)},
        MODELS["nope_windows"] | {"rope_scaling": MODELS["yarn_turns"]["rope_scaling"]},
    ),
    "kind_window": ({"kind": "window", **WINDOW}, {}),
    "dynamic": (LOLCATS, MODELS["dynamic"]),
    "longrope": (WINDOW, MODELS["longrope"]),
}
REFUSED = {
    "kind_window": "attention.kind 'window'",
    "dynamic": "model.rope_scaling.kind 'dynamic'",
    "longrope": "model.rope_scaling.kind 'longrope'",
}
# What has no part in the logits of a finished student, or only in how they are computed.
HARMLESS = {
    AttentionConfig: {"init", "gate_half_life", "gate_half_life_max", "implementation"},
    ModelConfig: {"bos_token_id", "pad_token_id"},  # and eos_token_ids, which the students here have
    RopeScaling: set(),
    LoraConfig: {"dropout"},
}
LORA = LoraConfig(rank=2, alpha=6.0, targets=("k_proj", "o_proj"))


def case(name, attention, model, lora=LORA):
    attention, model = AttentionConfig(**(PLAIN | attention)), dataclasses.replace(TINY, **model)
    return pytest.param(attention, model, None if name == "paper" else lora, REFUSED.get(name), id=name)


QUICK = [case(name, *values) for name, values in COMBINED.items()]
SINGLE = [case(name, values, {}) for name, values in ATTENTIONS.items()]
SINGLE += [case(name, attention, values) for name, values in MODELS.items() for attention in ROTATED]


def check(folder, attention, model, lora, refusal=None):
    """Logits of the exported student are those of the student: read whole with padding anywhere, and in pieces."""
    from lawcat_jax.checkpoints.torch import modeling_lawcat as code

    source, out = students.save(folder / "student", attention, lora, model), folder / "out"
    if refusal is not None:
        with pytest.raises(UserError, match=f"--to=transformers does not support {refusal}") as caught:
            convert(str(source), str(out), to="transformers")
        assert "\n" not in str(caught.value)
        assert not out.exists()
        return
    convert(str(source), str(out), to="transformers")
    bundle, back = load_model(source, dtype="float32"), load_model(out, dtype="keep")
    assert students.same_bits(back.params, bundle.params)
    assert (back.model, back.attention, back.lora) == (bundle.model, bundle.attention, bundle.lora)
    student, report = code.LawcatForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    rng = np.random.default_rng(0)
    ids, width = rng.integers(3, model.vocab_size, (2, 80)), 100
    ours = student_logits(bundle, ids.astype(np.int32))
    padded, mask = np.ones((2, width), int), np.zeros((2, width), int)
    for row in range(2):
        places = np.sort(rng.choice(width, 80, replace=False))
        padded[row, places], mask[row, places] = ids[row], 1
    padded, valid = torch.as_tensor(padded), torch.as_tensor(mask)
    cache = code.LawcatCache(student.config)
    ends = [0, 1, 4, 70, *range(71, width + 1)]
    with torch.no_grad():
        whole = student.eval()(padded, attention_mask=valid).logits.numpy()
        parts = [
            student(padded[:, start:end], attention_mask=valid[:, start:end], past_key_values=cache).logits.numpy()
            for start, end in itertools.pairwise(ends)
        ]
    for found in (whole, np.concatenate(parts, axis=1)):
        np.testing.assert_allclose(found[mask == 1], ours.reshape(160, -1), atol=1e-4)


@pytest.fixture(autouse=True)
def small():
    """Neither threads nor optimised programs pay for arrays as small as these."""
    threads, before = torch.get_num_threads(), jax.config.read("jax_disable_most_optimizations")
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    torch.set_num_threads(threads)
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize(("attention", "model", "lora", "refusal"), QUICK)
def test_an_exported_student_computes_the_same_or_is_refused_by_name(attention, model, lora, refusal, tmp_path):
    check(tmp_path, attention, model, lora, refusal)


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "model", "lora", "refusal"), SINGLE)
def test_each_switch_alone(attention, model, lora, refusal, tmp_path):
    check(tmp_path, attention, model, lora, refusal)


@pytest.mark.parametrize("kind", HARMLESS)
def test_no_field_and_no_choice_is_left_untried(kind):
    """A new field, or a new value of a choice, has to be among the quick cases or to be named harmless."""
    parts = [part for case in QUICK for part in (*case.values[:3], case.values[1].rope_scaling)]
    tried, default = [part for part in parts if isinstance(part, kind)], kind()
    left = {
        field.name
        for field in dataclasses.fields(kind)
        if all(getattr(config, field.name) == getattr(default, field.name) for config in tried)
    }
    assert left == HARMLESS[kind]
    for name, hint in typing.get_type_hints(kind).items():
        if typing.get_origin(hint) is typing.Literal and name not in HARMLESS[kind]:
            assert {getattr(config, name) for config in tried} == set(typing.get_args(hint)), name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_switches_in_any_combination(seed, tmp_path):
    draw = random.Random(seed)
    while True:
        values = {}
        for turned in draw.sample(list(ATTENTIONS.values()), 3):
            values |= turned
        attention = AttentionConfig(**(PLAIN | values))
        if attention.kind != "window" and not attention_problems(attention) + mixer_class(attention).problems(
            TINY, attention
        ):
            break
    check(tmp_path, attention, TINY, LORA)

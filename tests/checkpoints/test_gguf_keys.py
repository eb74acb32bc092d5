"""Entries of a GGUF file that change the result: read as transformers reads the original, or refused by name."""

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from lawcat_jax.checkpoints import model_dir  # noqa: E402
from lawcat_jax.checkpoints.conversion import convert  # noqa: E402
from lawcat_jax.checkpoints.logits import teacher_logits  # noqa: E402
from lawcat_jax.errors import UserError  # noqa: E402
from tests.checkpoints import gguf_files  # noqa: E402

TOKENS = np.random.default_rng(0).integers(0, gguf_files.SIZES["vocab_size"], (2, 40)).astype(np.int32)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


def entries(architecture, **values):
    """What a writer is called with to add ``<architecture>.*`` entries; two underscores stand for a dot."""

    def add(writer):
        for name, value in values.items():
            key = f"{architecture}.{name.replace('__', '.')}"
            kind = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)

    return add


def yarn(**factors):
    return entries(
        "qwen2",
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=16,
        **{f"rope__scaling__{name}": value for name, value in factors.items()},
    )


@pytest.mark.parametrize(
    ("name", "changes", "add"),
    [
        ("phi3_q8_0", {"sliding_window": 7}, None),
        (
            "qwen2_q4_1",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
            entries("qwen2", attention__sliding_window_pattern=[False, True, True]),
        ),
        ("qwen2_q4_1", {"rope_parameters": YARN}, yarn(yarn_ext_factor=1.0, attn_factor=1.0)),
        ("qwen2_q4_1", {"rope_parameters": YARN | {"attention_factor": 1.7}}, yarn(yarn_attn_factor=1.7)),
        (
            "qwen2_q4_1",
            {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}},
            yarn(yarn_beta_fast=8.0, yarn_beta_slow=2.0),
        ),
    ],
)
def test_logits_equal_transformers(name, changes, add, tmp_path):
    made = gguf_files.model(name, **changes)
    file = gguf_files.write(tmp_path / "m.gguf", name, made, tokenizer=add)
    bundle = model_dir.load_model(file, dtype="float32")
    np.testing.assert_allclose(teacher_logits(bundle, TOKENS), gguf_files.logits(made, TOKENS), atol=1e-4, rtol=1e-4)


REFUSED = {
    "attention.causal": False,
    "attention.scale": 0.1,
    "attention.clamp_kqv": 0.5,
    "logit_scale": 0.5,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "expert_used_count": 2,
    "rope.scaling.attn_factor": 1.2,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.dimension_sections": [16, 24, 24, 0],
    "an_entry_of_tomorrow": 3,
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "olmo2"])
def test_entries_that_change_the_result_are_named(architecture, tmp_path):
    case = {"llama": "llama_q8_0", "qwen2": "qwen2_q4_1", "olmo2": "olmo2_q8_0"}[architecture]
    made = gguf_files.model(case)
    target = tmp_path / "out"
    for name, value in REFUSED.items():
        add = entries(architecture, **{name.replace(".", "__"): value})
        file = gguf_files.write(tmp_path / "m.gguf", case, made, tokenizer=add)
        with pytest.raises(UserError, match=rf"changes the result: {architecture}\.{name} = ") as caught:
            convert(str(file), str(target))
        assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize(
    ("case", "architecture", "values", "words"),
    [
        ("olmo2_q8_0", "olmo2", {"attention__sliding_window": 20}, "olmo2.attention.sliding_window = 20"),  # OLMo 3
        ("qwen2_q4_1", "qwen2", {"attention__sliding_window": 20}, "qwen2.attention.sliding_window = 20"),  # of which?
        ("phi3_q8_0", "phi3", {"rope__scaling__type": "longrope"}, "rope scaling 'longrope' is not supported"),
        (
            "qwen2_q4_1",
            "qwen2",
            {"attention__sliding_window": 20, "attention__sliding_window_pattern": [True]},
            "for each of 3 layers",
        ),
    ],
)
def test_windows_and_scalings_that_no_family_has_are_refused(case, architecture, values, words, tmp_path):
    add = entries(architecture, **values)
    file = gguf_files.write(tmp_path / "m.gguf", case, gguf_files.model(case), tokenizer=add)
    with pytest.raises(UserError, match=words):
        model_dir.load_model(file)


def test_entries_that_say_not_used_are_accepted(tmp_path):
    made = gguf_files.model("phi3_q8_0")
    add = entries(
        "phi3",
        vocab_size=96,
        attention__sliding_window=0,
        attention__causal=True,
        attention__scale=0.25,  # 1 / sqrt(16), what attention divides by anyway
        attention__clamp_kqv=0.0,
        final_logit_softcapping=0.0,
        logit_scale=1.0,
        expert_count=0,
        rope__dimension_count=16,
        rope__scaling__original_context_length=64,  # which llama.cpp writes for every Phi-3
        rope__scaling__attn_factor=1.0,
        use_parallel_residual=False,
    )
    file = gguf_files.write(tmp_path / "m.gguf", "phi3_q8_0", made, tokenizer=add)
    bundle = model_dir.load_model(file, dtype="float32")
    np.testing.assert_allclose(teacher_logits(bundle, TOKENS), gguf_files.logits(made, TOKENS), atol=1e-4, rtol=1e-4)


def test_verify_of_what_transformers_cannot_read_or_ignores_is_one_line(tmp_path):
    smollm3 = gguf_files.write(tmp_path / "s.gguf", "smollm3_q8_0", gguf_files.model("smollm3_q8_0"))
    with pytest.raises(UserError, match="transformers cannot read it") as caught:
        convert(str(smollm3), str(tmp_path / "a"), verify=True)
    assert "\n" not in str(caught.value)
    made = gguf_files.model("phi3_q8_0", sliding_window=7)
    phi3 = gguf_files.write(tmp_path / "p.gguf", "phi3_q8_0", made)
    with pytest.raises(UserError, match="ignores rope scaling and sliding windows of GGUF"):
        convert(str(phi3), str(tmp_path / "b"), verify=True)
    assert not (tmp_path / "b").exists()

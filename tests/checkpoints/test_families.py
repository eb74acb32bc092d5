"""Every model family against ``transformers``: logits, cached generation, bit-exact round trips, refused options."""

import dataclasses
import functools
import itertools
import json
import sys
import types
from pathlib import Path
from typing import Literal, get_args

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lawcat_jax import models
from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.checkpoints.hf import families
from lawcat_jax.checkpoints.hf.config_map import model_config_from_hf, model_config_to_hf
from lawcat_jax.checkpoints.hf.mapping import base_shapes, flatten, unflatten
from lawcat_jax.checkpoints.hf.peft import write_adapter
from lawcat_jax.checkpoints.hf.read import Checkpoint, read_hf
from lawcat_jax.checkpoints.hf.write import write_hf
from lawcat_jax.checkpoints.logits import teacher_logits
from lawcat_jax.checkpoints.model_dir import load_model
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig, choices
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import sharding
from lawcat_jax.training.attention_transfer import teacher_forced
from tests.checkpoints import hf_models

pytest.importorskip("torch")

FAMILIES = get_args(choices.Family)
SHORT, LONG = [1.0, 1.1, 1.3, 1.6], [1.0, 2.0, 4.0, 7.0]
LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG},
    "original_max_position_embeddings": 16,
}
YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "max_position_embeddings": 16,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
# One combination of each family in the ordinary suite: (family, configuration, dtype, bytes per shard)
QUICK = {
    "llama_biases_yarn": ("llama", {"attention_bias": True, "mlp_bias": True, **YARN}, "float32", None),
    "qwen2_sliding_tied": ("qwen2", {**SLIDING, "tie_word_embeddings": True}, "bfloat16", "20KB"),
    "qwen3_head_dim": ("qwen3", {"head_dim": 16}, "float32", None),
    "smollm3_nope": ("smollm3", {"no_rope_layers": [1, 0, 1], "pad_token_id": None}, "float32", None),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}, "float32", "20KB"),
    "phi3_longrope": ("phi3", {**LONGROPE, "pad_token_id": 0}, "float32", None),
}
SLOW = {
    "phi3_part_rotated": ("phi3", {"partial_rotary_factor": 0.5, "pad_token_id": 0, "head_dim": 16}, "float32", None),
    "mistral_head_dim": ("mistral", {"head_dim": 16, "sliding_window": 7}, "float16", None),
}
# Options of each family, of which the slow test takes every combination.
OPTIONS = {
    "llama": [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 16}, YARN],
    "mistral": [{"sliding_window": None}, {"head_dim": 16}, hf_models.LLAMA3],
    "qwen2": [SLIDING, {"rope_parameters": hf_models.LLAMA3}, {"num_key_value_heads": 4}],
    "qwen3": [{"attention_bias": True}, {"layer_types": ["full_attention", "sliding_attention"] * 2}, YARN],
    "smollm3": [{"attention_bias": True}, {"mlp_bias": True}, {"no_rope_layers": [0, 1, 1]}, SLIDING],
    "olmo2": [{"attention_bias": True}, {"num_key_value_heads": 4}, DYNAMIC],
    "phi3": [LONGROPE, {"sliding_window": 6}, {"num_key_value_heads": 4}],
}


def check(source, scratch, *, cached: bool):
    """Logits of a whole sequence and through the cache, and the way back, against the checkpoint itself."""
    convert(str(source), str(scratch / "model"))
    tokens = hf_models.tokens(shape=(2, 24))
    reference = hf_models.torch_logits(source, tokens)
    bundle = load_model(scratch / "model", dtype="float32")
    assert np.abs(reference).max() > 1  # logits that could differ
    np.testing.assert_allclose(teacher_logits(bundle, tokens), reference, atol=1e-4, rtol=0)
    for position, logits in cached_logits(bundle, tokens) if cached else ():
        np.testing.assert_allclose(logits, reference[:, position], atol=1e-4, rtol=0)
    convert(str(scratch / "model"), str(scratch / "back"), to="hf", max_shard_bytes=30_000)
    assert hf_models.raw_tensors(scratch / "back") == hf_models.raw_tensors(source)
    np.testing.assert_array_equal(hf_models.torch_logits(scratch / "back", tokens), reference)
    assert Checkpoint(scratch / "back").config == Checkpoint(source).config


def cached_logits(bundle, tokens, prompt: int = 13):
    """(position, logits) of a prompt's last token and of a few tokens decoded after it.

    Kinds of rope whose frequencies follow the length are left out: their cached keys keep the rotation that they had.
    """
    if bundle.model.rope_scaling.kind in ("dynamic", "longrope"):
        return
    graphdef, _ = models.abstract(bundle.model)
    with jax.default_matmul_precision("float32"):
        step = jax.jit(lambda params, tokens, cache: models.bind(graphdef, params).prefill(tokens, cache))
        cache = models.bind(graphdef, bundle.params).init_cache(tokens.shape[0], 24)
        logits, cache = step(bundle.params, tokens[:, :prompt], cache)
        yield prompt - 1, logits
        for position in range(prompt, prompt + 3):
            logits, cache = step(bundle.params, tokens[:, position : position + 1], cache)
            yield position, logits


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_family(tmp_path, name):
    family, values, dtype, shard = {**QUICK, **SLOW}[name]
    source = hf_models.make_random(tmp_path / "hf", family, values, dtype, shard)
    check(source, tmp_path, cached=name in ("qwen2_sliding_tied", "smollm3_nope"))  # those whose layers differ


@pytest.mark.slow
@pytest.mark.parametrize("family", OPTIONS)
def test_every_combination_of_options(tmp_path, family):
    options = OPTIONS[family]
    base = {"pad_token_id": None}
    cases = itertools.product((False, True), repeat=len(options))
    for number, chosen in enumerate(cases):
        values = functools.reduce(lambda a, b: {**a, **b}, itertools.compress(options, chosen), base)
        if "rope_type" in values:
            values = {
                "rope_parameters": hf_models.LLAMA3,
                **{k: v for k, v in values.items() if k not in hf_models.LLAMA3},
            }
        if "layer_types" in values:
            values |= {"layer_types": values["layer_types"][:3], "use_sliding_window": True, "sliding_window": 6}
        for tied, dtype, shard in ((False, "float32", None), (True, "bfloat16", "20KB")):
            scratch = tmp_path / f"{number}{dtype}"
            source = hf_models.make_random(
                scratch / "hf", family, {**values, "tie_word_embeddings": tied}, dtype, shard
            )
            check(source, scratch, cached=True)


def test_a_new_family_is_one_file_and_one_name(monkeypatch, tmp_path):
    """A family with options and names of its own, read and written by what is here already."""
    toy = types.ModuleType(f"{families.__name__}.toy")
    toy.FAMILY = families.Family(
        architecture="ToyForCausalLM",
        defaults={"num_key_value_heads": 2, "rms_norm_eps": 1e-3, "max_position_embeddings": 64},
        read=lambda fields: {"qk_norm": "head" if fields.get("normed") else "none"},
        write=lambda config: {"normed": config.qk_norm == "head"},
        renamed={"attention/o_proj": "mixer.out"},
    )
    monkeypatch.setitem(sys.modules, toy.__name__, toy)
    monkeypatch.setattr(choices, "Family", Literal[*FAMILIES, "toy"])
    monkeypatch.setitem(ModelConfig.__annotations__, "family", choices.Family)
    config = model_config_from_hf({**LLAMA, "model_type": "toy", "architectures": ["ToyForCausalLM"], "normed": True})
    assert (config.family, config.num_kv_heads, config.rms_norm_eps, config.qk_norm) == ("toy", 2, 1e-3, "head")
    rng = np.random.default_rng(0)
    params = unflatten({path: rng.normal(size=n).astype(np.float32) for path, n in base_shapes(config).items()})
    write_hf(tmp_path / "hf", model=config, params=params)
    assert "model.layers.7.mixer.out.weight" in hf_models.raw_tensors(tmp_path / "hf")
    again, read = read_hf(tmp_path / "hf")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_every_family_is_tried():
    files = {file.stem for file in Path(families.__file__).parent.glob("*.py")}
    assert files == {*FAMILIES, "family", "__init__"}
    assert {family for family, *_ in (*QUICK.values(), *hf_models.CASES.values())} == set(FAMILIES)
    assert set(OPTIONS) == set(FAMILIES) == set(hf_models.PREFIX)
    assert list(families.table()) == list(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("qwen3_head_dim", marks=pytest.mark.slow), "olmo2"])
def test_mixers_get_q_and_k_after_their_norms_and_before_the_rotation(tmp_path, name):
    """The first layer's q and k, as transformers' own norm gives them."""
    import torch
    import transformers

    family, values, *_ = QUICK[name]
    source = hf_models.make_random(tmp_path / "hf", family, values)
    tokens = hf_models.tokens()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found = {}
    for part in ("q_norm", "k_norm"):
        module = getattr(theirs.model.layers[0].self_attn, part)
        module.register_forward_hook(lambda module, inputs, output, part=part: found.update({part: output}))
    with torch.no_grad():
        theirs(torch.from_numpy(tokens.astype(np.int64)))

    bundle = load_model(source, dtype="float32")
    attention = AttentionConfig(gate_rank=4)
    params = models.init_params(bundle.model, attention, seed=0, base=bundle.params)
    graphdef, _ = models.abstract(bundle.model, attention)
    seen = {}

    def layer_loss(index, teacher, student, mask):
        return ((teacher - student) ** 2).mean()

    decoder = models.bind(graphdef, params)
    original = type(decoder.mixers).__call__

    def recording(self, x, q, k, v, *rest):
        if not seen:
            jax.debug.callback(lambda q, k: seen.setdefault("qk", (np.asarray(q), np.asarray(k))), q, k, ordered=True)
        return original(self, x, q, k, v, *rest)

    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("float32"):
        patch.setattr(type(decoder.mixers), "__call__", recording)
        jax.block_until_ready(teacher_forced(decoder, tokens, layer_loss=layer_loss))
        jax.effects_barrier()
    for ours, part in zip(seen["qk"], ("q_norm", "k_norm"), strict=True):
        np.testing.assert_allclose(ours.reshape(-1), found[part].numpy().reshape(-1), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_both_stages_run_on_every_family(tmp_path, name):
    """Gradients of both stages are finite, and reach every mixer and adapter."""
    family, values, *_ = QUICK[name]
    bundle = load_model(hf_models.make_random(tmp_path / "hf", family, values), dtype="float32")
    attention, lora = AttentionConfig(gate_rank=4), LoraConfig(rank=2)
    graphdef, _ = models.abstract(bundle.model, attention, lora)
    params = models.init_params(bundle.model, attention, lora, seed=0, base=bundle.params)
    tokens = hf_models.tokens()

    def stage1(trained):
        decoder = models.bind(graphdef, {**params, "mixers": trained})
        losses = teacher_forced(decoder, tokens, layer_loss=lambda i, y, o, mask: ((y - o) ** 2).mean())
        return losses.sum()

    def stage2(trained):
        logits = models.bind(graphdef, {**params, "lora": trained})(tokens)
        return -jax.nn.log_softmax(logits[:, :-1])[..., 0].mean()

    for loss, part in ((stage1, "mixers"), (stage2, "lora")):
        value, gradients = jax.jit(jax.value_and_grad(loss))(params[part])
        assert np.isfinite(value)
        for path, gradient in flatten(gradients):
            assert np.isfinite(gradient).all(), path
            if not path.endswith("/a"):  # b starts at nothing, so that a gets no gradient yet
                assert (np.abs(gradient).reshape(gradient.shape[0], -1).max(axis=1) > 0).all(), path


def test_fused_tensors_are_cut_and_joined(tmp_path):
    """Independent of the model: rows of Phi-3's fused matrices by hand, read whole and in shards."""
    from safetensors.numpy import load_file

    family, values, dtype, _ = QUICK["phi3_longrope"]
    source = hf_models.make_random(tmp_path / "hf", family, values, dtype)
    raw = load_file(source / "model.safetensors")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "x"))
    for shardings in (None, lambda path: split if path.endswith("_proj/kernel") else None):
        _, params = read_hf(source, shardings=shardings)
        layer = params["layers"]
        fused = raw["model.layers.1.self_attn.qkv_proj.weight"]
        for name, rows in {"q_proj": slice(0, 32), "k_proj": slice(32, 48), "v_proj": slice(48, 64)}.items():
            np.testing.assert_array_equal(layer["attention"][name]["kernel"][1], fused[rows].T)
        fused = raw["model.layers.2.mlp.gate_up_proj.weight"]
        for name, rows in {"gate_proj": slice(0, 48), "up_proj": slice(48, 96)}.items():
            np.testing.assert_array_equal(layer["mlp"][name]["kernel"][2], fused[rows].T)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 12,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}


def test_layers_of_different_kind_are_data():
    def read(family, **values):
        config = model_config_from_hf({**LLAMA, "model_type": family, "num_key_value_heads": 2, **values})
        assert model_config_from_hf(model_config_to_hf(config, "float32")) == config
        return config

    plain = read("qwen2", sliding_window=4096, max_window_layers=4)
    assert (plain.sliding_window, plain.full_attention_layers) == (None, ())
    sliding = read("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=6)
    assert [sliding.window(layer) for layer in range(8)] == [None] * 6 + [9, 9]
    assert read("qwen3", use_sliding_window=True, sliding_window=9, max_window_layers=8).sliding_window is None
    assert read("smollm3").nope_layers == (3, 7)
    assert read("smollm3", no_rope_layers=[1, 1, 0, 1, 0, 1, 1, 1]).nope_layers == (2, 4)
    assert read("smollm3").rope_theta == 2e6
    assert read("phi3", partial_rotary_factor=0.5).rotary_dim == 4


REFUSED = {
    "layer types": (
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 8},
        "layer_types: 'chunked_attention' is not supported; supported: full_attention",
    ),
    "too few layer types": (
        {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]},
        "layer_types should be a list of 8 entries",
    ),
    "no_rope_layers": ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers should be a list of 8"),
    "max_window_layers": ({"model_type": "qwen2", "max_window_layers": "all"}, "max_window_layers: 'all' is not a int"),
    "mlp_bias": ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias true is not supported.*Qwen3ForCausalLM"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    "odd partial": ({"model_type": "phi3", "partial_rotary_factor": 0.4}, "partial_rotary_factor: 0.4 of head_dim 8"),
    "factors": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "short_factor: should be 4 positive numbers",
    ),
    "negative factor": ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor: -2 must be positive"),
    "bands": (
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        "high_freq_factor: 4 must be above low_freq_factor 4",
    ),
    "theta": ({"rope_theta": 0}, "rope_theta: 0 must be above 1"),
    "factor": ({"rope_scaling": {"type": "dynamic", "factor": "big"}}, "factor of the rope scaling should be a number"),
    "gemma": ({"model_type": "gemma3_text"}, "'gemma3_text' is not supported; supported: Llama.*Phi3ForCausalLM"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    values, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        model_config_from_hf({**LLAMA, **values}, "there/config.json")
    assert str(caught.value).startswith("there/config.json: ")
    assert "\n" not in str(caught.value)


def test_adapters_of_fused_projections_are_refused(tmp_path):
    config = model_config_from_hf({**LLAMA, "model_type": "phi3"})
    with pytest.raises(UserError, match=r"attention/q_proj.* in one matrix.* merge"):
        write_adapter(tmp_path / "a", model=config, attention=None, lora=LoraConfig(), params={})


def test_generation_config_wins_and_is_written_back(tmp_path):
    source = hf_models.make(tmp_path / "hf", eos_token_id=2, bos_token_id=1)
    generation = source / "generation_config.json"
    values = json.loads(generation.read_text()) | {"eos_token_id": [7, 9], "pad_token_id": 3, "temperature": 0.5}
    generation.write_text(json.dumps(values))
    config = Checkpoint(source).config
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (7, 9), 3)

    (source / "tokenizer.json").write_text("{}")
    convert(str(source), str(tmp_path / "model"))
    assert load_model(tmp_path / "model").model.eos_token_ids == (7, 9)
    convert(str(tmp_path / "model"), str(tmp_path / "back"), to="hf")
    for file in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "back" / file).read_text())
        assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, [7, 9], 3)
    assert written["temperature"] == 0.5

    # A model directory, too, goes by the generation_config.json in it.
    own = tmp_path / "model" / "tokenizer" / "generation_config.json"
    own.write_text(json.dumps(values | {"eos_token_id": 5}))
    assert load_model(tmp_path / "model").model.eos_token_ids == (5,)
    for wrong in ("<end>", [4, "<end>"], -1, True):
        generation.write_text(json.dumps(values | {"eos_token_id": wrong}))
        with pytest.raises(UserError, match=r"generation_config.json: eos_token_id .* should be a token id; correct"):
            Checkpoint(source)


def test_model_directories_from_before_a_field_existed(tmp_path):
    """model.json without the fields that only newer families need."""
    source = hf_models.make(tmp_path / "hf", "llama3_tied_sharded")
    convert(str(source), str(tmp_path / "model"))
    before = load_model(tmp_path / "model", dtype="keep")
    file = tmp_path / "model" / "model.json"
    values = json.loads(file.read_text())
    architecture = ["full_attention_layers", "nope_layers", "partial_rotary_factor"]
    for name in (*architecture, "projection_biases", "qk_norm", "norm_position"):
        del values["model"][name]
    for name in ("attention_factor", "beta_fast", "beta_slow", "truncate", "short_factor", "long_factor"):
        del values["model"]["rope_scaling"][name]
    file.write_text(json.dumps(values))
    after = load_model(tmp_path / "model", dtype="keep")
    assert after.model == before.model == Checkpoint(source).config
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_export_mends_a_tokenizer_folder_of_another_model(tmp_path):
    """The ids that are written beside the weights are the model's, in both files."""
    source = hf_models.make(tmp_path / "hf")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 11, "top_k": 4}))
    config, params = read_hf(source)
    write_hf(
        tmp_path / "out",
        model=dataclasses.replace(config, eos_token_ids=(8,)),
        params=params,
        tokenizer_source=source,
    )
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["top_k"]) == (8, 4)
    assert Checkpoint(tmp_path / "out").config.eos_token_ids == (8,)


def test_tied_checkpoints_stored_in_either_name_and_dtype(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    source = hf_models.make(tmp_path / "hf", tie_word_embeddings=True)
    file = source / "model.safetensors"
    weights = load_file(file)
    table = weights["model.embed_tokens.weight"]
    expected = table.numpy()

    def read(**changes):
        save_file({k: v for k, v in {**weights, **changes}.items() if v is not None}, file, metadata={"format": "pt"})
        return read_hf(source)[1]["embed"]["embedding"]

    only_head = read(**{"model.embed_tokens.weight": None, "lm_head.weight": table.clone()})
    np.testing.assert_array_equal(only_head, expected)
    np.testing.assert_array_equal(read(**{"lm_head.weight": table.to(torch.bfloat16)}), expected)
    half = table.to(torch.bfloat16)
    wider = read(**{"model.embed_tokens.weight": half, "lm_head.weight": half.float()})
    np.testing.assert_array_equal(wider.astype(np.float32), half.float().numpy())
    with pytest.raises(UserError, match=r"lm_head.weight differs"):
        read(**{"model.embed_tokens.weight": half, "lm_head.weight": table.clone()})


def test_shapes_agree_with_the_model(tmp_path):
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 1), sharding.AXES)
    for name in ("llama_biases_yarn", "qwen3_head_dim", "olmo2", "phi3_longrope"):
        family, values, *_ = QUICK[name]
        config = Checkpoint(hf_models.make_random(tmp_path / name, family, values)).config
        abstract = dict(flatten(models.abstract(config)[1]))
        assert {path: leaf.shape for path, leaf in abstract.items()} == base_shapes(config)
        for path, shape in base_shapes(config).items():
            spec = sharding.spec_for(path, shape, mesh)
            if path.endswith(("kernel", "embedding")):
                assert {axis for axis in spec if axis} == {"fsdp", "tensor"}, path
            elif path.endswith("bias"):
                assert spec == P(None, "fsdp" if "o_proj" in path or "down_proj" in path else "tensor"), path

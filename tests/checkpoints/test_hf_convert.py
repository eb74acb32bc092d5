"""Logits, round trips, exports and adapters against ``transformers``, ``safetensors`` and ``peft``."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lawcat_jax import models
from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.checkpoints.hf.mapping import base_shapes, flatten, linearised_layers
from lawcat_jax.checkpoints.hf.peft import lora_shapes, read_adapter, write_adapter
from lawcat_jax.checkpoints.hf.read import Checkpoint, read_hf
from lawcat_jax.checkpoints.hf.write import write_hf
from lawcat_jax.checkpoints.logits import teacher_logits
from lawcat_jax.checkpoints.model_dir import DTYPES, expected_shapes, load_model, save_model
from lawcat_jax.config import AttentionConfig, LoraConfig
from tests.checkpoints import hf_models

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {name: hf_models.make(root / name, name) for name in hf_models.CASES}


@pytest.fixture(scope="module")
def student(sources):
    """A hybrid student (layer 1 keeps softmax) with adapters that change the logits."""
    bundle = load_model(sources["llama3_tied_sharded"], dtype="float32")
    attention, lora = AttentionConfig(softmax_layers=(1,), gate_rank=4), LoraConfig(rank=2, alpha=6.0)
    params = models.init_params(bundle.model, attention, lora, seed=1, base=bundle.params)
    rng = np.random.default_rng(0)
    params["lora"] = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), params["lora"])
    return dataclasses.replace(bundle, attention=attention, lora=lora, params=params)


@pytest.mark.parametrize("name", hf_models.CASES)
def test_logits_and_bit_exact_round_trip(sources, tmp_path, name):
    convert(str(sources[name]), str(tmp_path / "model"))
    tokens = hf_models.tokens()
    reference = hf_models.torch_logits(sources[name], tokens)
    ours = teacher_logits(load_model(tmp_path / "model", dtype="float32"), tokens)
    np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=0)
    assert np.abs(reference).max() > 1  # logits that could differ

    convert(str(tmp_path / "model"), str(tmp_path / "back"), to="hf", max_shard_bytes=30_000)
    assert hf_models.raw_tensors(tmp_path / "back") == hf_models.raw_tensors(sources[name])
    np.testing.assert_array_equal(hf_models.torch_logits(tmp_path / "back", tokens), reference)
    assert Checkpoint(tmp_path / "back").config == Checkpoint(sources[name]).config
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1


def test_exact_tensors_land_in_the_right_place(sources):
    """Independent of the model: one tensor of each kind, transposed by hand."""
    from safetensors.numpy import load_file

    _, params = read_hf(sources["llama_grouped"])
    raw = load_file(sources["llama_grouped"] / "model.safetensors")
    for layer in range(3):
        block = f"model.layers.{layer}."
        np.testing.assert_array_equal(
            params["layers"]["attention"]["k_proj"]["kernel"][layer], raw[block + "self_attn.k_proj.weight"].T
        )
        np.testing.assert_array_equal(
            params["layers"]["mlp"]["down_proj"]["kernel"][layer], raw[block + "mlp.down_proj.weight"].T
        )
        np.testing.assert_array_equal(
            params["layers"]["post_attention_norm"]["scale"][layer], raw[block + "post_attention_layernorm.weight"]
        )
    np.testing.assert_array_equal(params["lm_head"]["kernel"], raw["lm_head.weight"].T)


def test_shapes_agree_with_the_model(student):
    teacher = dict(flatten(models.abstract(student.model)[1]))
    assert {path: leaf.shape for path, leaf in teacher.items()} == base_shapes(student.model)
    whole = expected_shapes(student.model, student.attention, student.lora)
    adapters = {path: shape for path, shape in whole.items() if path.startswith("lora/")}
    assert adapters == lora_shapes(student.model, student.attention, student.lora)
    assert linearised_layers(student.model, student.attention) == (0, 2)


@pytest.mark.parametrize("name", ["llama3_tied_sharded", "mistral_window_sharded"])
def test_sharded_reading_equals_plain(sources, tmp_path, name):
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    read = []

    def shardings(path):
        if path == "final_norm/scale":
            return None
        rank = len(shapes[path])
        spec = (
            (None,) * (rank - 2) + ("x", "y")
            if path.endswith("kernel")
            else ("x",)
            if rank == 2 and "embed" in path
            else ()
        )
        return NamedSharding(mesh, PartitionSpec(*spec))

    checkpoint = Checkpoint(sources[name])
    shapes = base_shapes(checkpoint.config)
    plain = dict(flatten(checkpoint.params(dtype=np.dtype(np.float32))))
    spread = dict(flatten(checkpoint.params(dtype=np.dtype(np.float32), shardings=shardings, progress=read.append)))
    save_model(tmp_path / "m", model=checkpoint.config, params=spread)
    again = dict(flatten(load_model(tmp_path / "m", dtype="keep", shardings=shardings).params))
    for path, array in plain.items():
        np.testing.assert_array_equal(np.asarray(spread[path]), array)
        np.testing.assert_array_equal(np.asarray(again[path]), array)
        if (sharding := shardings(path)) is not None:
            assert spread[path].sharding == sharding
            assert again[path].sharding == sharding


def test_dtype_is_cast_while_reading(sources, tmp_path):
    convert(str(sources["llama_grouped"]), str(tmp_path / "m"), dtype="bfloat16")
    exact = dict(flatten(read_hf(sources["llama_grouped"])[1]))
    for dtype, direct in (("keep", "bfloat16"), ("float32", "float32")):
        for path, leaf in flatten(load_model(tmp_path / "m", dtype=dtype).params):
            assert str(leaf.dtype) == direct
            rounded = exact[path].astype(DTYPES["bfloat16"])
            np.testing.assert_array_equal(leaf.astype(np.float32), rounded.astype(np.float32))


def test_student_round_trip_merged_export_and_adapter(sources, student, tmp_path):
    tokenizer = tmp_path / "tok"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    save_model(
        tmp_path / "student",
        model=student.model,
        attention=student.attention,
        lora=student.lora,
        params=student.params,
        tokenizer_source=tokenizer,
        extra={"stage": "stage2", "source": "org/base"},
    )
    loaded = load_model(tmp_path / "student", dtype="bfloat16")
    assert (loaded.model, loaded.attention, loaded.lora) == (student.model, student.attention, student.lora)
    assert loaded.extra == {"stage": "stage2", "source": "org/base"}
    before, after = dict(flatten(student.params)), dict(flatten(loaded.params))
    assert before.keys() == after.keys()
    for path in before:
        trained = path.startswith(("mixers/", "lora/"))
        assert str(after[path].dtype) == ("float32" if trained else "bfloat16"), path
        if trained:
            np.testing.assert_array_equal(after[path], np.asarray(before[path]))

    tokens = hf_models.tokens(3)
    convert(str(tmp_path / "student"), str(tmp_path / "merged"), to="hf-base")
    convert(str(tmp_path / "student"), str(tmp_path / "adapter"), to="peft")
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"
    base = sources["llama3_tied_sharded"]
    with_adapter = hf_models.torch_logits(base, tokens, adapter=tmp_path / "adapter")
    merged = hf_models.torch_logits(tmp_path / "merged", tokens)
    plain = hf_models.torch_logits(base, tokens)
    np.testing.assert_allclose(with_adapter, merged, atol=2e-4)
    assert np.abs(merged - plain).max() > 0.1
    here = dataclasses.replace(
        student,
        attention=None,
        lora=None,
        params={
            k: v
            for k, v in models.merge_lora(student.params, student.lora, student.attention).items()
            if k in base_keys(student)
        },
    )
    np.testing.assert_allclose(teacher_logits(here, tokens), merged, atol=2e-4)

    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["layers_to_transform"] == [0, 2]
    assert values["base_model_name_or_path"] == "org/base"
    lora, params = read_adapter(tmp_path / "adapter", model=student.model, attention=student.attention)
    assert lora == student.lora
    jax.tree.map(np.testing.assert_array_equal, params["lora"], student.params["lora"])


def base_keys(student):
    return {path.split("/")[0] for path in base_shapes(student.model)}


def test_adapter_written_by_peft_is_read(sources, tmp_path):
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(sources["llama_grouped"], dtype=torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "a")
    tokens = hf_models.tokens(4)
    with torch.no_grad():
        reference = adapted(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    model_config, params = read_hf(sources["llama_grouped"])
    lora, adapter = read_adapter(tmp_path / "a", model=model_config, attention=None)
    assert lora == LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "o_proj"))
    write_hf(tmp_path / "merged", model=model_config, params={**params, **adapter}, lora=lora)
    np.testing.assert_allclose(hf_models.torch_logits(tmp_path / "merged", tokens), reference, atol=2e-4)
    write_adapter(tmp_path / "b", model=model_config, attention=None, lora=lora, params=adapter, base_model=None)
    assert hf_models.raw_tensors(tmp_path / "a") == hf_models.raw_tensors(tmp_path / "b")


def test_tied_checkpoint_may_carry_head_and_buffers(sources, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    directory = hf_models.make(tmp_path / "hf", "llama_grouped", tie_word_embeddings=True)
    file = directory / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, file, metadata={"format": "pt"})
    assert "lm_head" not in read_hf(directory)[1]
    weights["lm_head.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight differs .* set tie_word_embeddings to false"):
        read_hf(directory)


def test_verify_prints_the_differences(sources, tmp_path, capsys):
    convert(str(sources["mistral_window_sharded"]), str(tmp_path / "m"), verify=True)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("verify: 128 random tokens, max abs difference of logits")
    assert float(line.split("logits ")[1].split()[0]) < 1e-4
    assert abs(float(line.split("here) ")[1].split()[0])) < 1e-6

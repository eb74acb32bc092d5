"""Adapters as PEFT writes them, merged into their base model: the same weights as PEFT's own merge."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.checkpoints.hf.adapter_config import AdapterConfig
from lawcat_jax.checkpoints.hf.mapping import flatten
from lawcat_jax.checkpoints.hf.peft import read_adapter
from lawcat_jax.checkpoints.hf.read import read_hf
from lawcat_jax.checkpoints.model_dir import load_model
from lawcat_jax.errors import UserError
from tests.checkpoints import hf_models

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS = {
    "suffixes": {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
    "full_names": {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
    "partial_names": {"target_modules": ["self_attn.v_proj", "1.mlp.down_proj"]},
    "regex": {"target_modules": r".*layers\.[02]\.(self_attn|mlp)\.(q|up)_proj"},
    "all_linear": {"target_modules": "all-linear", "modules_to_save": []},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "r": 3},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 4, r"layers\.1\.self_attn\.q_proj": 1},
        "alpha_pattern": {r"layers\.[12]\..*up_proj": 32, "q_proj": 5},
        "use_rslora": True,
    },
    "some_layers": {"target_modules": ["v_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "one_layer": {"target_modules": ["v_proj"], "layers_to_transform": 1},
    "excluded": {"target_modules": ATTENTION, "exclude_modules": ["k_proj", "model.layers.0.self_attn.o_proj"]},
    "excluded_regex": {"target_modules": ATTENTION, "exclude_modules": r".*layers\.0\..*"},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "bfloat16": {"target_modules": ["q_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return hf_models.make(tmp_path_factory.mktemp("hf") / "llama")


def adapt(source, target, dtype="float32", **values):
    """Write a random adapter with PEFT; returns PEFT's merged model."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 8, **values}))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(target)
    return adapted.merge_and_unload()


QUICK = {"suffixes", "regex", "patterns", "some_layers", "excluded"}
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ADAPTERS]


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_equal_pefts(source, tmp_path, name):
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    merged = adapt(source, tmp_path / "a", dtype, **ADAPTERS[name])
    convert(str(source), str(tmp_path / "m"), adapter=str(tmp_path / "a"), dtype=dtype)
    merged.save_pretrained(tmp_path / "reference")
    expected, base = dict(flatten(read_hf(tmp_path / "reference")[1])), dict(flatten(read_hf(source)[1]))
    found = dict(flatten(load_model(tmp_path / "m", dtype="keep").params))
    assert found.keys() == expected.keys()
    changed = 0
    for path, leaf in found.items():
        tolerance = 2e-2 if dtype == "bfloat16" else 1e-5  # PEFT sums bfloat16 weights in bfloat16
        np.testing.assert_allclose(leaf.astype(np.float32), expected[path].astype(np.float32), atol=tolerance)
        changed += not np.allclose(leaf.astype(np.float32), base[path].astype(np.float32), atol=2e-2)
    assert changed


def test_a_directory_of_an_adapter_is_a_source(source, tmp_path, capsys):
    adapt(source, tmp_path / "a", target_modules=["q_proj"])
    convert(str(tmp_path / "a"), str(tmp_path / "named"))
    shutil.move(source, tmp_path / "elsewhere")
    try:
        with pytest.raises(UserError, match="no such directory"):
            convert(str(tmp_path / "a"), str(tmp_path / "m"))
        assert "was trained on" not in capsys.readouterr().err
        convert(str(tmp_path / "a"), str(tmp_path / "given"), base=str(tmp_path / "elsewhere"), to="hf")
        said = f"{tmp_path / 'a'} was trained on {source}, and is merged into {tmp_path / 'elsewhere'}\n"
        assert capsys.readouterr().err.endswith(said)
    finally:
        shutil.move(tmp_path / "elsewhere", source)
    one, two = (load_model(tmp_path / name, dtype="keep") for name in ("named", "given"))
    assert one.extra == {"source": str(source), "adapter": str(tmp_path / "a")}
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.NamedSharding(mesh, jax.P())
    for options in ({}, {"base": str(source)}, {"shardings": lambda path: spread}):  # as generate and evaluate read it
        read = load_model(tmp_path / "a", dtype="keep", **options)
        assert read.extra == one.extra
        jax.tree.map(np.testing.assert_array_equal, read.params, one.params)
    for arguments, message in (
        ({"base": str(source), "source": str(source)}, "--base goes with an adapter"),
        ({"adapter": str(source), "source": str(source)}, "no directory of a PEFT adapter"),
        ({"adapter": str(tmp_path / "a"), "source": str(source), "to": "peft"}, "--to=peft does not go with"),
        ({"adapter": str(tmp_path / "a"), "source": str(tmp_path / "a")}, "is an adapter itself"),
    ):
        with pytest.raises(UserError, match=message):
            convert(target=str(tmp_path / "n"), **arguments)
    assert not (tmp_path / "n").exists()


def test_a_students_adapter_from_other_spellings(source, tmp_path):
    """rsLoRA is another alpha; several ranks are refused, by name."""
    model, _ = read_hf(source)
    adapt(source, tmp_path / "a", target_modules=r".*self_attn\.(q|v)_proj", use_rslora=True, r=4)
    lora, _ = read_adapter(tmp_path / "a", model=model, attention=None)
    assert (lora.rank, lora.alpha, lora.targets) == (4, 16.0, ("q_proj", "v_proj"))
    adapt(source, tmp_path / "b", target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 1})
    with pytest.raises(UserError, match="rank_pattern or alpha_pattern"):
        read_adapter(tmp_path / "b", model=model, attention=None)


def test_an_adapter_with_another_head_than_the_bases_is_refused(source, tmp_path):
    other = hf_models.make(tmp_path / "other", tie_word_embeddings=False, initializer_range=0.2)
    adapt(other, tmp_path / "a", target_modules=["lm_head"])
    with pytest.raises(UserError, match=r"lm_head\.base_layer\.weight differs from the base model's"):
        convert(str(source), str(tmp_path / "m"), adapter=str(tmp_path / "a"))


PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga'"),
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ({"a_field_of_the_future": 1}, "a_field_of_the_future 1"),
        ({"r": 0}, "r 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"target_modules": [3]}, "target_modules"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
        ({"use_rslora": "yes"}, "use_rslora"),
    ],
)
def test_fields_that_would_change_the_result_are_refused_by_name(change, message):
    AdapterConfig(PLAIN, "here")
    with pytest.raises(UserError, match=message) as caught:
        AdapterConfig(PLAIN | change, "here")
    assert "\n" not in str(caught.value)


def test_every_field_of_peft_is_known():
    """The defaults of the installed PEFT pass, so that a new field with a meaning of its own shows here."""
    import peft

    values = json.loads(json.dumps(peft.LoraConfig(r=2, target_modules=["q_proj"]).to_dict(), default=list))
    AdapterConfig(values | {"peft_type": "LORA"}, "here")

"""Bad input gives one clear line and leaves no output; formats of configuration are understood."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lawcat_jax.checkpoints import model_json
from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.checkpoints.hf.config_map import model_config_from_hf, model_config_to_hf
from lawcat_jax.checkpoints.hf.mapping import base_shapes, flatten, hf_slots, unflatten
from lawcat_jax.checkpoints.hf.peft import read_adapter, write_adapter
from lawcat_jax.checkpoints.hf.read import INDEX, read_hf, resolve_source
from lawcat_jax.checkpoints.hf.tensors import DTYPES, open_tensors, write_tensors
from lawcat_jax.checkpoints.hf.write import write_hf
from lawcat_jax.checkpoints.model_dir import load_model, save_model
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig, RopeScaling
from lawcat_jax.errors import UserError
from lawcat_jax.files import new_directory
from lawcat_jax.runtime import network

ROOT = Path(__file__).parents[2]
TINY = ModelConfig(
    vocab_size=16, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=12, eos_token_ids=(2,)
)
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
Q0 = "model.layers.0.self_attn.q_proj.weight"


def params(config=TINY, dtype=np.float32):
    rng = np.random.default_rng(0)
    return unflatten({path: rng.normal(size=shape).astype(dtype) for path, shape in base_shapes(config).items()})


@pytest.fixture
def source(tmp_path):
    write_hf(tmp_path / "hf", model=TINY, params=params())
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path):
    write_hf(tmp_path / "hf", model=TINY, params=params(), max_shard_bytes=1000)
    return tmp_path / "hf"


def edit(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def rewrite(directory, drop=(), reshape=None, add=None, code="F32"):
    """Write the tensors again with some missing, reshaped or added."""
    shapes = {name: slot.hf_shape for name, slot in hf_slots(TINY).items() if name not in drop}
    shapes |= (reshape or {}) | (add or {})
    kind = DTYPES[code]
    entries = [(name, kind, shape, lambda shape=shape: np.zeros(shape, kind)) for name, shape in shapes.items()]
    write_tensors(directory / "model.safetensors", entries)


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def garbage_header(directory):
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"\xff\xfe{["
    file.write_bytes(data)


def only_pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def wrong_size(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[16,8]', b'"shape":[16,9]', 1))


def integer_weights(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"', 1))


DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), "neither model.json nor config.json"),
    "bad JSON": (lambda d: (d / "config.json").write_text("{"), r"config.json is not valid JSON"),
    "JSON list": (lambda d: (d / "config.json").write_text("[]"), r"should hold a JSON object"),
    "architecture": (
        lambda d: edit(d / "config.json", architectures=["QwenForCausalLM"], model_type="qwen2"),
        "QwenForCausalLM.* not supported; supported: LlamaForCausalLM, MistralForCausalLM",
    ),
    "head": (
        lambda d: edit(d / "config.json", architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification.* not supported",
    ),
    "biases": (
        lambda d: edit(d / "config.json", **MISTRAL, attention_bias=True, mlp_bias=True),
        "attention_bias true.*MistralForCausalLM.*mlp_bias true",
    ),
    "no biases": (
        lambda d: edit(d / "config.json", attention_bias=True),
        r"8 missing: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "missing fields": (
        lambda d: edit(d / "config.json", vocab_size=..., hidden_size=...),
        "vocab_size is missing; hidden_size is missing",
    ),
    "wrong type": (lambda d: edit(d / "config.json", vocab_size="many"), "vocab_size: 'many' is not a int"),
    "heads": (lambda d: edit(d / "config.json", num_key_value_heads=3), "does not divide"),
    "rope": (
        lambda d: edit(d / "config.json", rope_scaling={"rope_type": "spiral", "factor": 2}),
        "rope type 'spiral'.*llama3",
    ),
    "rope fields": (lambda d: edit(d / "config.json", rope_scaling={"type": "linear"}), "needs factor"),
    "activation": (lambda d: edit(d / "config.json", hidden_act="gelu"), "hidden_act 'gelu'.*silu"),
    "bidirectional": (lambda d: edit(d / "config.json", is_causal=False), "is_causal false is not supported"),
    "quantized": (lambda d: edit(d / "config.json", quantization_config={"bits": 4}), "quantized"),
    "tensors": (
        lambda d: rewrite(d, drop=["model.norm.weight"], reshape={Q0: (8, 9)}, add={"extra.weight": (2,)}),
        r"1 missing: model.norm.weight; 1 unexpected: extra.weight; "
        r"1 wrongly shaped: model.layers.0.self_attn.q_proj.weight is \[8, 9\], should be \[8, 8\]",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors and no model.safetensors.index"),
    "pickle": (only_pickle, "only pickle files .pytorch_model.bin"),
    "truncated": (lambda d: truncate(d / "model.safetensors", 0.7), "truncated.*download it again"),
    "truncated header": (lambda d: truncate(d / "model.safetensors", 0.05), "truncated within the header"),
    "empty": (lambda d: truncate(d / "model.safetensors", 0), "not a safetensors file"),
    "header": (garbage_header, "not a safetensors file .bad header"),
    "size": (wrong_size, "does not fill its"),
    "dtype": (integer_weights, "unsupported dtype: .* is I32, supported: F32, F16, BF16"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_checkpoint(source, tmp_path, name):
    damage, message = DAMAGE[name]
    damage(source)
    one_line(tmp_path, message, lambda: convert(str(source), str(tmp_path / "out")))


def one_line(tmp_path, message, call):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def redirect(directory, to):
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = to
    (directory / INDEX).write_text(json.dumps(index))


SHARDS = {
    "missing": (lambda d: (d / "model-00002-of-00006.safetensors").unlink(), "cannot read .*model-00002-of-"),
    "traversal": (lambda d: redirect(d, "../../secret.safetensors"), "'../../secret.safetensors' is not the name"),
    "absolute": (lambda d: redirect(d, "/etc/x.safetensors"), "is not the name of a .safetensors file in the same"),
    "pickle": (lambda d: redirect(d, "model.bin"), "is not the name of a .safetensors file"),
    "elsewhere": (lambda d: redirect(d, "model-00001-of-00006.safetensors"), "is not in model-00001"),
    "index": (lambda d: (d / INDEX).write_text("{]"), "not valid JSON"),
    "map": (lambda d: (d / INDEX).write_text("{}"), "weight_map is missing"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_bad_shards(sharded, tmp_path, name):
    assert len(list(sharded.glob("model-*.safetensors"))) == 6
    damage, message = SHARDS[name]
    damage(sharded)
    one_line(tmp_path, message, lambda: convert(str(sharded), str(tmp_path / "out")))


def test_command_line_errors(source, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "lawcat_jax.convert", *arguments],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    target = tmp_path / "out"
    convert(str(source), str(tmp_path / "hf" / "model"))
    for file in (tmp_path / "hf" / "model" / "params").rglob("d/*"):
        truncate(file, 0.3)
    truncate(source / "model.safetensors", 0.5)
    for arguments, message in (
        ([f"--source={source}", f"--target={target}"], "truncated"),
        ([f"--source={source}/model", f"--target={target}"], "damaged or incomplete"),
        (["--source=nobody/nothing-here", f"--target={target}"], "no directory of that name here, and the"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_targets_are_protected(source, tmp_path):
    target = tmp_path / "out"
    convert(str(source), str(target))
    kept = (target / "model.json").read_bytes()
    one_line(tmp_path, "exists and is not empty; pass --overwrite", lambda: convert(str(source), str(target)))
    convert(str(source), str(target), dtype="bfloat16", overwrite=True)
    assert (target / "model.json").read_bytes() != kept
    one_line(tmp_path, "same directory", lambda: convert(str(source), str(source), to="hf", overwrite=True))
    (tmp_path / "file").write_text("x")
    one_line(tmp_path, "is a file", lambda: convert(str(source), str(tmp_path / "file")))
    one_line(tmp_path, "is a file; name the checkpoint", lambda: convert(str(tmp_path / "file"), str(tmp_path / "o")))
    one_line(tmp_path, "no LoRA adapters", lambda: convert(str(target), str(tmp_path / "o"), to="peft"))
    one_line(tmp_path, "no such directory", lambda: convert("./nowhere/at/all", str(tmp_path / "o")))


def test_a_failure_keeps_the_old_target(tmp_path):
    target = tmp_path / "t"
    target.mkdir()
    (target / "model.json").write_text("old")

    def fail():
        with new_directory(target, overwrite=True) as directory:
            (directory / "new").write_text("new")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert [p.name for p in tmp_path.rglob("*")] == ["t", "model.json"]


def test_float16_overflow_is_refused(tmp_path):
    big = params()
    big["final_norm"]["scale"][3] = 1e6
    write_hf(tmp_path / "hf", model=TINY, params=big)
    one_line(
        tmp_path,
        "model.norm.weight has values beyond float16",
        lambda: convert(str(tmp_path / "hf"), str(tmp_path / "o"), dtype="float16"),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    target = tmp_path_factory.mktemp("saved") / "m"
    save_model(target, model=TINY, params=params())
    return target


def test_every_damaged_file_of_a_model_directory_is_one_line(saved, tmp_path):
    """Whatever file is gone or cut short: one clear line, or (for files that do not matter) the same parameters."""
    original = dict(flatten(params()))
    outcomes = {}
    for number, file in enumerate(sorted(p.relative_to(saved) for p in saved.rglob("*") if p.is_file())):
        for kind in ("gone", "cut"):
            copy = tmp_path / f"{number}{kind}"
            shutil.copytree(saved, copy)
            if kind == "gone":
                (copy / file).unlink()
            else:
                truncate(copy / file, 0.5)
            outcomes[str(file), kind] = outcome(copy, original)
    assert set(outcomes.values()) <= {"one line", "same"}, outcomes
    for file in ("model.json", "params/_METADATA", "params/manifest.ocdbt"):
        assert {outcomes[file, kind] for kind in ("gone", "cut")} == {"one line"}, outcomes
    data = [result for (file, _), result in outcomes.items() if "/d/" in file]
    assert data.count("one line") >= 2, outcomes  # the file of the weights, gone and cut


def outcome(directory, original):
    try:
        leaves = dict(flatten(load_model(directory, dtype="keep").params))
    except UserError as problem:
        text = str(problem)
        return "one line" if "\n" not in text and str(directory) in text else text
    same = leaves.keys() == original.keys() and all(np.array_equal(leaves[n], original[n]) for n in original)
    return "same" if same else "other values"


def test_model_directory_with_other_parameters(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "m")
    values = json.loads((tmp_path / "m" / "model.json").read_text())
    values["model"] |= {"tie_embeddings": True, "mlp_size": 13}
    (tmp_path / "m" / "model.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"1 unexpected: lm_head/kernel; 3 wrongly shaped: layers/mlp/gate_proj/kernel"):
        load_model(tmp_path / "m")
    for change, message in (
        ({"format_version": 9}, "format version 9"),
        ({"model": {"depth": 3}}, "unknown field.*depth"),
        ({"model": None}, "model should be an object"),
        ({"attention": {"kind": "mamba"}}, "'mamba' is not one of"),
        (
            {"attention": {"kind": "lawcat", "window_size": 64}},
            "lack the factor K.*train it again",
        ),  # of older versions
        (
            {"attention": {"kind": "lolcats", "feature_map": "relu"}},
            "bias per feature, now one per head; train it again",
        ),
    ):
        (tmp_path / "m" / "model.json").write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=message):
            model_json.read(tmp_path / "m")
    broken = params()
    del broken["final_norm"]
    with pytest.raises(UserError, match=r"1 missing: final_norm/scale"):
        save_model(tmp_path / "n", model=TINY, params=broken)
    assert not (tmp_path / "n").exists()


def test_unknown_asset():
    with pytest.raises(UserError, match="no embedded model 'asset:nothing'"):
        load_model("asset:nothing")
    with pytest.raises(UserError, match="no embedded model"):
        load_model("asset:../models")


def test_hub_without_network(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find\nit")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for online, reason in ((True, "cannot find"), (False, "no connection")):
        monkeypatch.setattr(network, "hub_or_offline", lambda online=online: online)
        with pytest.raises(UserError, match=rf"meta-llama/Llama: no directory .* cannot be reached \({reason}"):
            resolve_source("meta-llama/Llama")


def test_adapter_errors(tmp_path):
    attention, lora = AttentionConfig(softmax_layers=(0,)), LoraConfig(rank=2, targets=("q_proj",))
    adapter = {"lora": {"q_proj": {"a": np.ones((1, 8, 2), np.float32), "b": np.ones((1, 2, 8), np.float32)}}}
    here = dict(model=TINY, attention=attention)
    write_adapter(tmp_path / "a", lora=lora, params=adapter, **here)
    assert read_adapter(tmp_path / "a", **here)[0] == lora
    with pytest.raises(UserError, match=r"2 missing: base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A"):
        read_adapter(tmp_path / "a", model=TINY, attention=None)
    with pytest.raises(UserError, match="wrongly shaped: lora/q_proj/a"):
        write_adapter(tmp_path / "b", lora=LoraConfig(rank=3, targets=("q_proj",)), params=adapter, **here)
    for change, message in (
        ({"use_dora": True}, "use_dora True"),
        ({"peft_type": "IA3"}, "'IA3' is not supported"),
        ({"target_modules": ["up_proj"]}, "has up_proj; supported: q_proj"),
        ({"r": 0}, "r 0"),
    ):
        shutil.copytree(tmp_path / "a", tmp_path / "c", dirs_exist_ok=True)
        edit(tmp_path / "c" / "adapter_config.json", **change)
        with pytest.raises(UserError, match=message):
            read_adapter(tmp_path / "c", **here)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        read_adapter(tmp_path / "a", **here)


LLAMA_BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SCALED = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_forms_of_configuration():
    plain = model_config_from_hf(LLAMA_BASE)
    assert (plain.num_kv_heads, plain.head_dim, plain.rope_theta, plain.tie_embeddings) == (2, 4, 10000.0, False)
    assert plain.eos_token_ids == (2,)
    four = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALED}}
    five = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALED}}
    configs = [model_config_from_hf({**LLAMA_BASE, **form}) for form in (four, five)]
    assert configs[0] == configs[1]
    assert configs[0].rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    old = model_config_from_hf({**LLAMA_BASE, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert old.rope_scaling == RopeScaling("linear", 2.0)
    mistral = {**LLAMA_BASE, "architectures": None, "model_type": "mistral", "num_attention_heads": 8, "head_dim": 4}
    assert model_config_from_hf(mistral).sliding_window == 4096
    assert model_config_from_hf({**mistral, "sliding_window": None}).sliding_window is None
    ends = {"eos_token_id": [3, 4], "bos_token_id": None}
    assert model_config_from_hf({**LLAMA_BASE, **ends}).eos_token_ids == (3, 4)
    for config in (*configs, old, plain, model_config_from_hf(mistral), model_config_from_hf({**LLAMA_BASE, **ends})):
        written = model_config_to_hf(config, "bfloat16")
        assert model_config_from_hf(written) == config
        four_only = {k: v for k, v in written.items() if k not in ("rope_parameters", "dtype")}
        five_only = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
        assert model_config_from_hf(four_only) == model_config_from_hf(five_only) == config


def test_layers_of_different_dtype_meet_in_float32(tmp_path):
    write_hf(tmp_path / "hf", model=TINY, params=params())
    slots = hf_slots(TINY)
    kinds = {name: DTYPES["BF16" if ".0." in name else "F16"] for name in slots}
    write_tensors(
        tmp_path / "hf" / "model.safetensors",
        [(n, kinds[n], s.hf_shape, lambda n=n, s=s: np.full(s.hf_shape, 0.5, kinds[n])) for n, s in slots.items()],
    )
    _, read = read_hf(tmp_path / "hf")
    assert read["layers"]["mlp"]["up_proj"]["kernel"].dtype == np.float32
    assert read["final_norm"]["scale"].dtype == np.float16
    assert (read["layers"]["mlp"]["up_proj"]["kernel"] == 0.5).all()


def test_tensors_that_overlap_in_a_file_are_refused(tmp_path):
    array = np.ones((2, 3), np.float32)
    write_tensors(tmp_path / "a.safetensors", [(name, array.dtype, array.shape, lambda: array) for name in ("x", "y")])
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(
        content.replace(b'"data_offsets":[24,48]', b'"data_offsets":[00,24]'.replace(b"00", b" 0"))
    )
    with pytest.raises(UserError, match="tensors 'x' and 'y' overlap in the file; it is damaged"):
        open_tensors(tmp_path / "a.safetensors")


ROPE = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": SCALED,
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ROPE)
def test_what_a_kind_of_rope_needs_is_what_transformers_needs(kind, where):
    """Field by field: what makes transformers fail is refused by name, what it does without is not missed."""
    import transformers

    whole = LLAMA_BASE | {"head_dim": 8, "max_position_embeddings": 64}
    for name in ROPE[kind]:
        rope = {key: value for key, value in ROPE[kind].items() if key != name}
        rope |= {"rope_type": kind, "rope_theta": 1e4}
        try:
            transformers.LlamaConfig(**whole, rope_parameters=dict(rope))
            missed = ""
        except KeyError as problem:
            missed = str(problem)
        if missed:
            assert name in missed
            with pytest.raises(UserError, match=f"rope type '{kind}' needs {name}"):
                model_config_from_hf(whole | {where: rope})
        else:
            assert model_config_from_hf(whole | {where: rope}).rope_scaling.kind == kind


@pytest.mark.parametrize("code", ["[]", '{"a":1}', "null"])
def test_a_dtype_that_is_no_text_is_refused(tmp_path, code):
    array = np.ones((2, 3), np.float32)
    file = tmp_path / "a.safetensors"
    write_tensors(file, [("x", array.dtype, array.shape, lambda: array)])
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = file.read_bytes()[8 : 8 + length].replace(b'"dtype":"F32"', f'"dtype":{code}'.encode())
    assert code.encode() in header
    file.write_bytes(len(header).to_bytes(8, "little") + header + file.read_bytes()[8 + length :])
    with pytest.raises(UserError, match="bad header entry for tensor 'x'"):
        open_tensors(file)

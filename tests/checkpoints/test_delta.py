"""A student as one small file: joined bit for bit, and with nothing but its own teacher."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from lawcat_jax import models
from lawcat_jax.checkpoints import delta
from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.checkpoints.hf.mapping import flatten, unflatten
from lawcat_jax.checkpoints.hf.write import write_hf
from lawcat_jax.checkpoints.model_dir import DTYPES, load_model, open_checkpoint, save_model
from lawcat_jax.config import AttentionConfig, Config
from lawcat_jax.errors import UserError
from lawcat_jax.inference.loading import find_checkpoint
from lawcat_jax.tasks.compare import evaluate_checkpoints
from lawcat_jax.training import inputs
from tests.checkpoints import students


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("delta")
    teacher = students.write_teacher(folder / "teacher")
    students.write_student(folder / "run" / "student", "hybrid", teacher=teacher)
    (folder / "run" / "manifest.json").write_text(json.dumps({"config": {"seed": 3}, "argv": ["x"], "results": [1]}))
    convert(str(folder / "run"), str(folder / "small.safetensors"), to="delta", verify=True)
    return folder


def refused(text, action):
    with pytest.raises(UserError, match=text) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_joins_bit_for_bit(made, tmp_path):
    before = load_model(made / "run" / "student", dtype="keep")
    convert(str(made / "small.safetensors"), str(tmp_path / "again"), base=str(made / "teacher"))
    again = load_model(tmp_path / "again", dtype="keep")
    assert students.same_bits(before.params, again.params)
    assert (again.model, again.attention, again.lora) == (before.model, before.attention, before.lora)
    assert again.extra == before.extra
    opened = delta.Delta(made / "small.safetensors")
    assert opened.teacher == str(made / "teacher")
    assert opened.recipe == {"config": {"seed": 3}, "results": [1]}
    # Another reader sees the arrays under their own names, and nothing of the teacher.
    arrays = load_file(made / "small.safetensors")
    assert set(arrays) == {path for path, _ in flatten(before.params) if path.startswith(("mixers/", "lora/"))}
    assert students.same_bits(load_model(made / "small.safetensors", dtype="keep").params, before.params)


def test_a_rounded_copy_of_the_teacher_joins_bit_for_bit(made, tmp_path):
    student = students.write_student(
        tmp_path / "student", teacher=made / "teacher", dtype=DTYPES["bfloat16"], lora=None
    )
    convert(str(student), str(tmp_path / "s.safetensors"), to="delta")
    assert students.same_bits(
        load_model(tmp_path / "s.safetensors", dtype="keep").params, load_model(student, dtype="keep").params
    )
    # The other way round nothing is rounded: a bfloat16 teacher and a float32 student are the same numbers.
    half = {path: array.astype(DTYPES["bfloat16"]) for path, array in students.base_params().items()}
    write_hf(tmp_path / "half", model=students.MODEL, params=unflatten(half))
    wide = {path: array.astype(np.float32) for path, array in half.items()}
    attention = students.KINDS["lawcat"]
    params = unflatten(wide | students.student_params(attention, None))
    save_model(tmp_path / "wide", model=students.MODEL, attention=attention, params=params)
    convert(str(tmp_path / "wide"), str(tmp_path / "w.safetensors"), to="delta", base=str(tmp_path / "half"))
    assert students.same_bits(
        load_model(tmp_path / "w.safetensors", base=str(tmp_path / "half"), dtype="keep").params, params
    )


def test_another_base_is_refused(made, tmp_path):
    small = str(made / "small.safetensors")
    students.write_teacher(tmp_path / "other", seed=9)
    refused(
        r"other is not the teacher that .*small.safetensors was trained from \(12 of 12 parameters differ",
        lambda: load_model(small, base=str(tmp_path / "other")),
    )
    wider = students.MODEL.__class__(**{**vars(students.MODEL), "mlp_size": 64})
    students.write_teacher(tmp_path / "wider", wider)
    refused("mlp_size 64 instead of 48", lambda: open_checkpoint(small, base=str(tmp_path / "wider")))
    refused("--base goes with an adapter or a student's small file", lambda: load_model(made / "teacher", base="x"))
    refused("--base goes with", lambda: evaluate_checkpoints(["asset:tiny_llama"], {}, base="asset:tiny_llama"))
    (tmp_path / "moved").mkdir()
    lone = tmp_path / "moved" / "s.safetensors"
    student = students.write_student(tmp_path / "student", teacher=Path("/nowhere/teacher"))
    convert(str(student), str(lone), to="delta")
    refused("needs its teacher /nowhere/teacher.*name it with --base", lambda: load_model(lone))
    load_model(lone, base=str(made / "teacher"))


def test_a_student_with_trained_base_is_no_delta(made, tmp_path):
    base = students.base_params() | students.student_params(students.KINDS["lawcat"], None)
    base["final_norm/scale"] = base["final_norm/scale"] + np.float32(0.01)
    save_model(
        tmp_path / "s",
        model=students.MODEL,
        attention=students.KINDS["lawcat"],
        params=unflatten(base),
        extra={"source": str(made / "teacher")},
    )
    refused(
        "stage 2 trained the pretrained weights",
        lambda: convert(str(tmp_path / "s"), str(tmp_path / "x.safetensors"), to="delta"),
    )
    assert not (tmp_path / "x.safetensors").exists()


def test_halved_files_keep_gates(made, tmp_path):
    convert(str(made / "run" / "student"), str(tmp_path / "h.safetensors"), to="delta", dtype="bfloat16")
    kinds = {path: tensor.code for path, tensor in delta.open_tensors(tmp_path / "h.safetensors").items()}
    assert {code for path, code in kinds.items() if "gate" in path} == {"F32"}
    assert {code for path, code in kinds.items() if "gate" not in path} == {"BF16"}
    params = dict(flatten(load_model(tmp_path / "h.safetensors").params))
    assert {str(leaf.dtype) for leaf in params.values()} == {"float32"}


def test_damage_and_targets(made, tmp_path):
    small = made / "small.safetensors"
    data = bytearray(small.read_bytes())
    for place in (len(data) - 1, len(data) - 4000, data.index(b"training_length") + 20):
        flipped = bytearray(data)
        flipped[place] ^= 1
        (tmp_path / "f.safetensors").write_bytes(flipped)
        refused("damaged|not a student's|is a file|bad header", lambda: load_model(tmp_path / "f.safetensors"))
    (tmp_path / "short.safetensors").write_bytes(data[:-10])
    refused("truncated", lambda: load_model(tmp_path / "short.safetensors"))
    student = str(made / "run" / "student")
    refused("ends in .safetensors", lambda: convert(student, str(tmp_path / "x"), to="delta"))
    refused("needs one", lambda: convert(str(made / "teacher"), str(tmp_path / "x.safetensors"), to="delta"))
    refused("pass --overwrite", lambda: convert(student, str(small), to="delta"))
    foreign = tmp_path / "weights.safetensors"
    foreign.write_bytes((made / "teacher" / "model.safetensors").read_bytes())
    refused("it is no student's small file", lambda: convert(student, str(foreign), to="delta", overwrite=True))
    convert(student, str(tmp_path / "y.safetensors"), to="delta")
    convert(student, str(tmp_path / "y.safetensors"), to="delta", overwrite=True)


@pytest.mark.slow
def test_commands_take_it(tmp_path):
    teacher = load_model("asset:tiny_llama")
    attention = AttentionConfig(gate_rank=4)
    params = models.init_params(teacher.model, attention, None, seed=0, base=teacher.params)
    extra = {"source": "asset:tiny_llama", "training_length": 99, "eval": {"lengths": [64]}}
    save_model(tmp_path / "s", model=teacher.model, attention=attention, params=params, extra=extra)
    small = str(tmp_path / "s.safetensors")
    convert(str(tmp_path / "s"), small, to="delta")
    found = find_checkpoint(small)
    assert found.extra == extra
    assert len(found.tokenizer) == len(find_checkpoint("asset:tiny_llama").tokenizer)
    config = Config(attention=attention)
    config.teacher.source, config.teacher.base = small, "asset:tiny_llama"
    opened = inputs.open_teacher(config)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = dict(flatten(opened.params(dtype="bfloat16", shardings=lambda path: NamedSharding(mesh, PartitionSpec()))))
    for path, array in flatten(load_model(tmp_path / "s", dtype="bfloat16").params):
        assert spread[path].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(spread[path]), array)

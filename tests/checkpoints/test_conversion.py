"""The convert command: folders of runs, the sizes it prints, checkpoints with NaN."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

from lawcat_jax import models
from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.checkpoints.hf.mapping import flatten
from lawcat_jax.checkpoints.hf.write import write_hf
from lawcat_jax.checkpoints.model_dir import load_model, save_model
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig
from lawcat_jax.errors import UserError
from tests.models.helpers import drawn

MODEL = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_size=48)
STUDENT = (MODEL, AttentionConfig(gate_rank=4), LoraConfig(rank=2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with its student."""
    folder, params = tmp_path_factory.mktemp("run"), drawn(models.abstract(*STUDENT)[1])
    save_model(folder / "student", model=MODEL, attention=STUDENT[1], lora=STUDENT[2], params=params)
    (folder / "manifest.json").write_text("{}")
    return folder


def test_the_folder_of_a_run_is_its_student_and_the_size_is_that_of_the_files(run, tmp_path, capsys):
    convert(str(run), str(tmp_path / "m"))
    (line,) = capsys.readouterr().out.splitlines()
    files = [file for file in (tmp_path / "m").rglob("*") if file.is_file()]
    assert f", {sum(file.stat().st_size for file in files) / 1e9:.3g} GB in " in line
    count = sum(leaf.size for _, leaf in flatten(load_model(tmp_path / "m").params))
    assert f", {count / 1e6:,.1f} M parameters, " in line
    convert(str(run), str(tmp_path / "a"), to="peft")
    line = capsys.readouterr().out.splitlines()[-1]
    assert f", {sum(file.stat().st_size for file in (tmp_path / 'a').iterdir()) / 1e9:.3g} GB in " in line
    shutil.rmtree(run / "teacher", ignore_errors=True)
    with pytest.raises(UserError, match="not a model directory"):
        convert(str(tmp_path), str(tmp_path / "n"))


@pytest.mark.parametrize("kind", ["hf", "model"])
def test_what_float16_loses_is_counted(tmp_path, capsys, kind):
    params = jax.tree.map(
        lambda leaf: np.where(np.abs(leaf) < 1e-3, np.float32(1), leaf), drawn(models.abstract(MODEL)[1])
    )
    params["layers"]["mlp"]["up_proj"]["kernel"][0, 0, :3] = (1e-9, -1e-8, 0.0)  # the last loses nothing
    params["embed"]["embedding"][5, :2] = (1e-5, 2.0**-24)  # and here neither does the second
    write_hf(tmp_path / "hf", model=MODEL, params=params)
    if kind == "model":
        convert(str(tmp_path / "hf"), str(tmp_path / "model"))
    for dtype, lines in (("bfloat16", 0), ("float16", 1)):
        convert(str(tmp_path / kind), str(tmp_path / dtype), dtype=dtype)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines
    assert "weights 2 are too small and become zero, 1 lie below 6.1e-05 and lose digits" in said[0]


@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float16"])
def test_weights_that_are_no_numbers_are_named(tmp_path, capsys, dtype):
    params = drawn(models.abstract(MODEL)[1])
    params["final_norm"]["scale"][1] = np.inf
    params["layers"]["mlp"]["up_proj"]["kernel"][1, 2, 3] = np.nan
    write_hf(tmp_path / "hf", model=MODEL, params=params)
    convert(str(tmp_path / "hf"), str(tmp_path / "m"), dtype=dtype)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "NaN or infinity in " in said
    assert "final_norm/scale" in said
    assert "layers/mlp/up_proj/kernel" in said
    assert "q_proj" not in said


def test_verify_of_a_checkpoint_with_nan_names_the_weights(tmp_path):
    params = drawn(models.abstract(MODEL)[1])
    params["layers"]["mlp"]["up_proj"]["kernel"][1, 2, 3] = np.nan
    write_hf(tmp_path / "hf", model=MODEL, params=params)
    with pytest.raises(UserError, match=r"NaN or infinity in layers/mlp/up_proj/kernel, as in the source"):
        convert(str(tmp_path / "hf"), str(tmp_path / "m"), verify=True)

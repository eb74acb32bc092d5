"""An adapter that lies beside the weights of a model."""

from __future__ import annotations

import fnmatch
import shutil

import pytest

from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.checkpoints.hf.merge import CONFIG, WEIGHTS
from lawcat_jax.checkpoints.hf.peft import write_adapter
from lawcat_jax.checkpoints.logits import compare_logits, random_tokens, suspects, teacher_logits
from lawcat_jax.checkpoints.model_dir import in_run, load_model, open_checkpoint, takes_base
from lawcat_jax.config import AttentionConfig, LoraConfig
from lawcat_jax.errors import UserError
from tests.checkpoints import students

LORA = LoraConfig(rank=2, alpha=8.0, targets=("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher, an adapter to it, and a run with its student, exported as well."""
    folder = tmp_path_factory.mktemp("models")
    teacher = students.write_teacher(folder / "hf")
    params = students.student_params(AttentionConfig(gate_rank=4), LORA)
    lora = {name: {part: params[f"lora/{name}/{part}"] for part in "ab"} for name in LORA.targets}
    write_adapter(
        folder / "adapter",
        model=students.MODEL,
        attention=None,
        lora=LORA,
        params={"lora": lora},
        base_model=str(teacher),
    )
    students.write_student(folder / "run" / "student", teacher=teacher)
    convert(str(folder / "run"), str(folder / "exported"), to="transformers")
    return folder


def beside(models, tmp_path, name, inner="."):
    """A copy of a model with the files of the adapter in its folder, or in one within."""
    shutil.copytree(models / name, tmp_path / name)
    for file in (CONFIG, WEIGHTS):
        shutil.copy(models / "adapter" / file, tmp_path / name / inner / file)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "inner"), [("hf", "."), ("exported", "."), ("run", "."), ("run", "student"), ("run/student", ".")]
)
def test_it_is_refused_by_whatever_reads_a_model(models, tmp_path, name, inner):
    source = beside(models, tmp_path, name, inner)
    reads = [
        lambda: convert(str(source), str(tmp_path / "out")),
        lambda: convert(str(models / "hf"), str(tmp_path / "out"), adapter=str(source / inner)),
        lambda: convert(str(models / "adapter"), str(tmp_path / "out"), base=str(source)),
        lambda: load_model(source),
        lambda: open_checkpoint(in_run(source)[0]),
        lambda: takes_base(source / inner),
    ]
    for read in reads:
        with pytest.raises(
            UserError, match=rf"{name}.*: holds a model and, in {CONFIG}, an adapter: .*--adapter="
        ) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    (source / inner / CONFIG).unlink()
    load_model(source)


def test_transformers_applies_it_and_the_remedy_gives_the_same(models, tmp_path):
    pytest.importorskip("peft")
    mixed = beside(models, tmp_path, "hf")
    convert(str(models / "hf"), str(tmp_path / "merged"), adapter=str(models / "adapter"))
    tokens = random_tokens(students.MODEL)
    for source, same in ((tmp_path / "merged", True), (models / "hf", False)):
        result = compare_logits(teacher_logits(load_model(source), tokens), mixed, tokens)
        assert (result["max_abs"] < 1e-4) == same


def test_it_is_noticed_in_a_repository_of_the_hub(models, tmp_path, monkeypatch):
    import huggingface_hub

    repository, only_adapter = beside(models, tmp_path, "hf"), models / "adapter"

    def download(name, revision, allow_patterns):
        remote = repository if name == "someone/model" else only_adapter
        local = tmp_path / "cache" / name
        for file in remote.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                local.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=f"holds a model and, in {CONFIG}, an adapter"):
        load_model("someone/model")
    with pytest.raises(UserError, match="someone/adapter is an adapter; download its files"):
        load_model("someone/adapter")


def test_other_weights_that_config_json_names_are_refused(models, tmp_path):
    shutil.copytree(models / "hf", tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(config.read_text().replace("{", '{"transformers_weights": "other.safetensors",', 1))
    with pytest.raises(UserError, match=r"transformers_weights 'other\.safetensors' is not supported"):
        load_model(tmp_path / "hf")


def test_a_mismatch_with_transformers_names_the_adapter(models, tmp_path):
    assert "is an adapter, which transformers applies" in suspects(beside(models, tmp_path, "hf"), None)

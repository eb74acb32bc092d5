"""Whole runs on a random tiny teacher: stages, resume through the command line's entry, model directory, evaluation."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lawcat_jax import models
from lawcat_jax.checkpoints import model_dir, model_json
from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    StageConfig,
    TeacherConfig,
)
from lawcat_jax.data.train_tokenizer import passkey_sentences, save_tokenizer, train_tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import network, sharding
from lawcat_jax.training import dry_run, identity, inputs, loop, optim, run
from lawcat_jax.training.metrics import Manifest

LENGTH = 128


@pytest.fixture(scope="module", autouse=True)
def one_device(tmp_path_factory):
    """The tests' process may simulate several devices. Runs of this module share what they compile."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
        for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.05), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A random Llama with a tokenizer of its own, as a model directory."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = train_tokenizer(passkey_sentences(), vocab_size=400, passkey_repeats=10)
    path = save_tokenizer(tokenizer, folder / "tokenizer")
    model = ModelConfig(
        vocab_size=512,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_size=48,
        max_position_embeddings=256,
        tie_embeddings=True,
    )
    params = jax.device_get(models.init_params(model, seed=0))
    model_dir.save_model(folder / "model", model=model, params=params, tokenizer_source=path)
    return folder / "model"


def make_config(teacher: Path, workdir: Path, **changes) -> Config:
    data = DataConfig(passkey_words=0, min_length_fraction=0.8, num_samples=64, validation_samples=6)
    stage = StageConfig(
        steps=4, batch_size=4, grad_accum=2, seq_length=LENGTH, learning_rate=1e-2, eval_every=2, data=data
    )
    config = Config(
        workdir=str(workdir),
        teacher=TeacherConfig(source=str(teacher)),
        attention=AttentionConfig(gate_rank=4),
        lora=LoraConfig(rank=2, dropout=0.1),
        stage1=dataclasses.replace(stage, trainable=("^mixers/",)),
        stage2=dataclasses.replace(stage, trainable=("^lora/",), kl_weight=0.5, loss_chunk=48),
        checkpoint=CheckpointConfig(every_steps=3),
        log=LogConfig(every_steps=1, progress="off", tensorboard=False),
        eval=EvalConfig(lengths=(LENGTH,), samples=2, batch_size=2, passkey_form="train", teacher=False),
    )
    return dataclasses.replace(config, **changes)


def numbers(workdir: Path) -> list[dict]:
    """Rows of training and validation; results of an evaluation and what the clock says left out."""
    skip = {"time", "tokens_per_second", "first_step_seconds", "mfu"}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["stage"] != "eval" and "first_step_seconds" not in line]
    return [{k: v for k, v in line.items() if k not in skip} for line in kept]


@pytest.fixture(scope="module")
def watched(teacher, tmp_path_factory) -> tuple[Path, list[str]]:
    """(the folder of a finished run, directories whose model.json it read)."""
    workdir, read = tmp_path_factory.mktemp("run"), []
    read_model_json = model_json.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_json, "read", lambda path: read.append(str(path)) or read_model_json(path))
        assert run.run(make_config(teacher, workdir)) == 0
    return workdir, read


@pytest.fixture(scope="module")
def straight(watched) -> Path:
    return watched[0]


def test_the_teacher_is_opened_once(watched, teacher):
    assert watched[1] == [str(teacher)]


def test_run_leaves_student_report_and_manifest(straight, teacher):
    manifest = json.loads((straight / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["results"]["passkey"]["student"][str(LENGTH)]["n"] == 2
    assert (straight / "eval" / "passkey.json").exists()
    student = model_dir.load_model(straight / "student")
    before = model_dir.load_model(teacher)
    after = optim.flatten(student.params)
    for path, value in optim.flatten(before.params).items():  # the teacher is untouched, bit for bit
        np.testing.assert_array_equal(after[path], value)
    assert np.abs(after["lora/q_proj/b"]).max() > 0
    assert student.extra["training_length"] == LENGTH


def test_losses_fall_and_are_logged(straight):
    lines = numbers(straight)
    stage1 = [line["loss"] for line in lines if line["stage"] == "stage1" and "loss" in line]
    assert len(stage1) == 4
    assert stage1[-1] < stage1[0]
    first = next(line for line in lines if line["stage"] == "stage1" and "relative_mse" in line)
    assert len(first["relative_mse"]) == 2
    assert any("kl" in line for line in lines if line["stage"] == "stage2")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.stage2.__setattr__("data", DataConfig(kind="text", source="/nowhere.txt")), "no such file"),
        (lambda c: c.eval.__setattr__("lengths", (1,)), "too short|at least"),
        (lambda c: Path(c.workdir, "eval").write_text("mine"), "is a file; the reports"),
    ],
)
def test_late_mistakes_show_before_the_first_step_and_leave_the_folder_free(
    teacher, tmp_path, change, told, monkeypatch
):
    monkeypatch.setattr(run, "run_stage", lambda *_, **__: pytest.fail("trained"))
    config = make_config(teacher, tmp_path)
    change(config)
    with pytest.raises(UserError, match=told):
        run.run(config)
    assert not {"manifest.json", "metrics.jsonl", "checkpoints"} & {path.name for path in tmp_path.iterdir()}


def test_every_number_has_its_time_and_is_in_the_documentation(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    times = [datetime.datetime.fromisoformat(line["time"]) for line in lines]
    assert times == sorted(times)
    table = (Path(__file__).parents[2] / "docs" / "training.md").read_text().partition("## Metrics")[2]
    named = set(re.findall(r"`([\w/<>]+)`", table.partition("## What resuming")[0]))
    names = {name for line in lines if line["stage"] != "eval" for name in line} - {"stage", "step"}
    names = {re.sub("^(validation|diagnostics)/", "", name) for name in names}
    names = {re.sub("^(grad_norm)/.*", r"\1/<group>", name).split("/mixers/")[0] for name in names}
    assert not names - named, f"not in docs/training.md: {names - named}"


def test_results_are_curves_too(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    (found,) = [line for line in lines if line["stage"] == "eval"]
    results = json.loads((straight / "manifest.json").read_text())["results"]["passkey"]["student"][str(LENGTH)]
    assert found["step"] == LENGTH
    assert {name.removeprefix("passkey/student/"): found[name] for name in found if "/" in name} == results


def test_finished_run_exits_at_once(straight, teacher, capsys):
    before = (straight / "metrics.jsonl").read_bytes()
    assert run.run(make_config(teacher, straight)) == 0
    assert "finished" in capsys.readouterr().out
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_not_evaluated_with_other_settings(straight, teacher):
    config = make_config(teacher, straight)
    config.eval.batch_size = 1  # changes no result
    assert run.run(config) == 0
    config.eval.samples = 5
    with pytest.raises(
        UserError, match=r"finished run, evaluated with other settings \(config\.eval\.samples: 2 there, 5"
    ):
        run.run(config)
    config.eval.enabled = False
    assert run.run(config) == 0


def test_interrupted_run_resumes_bit_for_bit(straight, teacher, tmp_path, monkeypatch):
    running: list[str] = []
    inner = loop.Loop.run

    def named(self, stop):
        running[:] = [self._stage.name]
        return inner(self, stop)

    monkeypatch.setattr(loop.Loop, "run", named)
    config = make_config(teacher, tmp_path, eval=EvalConfig(enabled=False))  # harmless: not part of what must be equal
    for moment in [("stage1", 2), ("stage2", 2)]:
        with monkeypatch.context() as patch:
            patch.setattr(loop.StopSignal, "requested", lambda self, step, moment=moment: (running[0], step) == moment)
            assert run.run(config) == loop.EXIT_INTERRUPTED
    assert run.run(config) == 0
    assert numbers(tmp_path) == numbers(straight)
    a, b = (optim.flatten(model_dir.load_model(w / "student").params) for w in (tmp_path, straight))
    for path in a:
        np.testing.assert_array_equal(a[path], b[path])


def test_other_config_in_the_workdir_is_refused(straight, teacher):
    config = make_config(teacher, straight)
    config.stage2.learning_rate = 5e-3
    config.log.every_steps = 7  # harmless
    with pytest.raises(
        UserError, match=r"another configuration \(config.stage2.learning_rate: 0.01 there, 0.005 here\)"
    ):
        run.run(config)


@pytest.fixture
def finished(straight, tmp_path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run"


def test_finished_without_a_result_exports_it_again(finished, straight, teacher, capsys):
    shutil.rmtree(finished / "student" / "params")
    before = (finished / "metrics.jsonl").read_bytes()
    assert run.run(make_config(teacher, finished)) == 0
    assert "there are no weights in" in capsys.readouterr().out
    a, b = (optim.flatten(model_dir.load_model(folder / "student").params) for folder in (finished, straight))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert (finished / "metrics.jsonl").read_bytes() == before
    results = [json.loads((folder / "manifest.json").read_text())["results"] for folder in (finished, straight)]
    assert results[0] == results[1] != {}


def test_finished_without_result_and_checkpoints_is_an_error(finished, teacher):
    shutil.rmtree(finished / "student")
    shutil.rmtree(finished / "checkpoints" / "stage1")
    with pytest.raises(UserError, match="marked as finished, but its result is missing and so is the last checkpoint"):
        run.run(make_config(teacher, finished))


def test_checkpoints_without_manifest_belong_to_their_run(finished, teacher):
    (finished / "manifest.json").unlink()
    config = make_config(teacher, finished)
    config.stage2.learning_rate = 5e-3
    with pytest.raises(
        UserError, match=r"checkpoint of stage1 at step 4 holds .*stage2.learning_rate: 0.01 there, 0.005"
    ):
        run.run(config)
    assert not (finished / "manifest.json").exists()  # the folder is free for the right command
    assert run.run(make_config(teacher, finished)) == 0


@pytest.mark.parametrize(
    ("field", "message"), [("weights", "its weights have changed"), ("tokenizer", "the tokenizer has changed")]
)
def test_another_teacher_on_resume_is_refused(finished, teacher, field, message):
    path = finished / "manifest.json"
    values = json.loads(path.read_text())
    values["status"] = "interrupted"
    values["teacher"][field] = "another"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"belongs to a run with another teacher \\({message}\\)"):
        run.run(make_config(teacher, finished))


def test_a_student_that_is_trained_on_keeps_its_adapters_or_is_refused(straight, tmp_path):
    config = make_config(straight / "student", tmp_path)
    assert inputs.open_teacher(config).lora == config.lora
    config.lora.dropout = 0.0
    inputs.open_teacher(config)
    config.lora.rank = 3
    with pytest.raises(UserError, match=r"adapters of another form \(config.lora.rank: 2 there, 3 here\)"):
        inputs.open_teacher(config)
    config = make_config(straight / "student", tmp_path)
    config.stage2.enabled = False
    with pytest.raises(UserError, match="is a student with trained adapters, which only stage 2 has a place for"):
        inputs.open_teacher(config)


@pytest.mark.slow
def test_a_student_that_is_its_teacher_with_another_attention(teacher, tmp_path):
    """The kind "window" needs no stage, keeps its weights, and is trained on; other kinds need a stage."""
    attention = AttentionConfig(kind="window", window_size=20, sinks=4)
    config = make_config(teacher, tmp_path / "run", attention=attention)
    config.stage1.enabled = config.stage2.enabled = False
    config.eval.enabled = False
    assert run.run(config) == 0
    opened = model_dir.open_checkpoint(tmp_path / "run" / "student")
    assert (opened.attention, opened.lora) == (attention, None)
    assert (opened.extra["stage"], opened.extra.get("training_length")) == ("none", None)
    assert run.run(config) == 0  # it is finished
    found, base = (optim.flatten(model_dir.load_model(path).params) for path in (tmp_path / "run" / "student", teacher))
    assert found.keys() == base.keys()
    assert all(np.array_equal(found[name], base[name]) for name in base)
    config.attention = AttentionConfig(gate_rank=4)
    with pytest.raises(ConfigError, match="no stage is enabled"):
        config.validate()

    more = make_config(tmp_path / "run" / "student", tmp_path / "more", attention=attention)
    more.stage1.enabled = more.eval.enabled = False
    assert run.run(more) == 0
    trained = optim.flatten(model_dir.load_model(tmp_path / "more" / "student").params)
    assert {name.split("/")[0] for name in trained.keys() - base.keys()} == {"lora"}
    assert any(np.abs(trained[name]).max() > 0 for name in trained if name.endswith("/b"))


def test_a_student_names_the_teacher_that_others_have(straight, teacher, tmp_path):
    """However it was trained: its small file has to find the teacher where the folders of this machine are not."""

    def named(source) -> str:
        config = make_config(source, tmp_path)
        return inputs.teacher_of(config, inputs.open_teacher(config))[0]

    assert named(teacher) == str(teacher)
    assert named(straight / "student") == str(teacher)  # trained on from a student
    convert("asset:tiny_llama", tmp_path / "converted")
    assert named(tmp_path / "converted") == "asset:tiny_llama"
    convert(str(teacher), tmp_path / "copy")
    assert named(tmp_path / "copy") == str(tmp_path / "copy")  # what it was made of may be gone


def test_manifest_says_what_became_of_the_stages(straight):
    stages = json.loads((straight / "manifest.json").read_text())["stages"]
    assert stages.keys() == {"stage1", "stage2"}
    for name, summary in stages.items():
        losses = {
            line["step"]: line["validation/loss"]
            for line in numbers(straight)
            if line["stage"] == name and "validation/loss" in line
        }
        assert (summary["steps"], summary["bad_steps"]) == (4, 0)
        assert summary["validation_loss"] == pytest.approx(min(losses.values()))
        assert losses[summary["kept_step"]] == min(losses.values())


def test_a_field_that_came_later_counts_as_its_default():
    old, new = {"stage2": {"batch_size": 8}}, {"stage2": {"batch_size": 8, "unroll_layers": False}}
    defaults = {"stage2": {"unroll_layers": False, "kl_temperature": 1.0}}
    new["stage2"]["kl_temperature"] = 1.0
    assert identity.differences(old, new, defaults, "config") == []
    new["stage2"] |= {"unroll_layers": True, "kl_temperature": 2.0}
    assert identity.differences(old, new, defaults, "config") == [
        "config.stage2.kl_temperature: only in the new configuration",
        "config.stage2.unroll_layers: only in the new configuration",
    ]


def test_declared_architecture_must_match(teacher, tmp_path):
    config = make_config(teacher, tmp_path)
    config.teacher.architecture = ModelConfig(num_layers=3)
    with pytest.raises(UserError, match="num_layers: declared 3, found 2"):
        run.run(config)


def test_dry_run_writes_nothing(teacher, tmp_path, capsys):
    config = make_config(teacher, tmp_path / "none", dry_run=True)
    config.stage2.enabled = False
    assert run.run(config) == 0
    out = capsys.readouterr().out
    assert "all checks passed" in out
    assert "compiled in" in out
    assert not (tmp_path / "none").exists()


@pytest.fixture
def quick_dry_run(monkeypatch):
    """Without compiling, which the test above does."""
    monkeypatch.setattr(dry_run, "_compiled", lambda built: "not compiled")


def test_dry_run_compares_a_declared_architecture_with_the_teacher(teacher, tmp_path, capsys, quick_dry_run):
    config = make_config(teacher, tmp_path, dry_run=True)
    config.teacher.architecture = dataclasses.replace(model_json.read(teacher).model, num_layers=3)
    with pytest.raises(UserError, match="num_layers: declared 3, found 2"):
        run.run(config)
    config.teacher.architecture.num_layers = 2
    assert run.run(config) == 0
    out = capsys.readouterr().out
    assert "read from its files, as declared in the config" in out
    assert out.endswith("dry run: all checks passed\n")


@pytest.mark.parametrize("source", ["nobody/at-home", "/nowhere/at/all", "package:nothing_of_that_name"])
def test_dry_run_says_that_a_missing_teacher_was_not_checked(
    source, teacher, tmp_path, capsys, quick_dry_run, monkeypatch
):
    monkeypatch.setattr(network, "hub_or_offline", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = make_config(teacher, tmp_path, dry_run=True)
    config.teacher.source = source
    with pytest.raises(UserError, match=r"or declare config\.teacher\.architecture|no module|package"):
        run.run(config)
    config.teacher.architecture = model_json.read(teacher).model
    config.teacher.tokenizer = str(teacher / "tokenizer")
    assert run.run(config) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"dry run: no mistake found; not checked: the teacher (there is no {source} on this machine)"


def test_dry_run_checks_the_evaluation_too(teacher, tmp_path, quick_dry_run):
    config = make_config(teacher, tmp_path, dry_run=True)
    config.eval = EvalConfig(tasks=("perplexity",), text=str(tmp_path / "nothing.txt"), lengths=(LENGTH,))
    with pytest.raises(UserError, match=r"nothing\.txt"):
        run.run(config)


def test_epochs_are_passes_over_the_text(teacher, tmp_path, capsys, quick_dry_run, monkeypatch):
    """A text of some 40 sequences makes 2 x 40 / 4 steps, however large ``num_samples`` is."""
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("The sky is blue. Here we go. " * 300)
    config = make_config(teacher, tmp_path / "run", dry_run=True)
    config.stage1.data = DataConfig(kind="text", source=str(tmp_path / "a.txt"), validation_samples=3)
    config.stage1.steps, config.stage1.epochs, config.stage2.enabled = 0, 2.0, False
    assert run.run(config) == 0
    out = capsys.readouterr().out
    rows = int(re.search(r"a pass has (\d+) rows", out)[1])
    assert 10 < rows < 100
    assert f"stage1: {2 * rows // 4} steps of 4 x {LENGTH} tokens" in out
    assert re.search(
        rf"corpus: 1 document\(s\) of [\d,]+ tokens, {rows} sequences of {LENGTH} for training; a pass", out
    )
    config.stage1.epochs = 0.01
    with pytest.raises(UserError, match=rf"config\.stage1\.epochs: 0\.01 of {rows} sequences make no batch of 4"):
        run.run(config)


def test_runs_of_earlier_versions_keep_their_steps(straight, teacher, tmp_path):
    """They took an epoch to be ``num_samples`` sequences, whatever the text."""
    manifest = json.loads((straight / "manifest.json").read_text())
    assert manifest["steps"] == {"stage1": 4, "stage2": 4}
    config = make_config(teacher, tmp_path)
    assert Manifest.open(tmp_path, config).counts_rows
    for status in ("running", "finished"):
        old = {name: value for name, value in manifest.items() if name != "steps"} | {"status": status}
        (tmp_path / "manifest.json").write_text(json.dumps(old))
        assert not Manifest.open(tmp_path, config).counts_rows
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert Manifest.open(tmp_path, config).counts_rows


@pytest.mark.slow
def test_pretraining_writes_a_hugging_face_teacher(teacher, tmp_path):
    config = make_config(teacher, tmp_path, eval=EvalConfig(enabled=False))
    architecture = model_json.read(teacher).model
    config.teacher = TeacherConfig(architecture=architecture, tokenizer=str(teacher / "tokenizer"))
    config.pretrain = dataclasses.replace(config.stage1, enabled=True, trainable=(".*",), steps=2, eval_every=0)
    config.stage1.enabled = config.stage2.enabled = False
    assert run.run(config) == 0
    written = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "teacher" / "tokenizer.json").exists()
    loaded = model_dir.load_model(tmp_path / "teacher")
    assert loaded.model.eos_token_ids
    start = models.init_params(architecture, seed=config.seed)
    assert np.abs(loaded.params["embed"]["embedding"] - start["embed"]["embedding"]).max() > 0

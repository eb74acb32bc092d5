"""evaluate and generate on a small random student, and their error lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lawcat_jax.config import AttentionConfig, EvalConfig, LoraConfig, ModelConfig
from lawcat_jax.data.tokenize import decode, encode_prompt, stream_text
from lawcat_jax.data.train_tokenizer import save_tokenizer
from lawcat_jax.errors import UserError
from tests.data import tokenizers as small


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A model directory as a run leaves it: <run>/student, with a manifest beside."""
    from lawcat_jax import models
    from lawcat_jax.checkpoints.model_dir import save_model

    run = tmp_path_factory.mktemp("run")
    model = ModelConfig(
        vocab_size=420,
        hidden_size=32,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        mlp_size=64,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_ids=(1,),
    )
    attention, lora = AttentionConfig(gate_rank=4), LoraConfig()
    save_model(
        run / "student",
        model=model,
        attention=attention,
        lora=lora,
        params=models.init_params(model, attention, lora, seed=0),
        tokenizer_source=save_tokenizer(small.byte_level(), run / "tokenizer"),
        extra={"training_length": 200, "eval": {"lengths": [200], "samples": 3, "batch_size": 2}},
    )
    (run / "manifest.json").write_text("{}")
    return run / "student"


def _run(module, *arguments, cwd, **variables):
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-m", f"lawcat_jax.{module}", *arguments],
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def _evaluate(model, output, **options):
    from lawcat_jax.tasks.runner import evaluate_model

    return evaluate_model(
        model.graphdef,
        model.params,
        model.tokenizer,
        EvalConfig(lengths=(150,), samples=3, batch_size=2, **options),
        model="tiny",
        output=output,
        is_student=True,
        training_length=150,
    )


def test_evaluation_of_a_loaded_student(student, tmp_path):
    from lawcat_jax.inference.loading import load_for_inference

    model = load_for_inference(str(student.parent))  # the folder of the run finds its student
    assert model.is_student
    assert model.directory == student.parent
    assert model.eos_ids == (1,)
    results = _evaluate(model, tmp_path / "eval", teacher=False)
    assert results["passkey"]["student"][150].n == 3
    assert {file.name for file in (tmp_path / "eval").iterdir()} == {
        "passkey.json",
        "passkey.md",
        "passkey.png",
        "passkey_depth.png",
    }


@pytest.mark.slow
def test_every_task_with_the_teacher_and_generation(student, tmp_path):
    from lawcat_jax.inference.generation import generate
    from lawcat_jax.inference.loading import load_for_inference
    from lawcat_jax.inference.session import Session

    model = load_for_inference(str(student))
    assert model.directory == student.parent
    (tmp_path / "book.txt").write_text("The sky is blue. Here we go. " * 100)
    results = _evaluate(
        model, tmp_path / "eval", teacher=True, tasks=("passkey", "perplexity"), text=str(tmp_path / "book.txt")
    )
    assert 5.5 < results["perplexity"]["student"][150].nats < 6.5  # a random model: about log 420 = 6.04
    assert {file.name for file in (tmp_path / "eval").iterdir()} == {
        "passkey.json",
        "passkey_teacher.json",
        "passkey.md",
        "passkey.png",
        "passkey_depth.png",
        "perplexity.json",
        "perplexity_teacher.json",
        "perplexity.md",
        "perplexity.png",
    }
    prompt = encode_prompt(model.tokenizer, "The sky is")
    options = {"max_new_tokens": 12, "eos_ids": model.eos_ids}
    (whole,) = generate(model.graphdef, model.params, [prompt], **options)
    tokens = Session(model.graphdef, model.params).stream(prompt, **options)
    pieces = list(stream_text(model.tokenizer, tokens, context=prompt))
    assert "The sky is" + "".join(pieces) == decode(model.tokenizer, prompt + whole)


@pytest.mark.slow
def test_evaluate_command(student, tmp_path):
    done = _run("evaluate", f"--checkpoint={student}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((student.parent / "eval" / "passkey.json").read_text())
    assert written["task"] == "passkey"
    assert set(written["results"]) == {"200"}  # lengths and samples from the checkpoint
    assert written["results"]["200"]["n"] == 3
    assert "passkey student: 200 tokens, 3/3 samples" in done.stderr
    assert "tokens" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_checkpoints_are_compared(student, tmp_path):
    options = [
        "--lengths=200",
        "--samples=2",
        "--checkpoint=mine=" + str(student.parent),
        "--checkpoint=asset:tiny_llama",
    ]
    done = _run("evaluate", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (output,) = tmp_path.iterdir()
    assert output.name == "eval_mine_tiny_llama"
    assert {file.name for file in output.iterdir()} == {
        "passkey.md",
        "passkey.png",
        "passkey_depth.png",
        "passkey_mine.json",
        "passkey_tiny_llama.json",
    }
    assert json.loads((output / "passkey_tiny_llama.json").read_text())["role"] == "teacher"
    assert ["tokens", "mine", "tiny_llama"] in [line.split() for line in done.stdout.splitlines()]


def test_checkpoint_names(tmp_path):
    from lawcat_jax.tasks.compare import named_checkpoints

    (tmp_path / "x=y").mkdir()
    named = named_checkpoints(["a=runs/one,runs/two/student", "asset:tiny_llama", "org/model", f"{tmp_path}/x=y"])
    assert named == {
        "a": "runs/one",
        "two": "runs/two/student",
        "tiny_llama": "asset:tiny_llama",
        "model": "org/model",
        "x=y": f"{tmp_path}/x=y",
    }
    with pytest.raises(UserError, match="two models are named 'b'"):
        named_checkpoints(["a/b", "c/b"])
    with pytest.raises(UserError, match="--checkpoint is missing"):
        named_checkpoints([""])


def test_nothing_is_written_into_a_source(student, tmp_path):
    """Reports go into the folder of a run, or into the current folder."""
    import shutil

    from lawcat_jax.inference.loading import find_checkpoint
    from lawcat_jax.tasks.compare import default_output

    run = find_checkpoint(str(student))
    assert default_output({"a": run}) == student.parent / "eval"
    assert run.extra["training_length"] == 200
    shutil.copytree(student, tmp_path / "copied")
    copied = find_checkpoint(str(tmp_path / "copied"))
    assert copied.run is None
    assert default_output({"copied": copied}) == Path("eval_copied")
    assert default_output({"a": run, "org/b": copied}) == Path("eval_a_org-b")


def test_settings_of_an_evaluation():
    from lawcat_jax.tasks.compare import chosen_settings

    stored = {"lengths": [200], "samples": 3, "teacher": True, "of_another_version": 1}
    chosen = chosen_settings(stored, {"samples": 5, "seed": None, "teacher": False})
    assert (chosen.lengths, chosen.samples, chosen.seed, chosen.teacher) == ((200,), 5, EvalConfig().seed, False)
    assert chosen_settings({}, {"teacher": True}).teacher
    with pytest.raises(UserError, match=r"^--tasks: 'x' is not one of"):
        chosen_settings({}, {"tasks": ("x",)})


@pytest.mark.parametrize(
    ("given", "options", "told"),
    [
        ({"tasks": ("passkey",), "text": "book.txt"}, {}, r"^--text: not read by --tasks=passkey with --form=landmark"),
        ({"seed": 3, "sample_seed": 3}, {}, "^--seed: not read by --tasks=passkey with --form=landmark"),
        ({"tasks": ("passkey",), "haystack": "x", "babi": "y"}, {}, "^--haystack, --babi: not read by"),
        (
            {"tasks": ("perplexity",), "text": "t", "passkey_form": "train"},
            {},
            "^--form: not read by --tasks=perplexity;",
        ),
        ({"tasks": ("perplexity",), "text": "t", "prefill_chunk": 8}, {}, "^--prefill_chunk: not read by"),
        ({"tasks": ("perplexity",), "text": "t", "position_block": 8}, {}, "^--position_block: not read by"),
        ({"text_key": "body"}, {}, "^--text_key: not read by"),
        ({"tasks": ("babilong_qa1",), "babi": "y", "haystack": "x", "lengths": (0,)}, {}, "^--haystack: not read by"),
        (
            {"tasks": (), "lm_eval": ("piqa",), "lengths": None, "samples": 5},
            {},
            "^--samples: not read by --tasks=lm_eval:piqa; leave it out; --lm_eval_limit limits",
        ),
        ({"tasks": (), "lm_eval": ("piqa",)}, {}, "^--lengths: not read by --tasks=lm_eval:piqa; leave it out$"),
        ({"teacher": True}, {}, "^--teacher evaluates the teacher of a student .* no --checkpoint is a student$"),
        ({}, {"revision": "main"}, "^--revision goes with a hub repository, and no --checkpoint is one$"),
        ({}, {"base": "asset:tiny_llama"}, "^--base goes with a student's small file"),
    ],
)
def test_a_flag_that_nothing_reads_is_refused(given, options, told, tmp_path):
    from lawcat_jax.tasks.compare import evaluate_checkpoints

    with pytest.raises(UserError, match=told):
        evaluate_checkpoints(
            ["asset:tiny_llama"], {"lengths": (150,), **given}, output=str(tmp_path / "out"), **options
        )
    assert not list(tmp_path.iterdir())


def test_flags_that_a_task_reads_are_taken():
    from lawcat_jax.tasks.registry import tasks

    every = set().union(*(task.reads(EvalConfig(passkey_form="train")) for task in tasks().values()))
    assert every >= {"text", "text_key", "haystack", "babi", "seed", "sample_seed", "position_block", "prefill_chunk"}
    assert all(
        set(task.settings) >= task.reads(EvalConfig()) - {"lengths", "prefill_chunk"} for task in tasks().values()
    )
    assert "text_key" in tasks()["niah_single_2"].identity(EvalConfig())  # another field of the rows is another hay


def test_a_revision_goes_with_a_repository(student):
    from lawcat_jax.checkpoints.model_dir import open_checkpoint

    for source in ("asset:tiny_llama", str(student)):
        with pytest.raises(UserError, match=r"^revision 'main' goes with a hub repository, and .* is on this machine"):
            open_checkpoint(source, "main")


def test_the_fingerprint_of_a_model_is_of_its_weights(student):
    import jax

    from lawcat_jax.inference.loading import load_for_inference
    from lawcat_jax.tasks.decoder_model import decoder_models

    model = load_for_inference(str(student))

    def fingerprints(params):
        options = {"name": "m", "is_student": True, "teacher": True, "batch_size": 1}
        return [found.fingerprint for found in decoder_models(model.graphdef, params, model.tokenizer, **options)]

    before = fingerprints(model.params)
    assert len(set(before)) == 2  # student and teacher
    assert fingerprints(jax.tree.map(jax.numpy.copy, model.params)) == before  # x + 0 has other zeros
    changed = jax.tree.map(lambda x: x, model.params)
    changed["embed"]["embedding"] = changed["embed"]["embedding"].at[7, 3].add(1e-3)
    swapped = jax.tree.map(lambda x: x, model.params)
    swapped["embed"]["embedding"] = swapped["embed"]["embedding"][::-1]
    assert len({*before, *fingerprints(changed), *fingerprints(swapped)}) == 6


@pytest.mark.slow
def test_generate_command(student, tmp_path):
    done = _run("generate", f"--checkpoint={student}", "--prompt=The sky is", "--max_new_tokens=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The sky is")
    assert len(done.stdout) > len("The sky is") + 1


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        pytest.param(
            "evaluate",
            ["--checkpoint=/no/such/place", "--lengths=200"],
            "/no/such/place",
            marks=pytest.mark.slow,
        ),
        ("evaluate", ["--checkpoint=x", "--lengths=many"], "--lengths: 'many' is not a number of tokens"),
        ("generate", ["--checkpoint=x"], "--prompt is missing"),
        ("train_tokenizer", ["--input=none/*.txt", "--target=t"], "no such file"),
    ],
)
def test_error_lines(module, arguments, message, tmp_path):
    done = _run(module, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_prompts_that_cannot_be_run_are_refused_before_they_are(student, monkeypatch):
    from lawcat_jax.inference.loading import load_for_inference
    from lawcat_jax.inference.session import Session
    from lawcat_jax.inference.text import Request, continue_text

    model = load_for_inference(str(student))
    monkeypatch.setattr(Session, "_stream", lambda *_args, **_options: iter(()))
    with pytest.raises(UserError, match="softmax attention was trained for 256 positions"):
        continue_text(model, "The sky is blue. " * 60_000, Request(4, teacher=True))
    assert list(continue_text(model, "The sky is blue. " * 1000, Request(4))) == []
    with pytest.raises(UserError, match="more than can be run"):
        continue_text(model, "The sky", Request(2**40))


def test_loading_errors(student, tmp_path):
    from lawcat_jax.inference.loading import load_for_inference

    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        load_for_inference(str(tmp_path / "file"))
    with pytest.raises(UserError, match="--checkpoint is missing"):
        load_for_inference("")
    with pytest.raises(UserError, match="not a model directory"):
        load_for_inference(str(tmp_path))


def test_mistakes_in_stored_settings_say_where_they_are_stored():
    from lawcat_jax.tasks.compare import chosen_settings

    with pytest.raises(
        UserError, match=r"^the evaluation settings stored with the checkpoint \(extra\.eval of model\.json\)"
    ):
        chosen_settings({"samples": -1}, {})
    assert chosen_settings({"samples": -1}, {"samples": 2}).samples == 2  # the flags win


@pytest.mark.slow
def test_64_bits_change_nothing(student, tmp_path):
    """jax's switch would give arrays that the layers do not take; the commands say that they ignore it."""
    arguments = (f"--checkpoint={student}", "--tasks=passkey", "--lengths=200", "--samples=3", "--dtype=float32")
    reports = []
    for name, variables in (("plain", {}), ("wide", {"JAX_ENABLE_X64": "1"})):
        done = _run("evaluate", *arguments, f"--output={tmp_path / name}", cwd=tmp_path, **variables)
        assert done.returncode == 0, done.stderr
        assert ("JAX_ENABLE_X64 is ignored" in done.stderr) == bool(variables)
        reports.append(json.loads((tmp_path / name / "passkey.json").read_text())["results"])
    assert reports[0] == reports[1]
